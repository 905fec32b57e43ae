"""Redis: the deadlines of seats, ``lesson_node_seat_deadlines``: who is to be looked at next, and when.

A sorted set: a person in a lesson → the time in milliseconds since 1970, by the clock of Redis. An entry is only a
reminder: whether the seat is due stands in the index of the seat map. So an entry too many does no harm.
"""

import asyncio
from collections.abc import Awaitable, Callable

import orjson

from lesson_server.stores.redis import keys
from lesson_server.stores.redis.store import Command, Store

# Deadlines that one node handles at a time.
BATCH_SIZE = 100
# Milliseconds after which another node repeats what a node has begun and not completed.
REPEAT_AFTER = 5_000

NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# ARGV: the entry, and the milliseconds until its time.
ADD = f"{NOW} redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])"

# ARGV: the number of entries, and the milliseconds until they are due again. Returns the entries that are due, and
# their new time.
CLAIM_DUE = f"""{NOW}
local entries = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
local again = string.format('%.0f', now + ARGV[2])
for _, entry in ipairs(entries) do
    redis.call('ZADD', KEYS[1], again, entry)
end
return {{again, entries}}
"""

# ARGV: the entry, the time at which it was claimed, and the milliseconds until its next time; 0: it is removed. An
# entry that was written again meanwhile is left as it is.
SETTLE = f"""{NOW}
if redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then return end
if ARGV[3] == '0' then
    redis.call('ZREM', KEYS[1], ARGV[1])
else
    redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
end
"""


class SeatDeadlines:
    """The deadlines of all seats.

    Args:
        store: the connection to Redis.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def addition(self, lesson_id: str, client_id: str, milliseconds: int) -> Command:
        """Return the command that lists a person in a lesson, in place of an earlier deadline."""
        return ("EVAL", ADD, 1, self._key, _entry(lesson_id, client_id), milliseconds)

    async def sweep(self, check: Callable[[str, str], Awaitable[int]]) -> int:
        """Check some of those whose deadlines have passed.

        Args:
            check: called with the lesson and the person; returns the milliseconds until the next deadline, or 0.

        Returns:
            the number of deadlines that have passed; at most BATCH_SIZE.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        ((again, entries),) = await self._store.execute(("EVAL", CLAIM_DUE, 1, self._key, BATCH_SIZE, REPEAT_AFTER))
        results = await asyncio.gather(
            *(self._settle(entry, again, check) for entry in entries), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return len(entries)

    async def _settle(self, entry: str, claimed_at: str, check: Callable[[str, str], Awaitable[int]]) -> None:
        milliseconds = await check(*orjson.loads(entry))
        await self._store.execute(("EVAL", SETTLE, 1, self._key, entry, claimed_at, milliseconds))

    @property
    def _key(self) -> str:
        return self._store.key(keys.SEAT_DEADLINES)


def _entry(lesson_id: str, client_id: str) -> str:
    return orjson.dumps([lesson_id, client_id]).decode()
