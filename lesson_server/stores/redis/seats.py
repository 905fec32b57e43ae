"""Redis: the seat map of a lesson, ``lesson_seat_{lesson_id}``: seat number → who sits there, or "" if nobody does."""

from collections.abc import Sequence

from lesson_server.stores.redis import keys
from lesson_server.stores.redis.client import RedisStore

# Looks and writes in one: two first joins at once can't both find no map, and no occupant is ever overwritten. A map
# with as many fields as the lesson has seats, and the last of these, is whole: the usual join of a class adds nothing.
ENSURE_SEAT_MAP = """
local seat_count = tonumber(ARGV[1])
if redis.call('HLEN', KEYS[1]) < seat_count or redis.call('HEXISTS', KEYS[1], seat_count) == 0 then
    for seat = 1, seat_count do
        redis.call('HSETNX', KEYS[1], seat, '')
    end
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


class Seats:
    """The seat maps.

    Args:
        store: the connection to Redis.
        retention: seconds that a seat map lives after the last join of its lesson (``presence.retention``).
    """

    def __init__(self, store: RedisStore, retention: int) -> None:
        self._store = store
        self._retention = retention

    async def ensure_map(self, lesson_id: str, seat_count: int) -> None:
        """Make the seat map where there is none, and add the seats that a grown lesson lacks.

        One round trip, or none for a lesson without seats.

        Source: both diagrams, arrows 10 and 11.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        if seat_count == 0:
            return
        key = self._key(lesson_id)
        await self._store.run(("EVAL", ENSURE_SEAT_MAP, 1, key, seat_count, self._retention))

    async def missing(self, lesson_ids: Sequence[str]) -> list[str]:
        """Which of these lessons have no seat map. The maps of the others are kept alive. One round trip.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        answers = await self._store.run(
            *(("EXPIRE", self._key(lesson_id), self._retention) for lesson_id in lesson_ids)
        )
        return [lesson_id for lesson_id, exists in zip(lesson_ids, answers, strict=True) if not exists]

    def _key(self, lesson_id: str) -> str:
        return self._store.key(keys.seat_map(lesson_id))
