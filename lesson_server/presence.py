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

What a node has written stands in its index as well (``lesson_node_{node_id}``: sid → record), in the same round trip,
so that another node can take it back should this one die; see nodes.py.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson

from lesson_server.errors import StoreUnavailable
from lesson_server.redis_store import Command, RedisStore

# Seconds that a teacher's sid and a participant's record live: a lesson and its breaks are over by then.
DAY = 24 * 60 * 60
# Seconds that giving back may hold up an answer; what is not done by then is owed.
REMOVAL_PATIENCE = 0.5
# Seconds between two tries to give back what is owed.
RETRY_INTERVAL = 1.0
# Entries of an index read in one round trip.
SCAN_COUNT = 200
# Records that are taken back at the same time.
BATCH_SIZE = 100

# Reads and replaces in one: of two connections of a client at once, exactly one finds nobody before it.
REPLACE_CLIENT = """
local previous = redis.call('HGET', KEYS[1], 'sid')
redis.call('HSET', KEYS[1], 'sid', ARGV[1], 'client_id', ARGV[2], 'role', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return previous
"""

# After a loss: whoever has come back since by another connection knows better.
SET_IF_FREE = """
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then
    redis.call('HSET', KEYS[1], unpack(ARGV, 2))
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
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
    """A teacher in a lesson, by this sid."""

    sid: str
    lesson_id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A participant in a lesson, by this sid."""

    sid: str
    lesson_id: str
    client_id: str
    role: str


Record = TeacherRecord | ClientRecord


