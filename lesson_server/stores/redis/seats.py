"""Redis: the seat map of a lesson, ``lesson_seat_{lesson_id}``: seat number → occupant, or "" for a free seat."""

from collections.abc import Sequence

from lesson_server.stores.redis import keys
from lesson_server.stores.redis.store import Store

# Reads and writes in one atomic step: two simultaneous first joins can't both find no map, and no occupant is ever
# overwritten. A map is complete if it has as many fields as the lesson has seats, and the last seat: most joins of a
# class add nothing.
ENSURE_SEAT_MAP = """
local seat_count = tonumber(ARGV[1])
if redis.call('HLEN', KEYS[1]) < seat_count or redis.call('HEXISTS', KEYS[1], seat_count) == 0 then
    for seat = 1, seat_count do
        redis.call('HSETNX', KEYS[1], seat, '')
    end
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


# ARGV[1] is an occupant. A removed person is rare, so that reading the whole map does not matter.
FREE_SEATS = """
local seats = redis.call('HGETALL', KEYS[1])
for position = 1, #seats, 2 do
    if seats[position + 1] == ARGV[1] then
        redis.call('HSET', KEYS[1], seats[position], '')
    end
end
"""


class Seats:
    """The seat maps in Redis.

    Args:
        store: the connection to Redis.
        retention: TTL in seconds of a seat map after the last join of its lesson (``presence.retention``).
    """

    def __init__(self, store: Store, retention: int) -> None:
        self._store = store
        self._retention = retention

    async def ensure_map(self, lesson_id: str, seat_count: int) -> None:
        """Create the seat map if there is none, and add the missing seats if the lesson has grown.

        One round trip, or none for a lesson without seats.

        Source: both diagrams, arrows 10 and 11.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        if seat_count == 0:
            return
        key = self._key(lesson_id)
        await self._store.execute(("EVAL", ENSURE_SEAT_MAP, 1, key, seat_count, self._retention))

    async def free(self, lesson_id: str, client_id: str) -> None:
        """Free the seat of a participant in a lesson, if the participant has one.

        Source: contract, section 10.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        await self._store.execute(("EVAL", FREE_SEATS, 1, self._key(lesson_id), client_id))

    async def missing(self, lesson_ids: Sequence[str]) -> list[str]:
        """Return the lessons without a seat map, and renew the TTLs of the other seat maps, in one round trip.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        answers = await self._store.execute(
            *(("EXPIRE", self._key(lesson_id), self._retention) for lesson_id in lesson_ids)
        )
        return [lesson_id for lesson_id, exists in zip(lesson_ids, answers, strict=True) if not exists]

    def _key(self, lesson_id: str) -> str:
        return self._store.key(keys.seat_map(lesson_id))
