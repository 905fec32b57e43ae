"""Redis: who is in which lesson, by which sid. With seats.py the only Redis commands of the server.

What is written for whom (the keys and their lives are the contract's, section 5):

=============================  =====================================================================================
a teacher in a lesson          ``lesson_teacher_{lesson_id}``: user_id → sid; ``{user_id}``: lesson_id
a participant in a lesson      ``lesson_student_{lesson_id}``: client_id → sid
a participant, wherever it is  ``{client_id}``: sid, client_id, role. It outlives the connection by 24 h: that is how a
                               reconnect is known
=============================  =====================================================================================

Every record is taken back only by the connection that wrote it: a removal compares the sid that it finds. Each script
touches one key, so that Redis Cluster can serve it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from redis.asyncio.client import Pipeline

from lesson_server.errors import StoreUnavailable
from lesson_server.redis_store import RedisStore

logger = logging.getLogger(__name__)

# Seconds that a teacher's sid and a participant's record live: a lesson and its breaks are over by then.
DAY = 24 * 60 * 60
# Seconds that giving back may hold up an answer; what is not done by then is owed.
REMOVAL_PATIENCE = 0.5
# Seconds between two tries to give back what is owed.
RETRY_INTERVAL = 1.0

# Reads and replaces in one: of two connections of a client at once, exactly one finds nobody before it.
REPLACE_CLIENT = """
local previous = redis.call('HGET', KEYS[1], 'sid')
redis.call('HSET', KEYS[1], 'sid', ARGV[1], 'client_id', ARGV[2], 'role', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return previous
"""

# The connection's own record only: the same person may have come back by another one.
REMOVE_IF_HELD = """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then
    return redis.call('HDEL', KEYS[1], unpack(ARGV, 3))
end
return 0
"""


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """A teacher in a lesson."""

    lesson_id: str
    sid: str
    user_id: str


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A participant in a lesson."""

    lesson_id: str
    sid: str
    client_id: str
    role: str


class Presence:
    """The records of who is there.

    A removal that Redis does not answer is *owed*: it is tried again until Redis answers, whatever became of the
    connection meanwhile.

    Args:
        store: the connection to Redis.
        retention: seconds that records without a life of their own are kept (``presence.retention``).
    """

    def __init__(self, store: RedisStore, retention: int) -> None:
        self._store = store
        self._retention = retention
        self._owed: dict[str, Callable[[], Awaitable[None]]] = {}
        self._paying = asyncio.Lock()
        self._payer: asyncio.Task[None] | None = None

    async def set_teacher(self, record: TeacherRecord) -> None:
        """Writes where a teacher is. One round trip.

        Source: Teacher App diagram, arrows 12 and 13.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the record may have been written nevertheless.
        """
        await self._forgive(record.sid)
        async with self._store.round_trip() as redis, redis.pipeline(transaction=False) as pipe:
            self._hset(pipe, f"lesson_teacher_{record.lesson_id}", {record.user_id: record.sid}, DAY)
            self._hset(pipe, record.user_id, {"lesson_id": record.lesson_id}, self._retention)
            await pipe.execute()

    async def set_client(self, record: ClientRecord) -> bool:
        """Writes where a participant is. One round trip.

        Source: Participant diagram, the arrows after 11.

        Returns:
            whether this is a reconnect: the client was known by another sid before.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the record may have been written nevertheless.
        """
        await self._forgive(record.sid)
        async with self._store.round_trip() as redis, redis.pipeline(transaction=False) as pipe:
            pipe.eval(
                REPLACE_CLIENT, 1, self._store.key(record.client_id), record.sid, record.client_id, record.role, DAY
            )
            self._hset(pipe, f"lesson_student_{record.lesson_id}", {record.client_id: record.sid}, self._retention)
            previous, *_ = await pipe.execute()
        return previous not in (None, record.sid)

    async def remove_teacher(self, record: TeacherRecord) -> None:
        """Takes back what :meth:`set_teacher` wrote for this sid, at once or as soon as Redis answers. Never raises."""
        await self._remove(record.sid, lambda: self._remove_teacher(record))

    async def remove_client(self, record: ClientRecord, *, forget: bool) -> None:
        """Takes a participant out of its lesson, at once or as soon as Redis answers. Never raises.

        Args:
            record: what :meth:`set_client` may have written.
            forget: take ``{client_id}`` back too, as if the join had never been tried. A connection that ends leaves it
                for its 24 h.
        """
        await self._remove(record.sid, lambda: self._remove_client(record, forget))

    async def close(self) -> None:
        """Stops trying to give back what is owed."""
        if self._payer is not None:
            self._payer.cancel()

    def _hset(self, pipe: Pipeline, name: str, mapping: dict[Any, Any], ttl: int) -> None:
        key = self._store.key(name)
        pipe.hset(key, mapping=mapping)
        pipe.expire(key, ttl)

    async def _remove_teacher(self, record: TeacherRecord) -> None:
        lesson_key = self._store.key(f"lesson_teacher_{record.lesson_id}")
        user_key = self._store.key(record.user_id)
        async with self._store.round_trip() as redis:
            if not await redis.eval(REMOVE_IF_HELD, 1, lesson_key, record.user_id, record.sid, record.user_id):
                return  # the teacher is here by another connection, which {user_id} tells of as well
            async with redis.pipeline(transaction=False) as pipe:
                pipe.eval(REMOVE_IF_HELD, 1, user_key, "lesson_id", record.lesson_id, "lesson_id")
                pipe.hexists(lesson_key, record.user_id)
                _, back = await pipe.execute()
            if back:
                # Between the two round trips the teacher came back to this lesson, and lost {user_id} to the second.
                await redis.hsetnx(user_key, "lesson_id", record.lesson_id)

    async def _remove_client(self, record: ClientRecord, forget: bool) -> None:
        async with self._store.round_trip() as redis, redis.pipeline(transaction=False) as pipe:
            lesson_key = self._store.key(f"lesson_student_{record.lesson_id}")
            pipe.eval(REMOVE_IF_HELD, 1, lesson_key, record.client_id, record.sid, record.client_id)
            if forget:
                client_key = self._store.key(record.client_id)
                pipe.eval(REMOVE_IF_HELD, 1, client_key, "sid", record.sid, "sid", "client_id", "role")
            await pipe.execute()

    # What is owed

    async def _remove(self, sid: str, removal: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(REMOVAL_PATIENCE):
                await removal()
        except (StoreUnavailable, TimeoutError):
            self._owed[sid] = removal
            if self._payer is None:
                self._payer = asyncio.create_task(self._pay())

    async def _forgive(self, sid: str) -> None:
        """The connection writes again, so what it owes must not be taken from it any more."""
        if sid in self._owed:
            async with self._paying:
                self._owed.pop(sid, None)

    async def _pay(self) -> None:
        while self._owed:
            await asyncio.sleep(RETRY_INTERVAL)
            async with self._paying:
                try:
                    for sid, removal in list(self._owed.items()):
                        await removal()
                        self._owed.pop(sid, None)
                except StoreUnavailable:
                    continue
        self._payer = None