class Presence:
    """The records of who is there.

    A removal that Redis does not answer is *owed*: it is tried again until Redis answers, whatever became of the
    connection meanwhile.

    Args:
        store: the connection to Redis.
        retention: seconds that records without a life of their own are kept (``presence.retention``).
        node_id: names the index of what is written here.
    """

    def __init__(self, store: RedisStore, retention: int, node_id: str) -> None:
        self._store = store
        self._retention = retention
        self._node_id = node_id
        self.held: set[str] = set()  # the sids whose records stand, or should stand, in Redis
        self._owed: dict[str, tuple[Record, bool]] = {}
        self._paying = asyncio.Lock()
        self._payer: asyncio.Task[None] | None = None

    async def set_teacher(self, record: TeacherRecord) -> None:
        """Writes where a teacher is. One round trip.

        Source: Teacher App diagram, arrows 12 and 13.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the record may have been written nevertheless.
        """
        await self._forgive(record.sid)
        await self._store.run(
            self._note(record),
            *self._hset(f"lesson_teacher_{record.lesson_id}", DAY, record.user_id, record.sid),
            *self._hset(record.user_id, self._retention, "lesson_id", record.lesson_id),
        )
        self.held.add(record.sid)

    async def set_client(self, record: ClientRecord) -> bool:
        """Writes where a participant is. One round trip.

        Source: Participant diagram, the arrows after 11.

        Returns:
            whether this is a reconnect: the client was known by another sid before.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the record may have been written nevertheless.
        """
        await self._forgive(record.sid)
        client_key = self._store.key(record.client_id)
        _, previous, *_ = await self._store.run(
            self._note(record),
            ("EVAL", REPLACE_CLIENT, 1, client_key, record.sid, record.client_id, record.role, DAY),
            *self._hset(f"lesson_student_{record.lesson_id}", self._retention, record.client_id, record.sid),
        )
        self.held.add(record.sid)
        return previous not in (None, record.sid)

    async def restore(self, record: Record) -> None:
        """Writes a record again that Redis has lost, unless the same person has come back since. One round trip.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        if isinstance(record, TeacherRecord):
            lesson_key = self._store.key(f"lesson_teacher_{record.lesson_id}")
            person_key = self._store.key(record.user_id)
            writes: tuple[Command, ...] = (
                ("EVAL", SET_IF_FREE, 1, lesson_key, DAY, record.user_id, record.sid),
                ("EVAL", SET_IF_FREE, 1, person_key, self._retention, "lesson_id", record.lesson_id),
            )
        else:
            lesson_key = self._store.key(f"lesson_student_{record.lesson_id}")
            person_key = self._store.key(record.client_id)
            client = ("sid", record.sid, "client_id", record.client_id, "role", record.role)
            writes = (
                ("EVAL", SET_IF_FREE, 1, lesson_key, self._retention, record.client_id, record.sid),
                ("EVAL", SET_IF_FREE, 1, person_key, DAY, *client),
            )
        await self._store.run(self._note(record), *writes)

    async def remove(self, record: Record, *, forget: bool = False) -> None:
        """Takes back what was written for this sid, at once or as soon as Redis answers. Never raises.

        Args:
            record: what may have been written.
            forget: take a participant's ``{client_id}`` back too, as if the join had never been tried. A connection
                that ends leaves it for its 24 h.
        """
        self.held.discard(record.sid)
        try:
            async with asyncio.timeout(REMOVAL_PATIENCE):
                await self._take_back(record, forget, self._node_id)
        except (StoreUnavailable, TimeoutError):
            self._owed[record.sid] = record, forget
            if self._payer is None:
                self._payer = asyncio.create_task(self._pay())

    async def settled(self) -> None:
        """Waits until nothing is owed."""
        if self._payer is not None:
            await asyncio.shield(self._payer)

    async def close(self) -> None:
        """Stops trying to give back what is owed."""
        if self._payer is not None:
            self._payer.cancel()

    # The index of a node

    async def index(self, node_id: str) -> AsyncIterator[list[Record]]:
        """What a node has written, in batches of one round trip each.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        cursor = "0"
        while True:
            ((cursor, entries),) = await self._store.run(
                ("HSCAN", self.index_key(node_id), cursor, "COUNT", SCAN_COUNT)
            )
            yield [_decode(sid, entry) for sid, entry in entries.items()]
            if int(cursor) == 0:
                return

    async def take_back_of(self, node_id: str, record: Record) -> None:
        """Takes back what a lost node has written for this sid.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        await self._take_back(record, False, node_id)

    def index_key(self, node_id: str) -> str:
        """The key of a node's index."""
        return self._store.key(f"lesson_node_{node_id}")

    def _note(self, record: Record) -> Command:
        return ("HSET", self.index_key(self._node_id), record.sid, _encode(record))

    # Writing and taking back

    def _hset(self, name: str, ttl: int, field: str, value: str) -> tuple[Command, Command]:
        key = self._store.key(name)
        return ("HSET", key, field, value), ("EXPIRE", key, ttl)

    async def _take_back(self, record: Record, forget: bool, node_id: str) -> None:
        if isinstance(record, TeacherRecord):
            await self._take_back_teacher(record, node_id)
        else:
            await self._take_back_client(record, forget, node_id)

    async def _take_back_teacher(self, record: TeacherRecord, node_id: str) -> None:
        run = self._store.run
        lesson_key = self._store.key(f"lesson_teacher_{record.lesson_id}")
        user_key = self._store.key(record.user_id)
        done = ("HDEL", self.index_key(node_id), record.sid)
        held, there = await run(
            ("EVAL", REMOVE_IF_HELD, 1, lesson_key, record.user_id, record.sid, record.user_id),
            ("HEXISTS", lesson_key, record.user_id),
        )
        # If nobody is there, a first try may have removed it, and its answer got lost.
        if not held and there:
            await run(done)
            return  # the teacher is here by another connection, which {user_id} tells of as well
        *_, back = await run(
            ("EVAL", REMOVE_IF_HELD, 1, user_key, "lesson_id", record.lesson_id, "lesson_id"),
            done,
            ("HEXISTS", lesson_key, record.user_id),
        )
        if back:
            # Between the two round trips the teacher came back to this lesson, and lost {user_id} to the second.
            await run(("EVAL", SET_IF_FREE, 1, user_key, self._retention, "lesson_id", record.lesson_id))

    async def _take_back_client(self, record: ClientRecord, forget: bool, node_id: str) -> None:
        lesson_key = self._store.key(f"lesson_student_{record.lesson_id}")
        commands: list[Command] = [
            ("EVAL", REMOVE_IF_HELD, 1, lesson_key, record.client_id, record.sid, record.client_id)
        ]
        if forget:
            client_key = self._store.key(record.client_id)
            commands.append(("EVAL", REMOVE_IF_HELD, 1, client_key, "sid", record.sid, "sid", "client_id", "role"))
        await self._store.run(*commands, ("HDEL", self.index_key(node_id), record.sid))

    # What is owed

    async def _forgive(self, sid: str) -> None:
        """The connection writes again, so what it owes must not be taken from it any more."""
        if sid in self._owed:
            async with self._paying:
                self._owed.pop(sid, None)

    async def _pay(self) -> None:
        paid = False
        while self._owed:
            await asyncio.sleep(0 if paid else RETRY_INTERVAL)
            async with self._paying:
                batch = list(self._owed.items())[:BATCH_SIZE]
                removals = (self._take_back(record, forget, self._node_id) for _, (record, forget) in batch)
                results = await asyncio.gather(*removals, return_exceptions=True)
                for (sid, _), result in zip(batch, results, strict=True):
                    if result is None:
                        self._owed.pop(sid, None)
                paid = None in results
        self._payer = None


def _encode(record: Record) -> bytes:
    if isinstance(record, TeacherRecord):
        return orjson.dumps(["teacher", record.lesson_id, record.user_id])
    return orjson.dumps(["participant", record.lesson_id, record.client_id, record.role])


def _decode(sid: str, entry: str) -> Record:
    kind, *fields = orjson.loads(entry)
    return TeacherRecord(sid, *fields) if kind == "teacher" else ClientRecord(sid, *fields)
