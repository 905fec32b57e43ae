"""The services of a connection in memory, and the faults that can be made to happen in them.

Every await of a fake is a *point* that a test can choose: ``presence.set_client`` comes before the effect of that call,
and a ``#2`` tells the second time from the first. What writes to Redis has a second point after the effect,
``presence.set_client, done``: a write that fails there is one whose answer was lost. The rooms and sessions of the
sockets are in the process, and have no answer to lose.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from lesson_server.admission import Admission
from lesson_server.connection import Connection, Services
from lesson_server.errors import AccessTokenExpired, AccessTokenInvalid, LessonNotFound, StoreUnavailable
from lesson_server.gateway import Answer, Gateway
from lesson_server.identity import Identity
from lesson_server.lessons import Lesson
from lesson_server.metrics import Metrics
from lesson_server.presence import ClientRecord, Record, TeacherRecord

T = TypeVar("T")

# More turns of the event loop than any chain of wake-ups in a join takes.
TURNS = 20


def run(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` that leaves the current event loop alone: pytest-tornado's plugin has one there."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(work)


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def store_down() -> StoreUnavailable:
    return StoreUnavailable("Redis", "down")


class Hold:
    """A point that waits until the test lets it go on, or fail."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._released = asyncio.Event()
        self._error: Exception | None = None

    async def wait(self) -> None:
        self.reached.set()
        await self._released.wait()
        if self._error is not None:
            raise self._error

    def release(self, error: Exception | None = None) -> None:
        self._error = error
        self._released.set()


class Faults:
    """What happens at which point; by default nothing. ``passed`` tells the points in the order they were reached."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self._times: Counter[str] = Counter()
        self._holds: dict[str, Hold] = {}

    async def point(self, name: str) -> None:
        """Called by the fakes at each await."""
        self._times[name] += 1
        times = self._times[name]
        point = name if times == 1 else f"{name} #{times}"
        self.passed.append(point)
        if point in self._holds:
            await self._holds[point].wait()

    def fail_at(self, point: str, error: Exception) -> None:
        self.hold_at(point).release(error)

    def hang_at(self, point: str) -> None:
        """For ever; only a cancellation ends it."""
        self.hold_at(point)

    def hold_at(self, point: str) -> Hold:
        hold = self._holds[point] = Hold()
        return hold


class FakeSockets:
    """The Socket.IO server: rooms of the in-memory manager, sessions of the engine.

    As in the real one, a sid loses its session when its transport closes, but leaves its rooms only after the handler
    of ``disconnect``. So what is in ``rooms`` when that handler is done was forgotten by it.
    """

    def __init__(self, faults: Faults) -> None:
        self.handlers: dict[str, Callable[..., Awaitable[Any]]] = {}
        self.rooms: dict[str, set[str]] = {}
        self.sessions: dict[str, dict[str, Any]] = {}
        self._point = faults.point

    def on(self, event: str, handler: Callable[..., Awaitable[Any]]) -> None:
        self.handlers[event] = handler

    def open(self, sid: str) -> None:
        self.sessions[sid] = {}

    def close(self, sid: str) -> None:
        del self.sessions[sid]

    async def enter_room(self, sid: str, room: str) -> None:
        await self._point("sockets.enter_room")
        self.rooms.setdefault(room, set()).add(sid)

    async def leave_room(self, sid: str, room: str) -> None:
        await self._point("sockets.leave_room")
        members = self.rooms.get(room, set())
        members.discard(sid)
        if not members:
            self.rooms.pop(room, None)

    async def get_session(self, sid: str) -> dict[str, Any]:
        """The session itself, as the library does: who changes it has saved it."""
        await self._point("sockets.get_session")
        return self.sessions[sid]

    async def save_session(self, sid: str, session: dict[str, Any]) -> None:
        await self._point("sockets.save_session")
        if sid not in self.sessions:
            raise KeyError("Session is disconnected")
        self.sessions[sid] = session


class FakeLessons:
    """RDS: lesson_id → number of seats."""

    def __init__(self, faults: Faults, seat_counts: dict[str, int]) -> None:
        self.seat_counts = seat_counts
        self._point = faults.point

    async def get(self, lesson_id: str) -> Lesson:
        await self._point("lessons.get")
        if lesson_id not in self.seat_counts:
            raise LessonNotFound(lesson_id)
        return Lesson(lesson_id, self.seat_counts[lesson_id])


class FakeRedis:
    """The hashes of a Redis. One without fields is gone, as there."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[str, str]] = {}

    def hset(self, key: str, fields: dict[str, str]) -> None:
        self.hashes.setdefault(key, {}).update(fields)

    def hget(self, key: str, field: str) -> str | None:
        return self.hashes.get(key, {}).get(field)

    def set_if_free(self, key: str, fields: dict[str, str]) -> None:
        """Sets ``fields`` unless the first of them is there."""
        if next(iter(fields)) not in self.hashes.get(key, {}):
            self.hset(key, fields)

    def remove_if_held(self, key: str, field: str, value: str, *fields: str) -> bool:
        """Removes ``fields`` if ``field`` has that value; tells whether it had."""
        if self.hget(key, field) != value:
            return False
        for name in fields:
            self.hashes[key].pop(name, None)
        if not self.hashes[key]:
            del self.hashes[key]
        return True


class FakeSeats:
    def __init__(self, faults: Faults, redis: FakeRedis) -> None:
        self._redis = redis
        self._point = faults.point

    async def ensure_map(self, lesson_id: str, seat_count: int) -> None:
        if seat_count == 0:
            return
        await self._point("seats.ensure_map")
        key = f"lesson_seat_{lesson_id}"
        occupants = self._redis.hashes.get(key, {})
        self._redis.hset(key, {str(seat): "" for seat in range(1, seat_count + 1)} | occupants)
        await self._point("seats.ensure_map, done")


class FakePresence:
    """The records of presence. ``written`` tells in which order they came to Redis.

    A removal that fails is owed, as in the real one; :meth:`pay` is Redis coming back.
    """

    def __init__(self, faults: Faults, redis: FakeRedis) -> None:
        self.written: list[TeacherRecord | ClientRecord] = []
        self._redis = redis
        self._point = faults.point
        self.owed: dict[str, Callable[[], None]] = {}

    async def set_teacher(self, record: TeacherRecord) -> None:
        self.owed.pop(record.sid, None)
        await self._point("presence.set_teacher")
        self._redis.hset(f"lesson_teacher_{record.lesson_id}", {record.user_id: record.sid})
        self._redis.hset(record.user_id, {"lesson_id": record.lesson_id})
        self.written.append(record)
        await self._point("presence.set_teacher, done")

    async def set_client(self, record: ClientRecord) -> bool:
        self.owed.pop(record.sid, None)
        await self._point("presence.set_client")
        previous = self._redis.hget(record.client_id, "sid")
        fields = {"sid": record.sid, "client_id": record.client_id, "role": record.role}
        self._redis.hset(record.client_id, fields)
        self._redis.hset(f"lesson_student_{record.lesson_id}", {record.client_id: record.sid})
        self.written.append(record)
        await self._point("presence.set_client, done")
        return previous not in (None, record.sid)

    async def restore(self, record: Record) -> None:
        await self._point("presence.restore")
        if isinstance(record, TeacherRecord):
            self._redis.set_if_free(f"lesson_teacher_{record.lesson_id}", {record.user_id: record.sid})
            self._redis.set_if_free(record.user_id, {"lesson_id": record.lesson_id})
        else:
            self._redis.set_if_free(f"lesson_student_{record.lesson_id}", {record.client_id: record.sid})
            fields = {"sid": record.sid, "client_id": record.client_id, "role": record.role}
            self._redis.set_if_free(record.client_id, fields)
        await self._point("presence.restore, done")

    async def remove(self, record: Record, *, forget: bool = False) -> None:
        def removal() -> None:
            if isinstance(record, TeacherRecord):
                self._remove_teacher(record)
            else:
                self._remove_client(record, forget)

        try:
            await self._point("presence.remove")
            removal()
            await self._point("presence.remove, done")
        except StoreUnavailable:
            self.owed[record.sid] = removal

    def _remove_teacher(self, record: TeacherRecord) -> None:
        lesson_key = f"lesson_teacher_{record.lesson_id}"
        if self._redis.remove_if_held(lesson_key, record.user_id, record.sid, record.user_id):
            self._redis.remove_if_held(record.user_id, "lesson_id", record.lesson_id, "lesson_id")

    def _remove_client(self, record: ClientRecord, forget: bool) -> None:
        lesson_key = f"lesson_student_{record.lesson_id}"
        self._redis.remove_if_held(lesson_key, record.client_id, record.sid, record.client_id)
        if forget:
            self._redis.remove_if_held(record.client_id, "sid", record.sid, "sid", "client_id", "role")

    def pay(self) -> None:
        while self.owed:
            self.owed.popitem()[1]()


class FakeIdentities:
    """Tokens that can be read: ``<role>:<subject>``; besides ``expired`` and whatever else, which is invalid."""

    def verify(self, token: object) -> Identity:
        if token == "expired":
            raise AccessTokenExpired
        if not isinstance(token, str) or ":" not in token:
            raise AccessTokenInvalid
        role, subject = token.split(":")
        return Identity(subject, role)


class FakeAnalytics:
    def __init__(self) -> None:
        self.reconnects: list[tuple[str, str, str, str]] = []

    def reconnect(self, client_id: str, sid: str, lesson_id: str, role: str) -> None:
        self.reconnects.append((client_id, sid, lesson_id, role))


class World:
    """A gateway with its services in memory: lesson ``1`` has 3 seats, lesson ``2`` has 2, lesson ``0`` none."""

    def __init__(
        self,
        *,
        faults: Faults | None = None,
        trust_teacher_user_id: bool = False,
        admission: Admission | None = None,
    ) -> None:
        self.faults = faults or Faults()
        self.redis = FakeRedis()
        self.sockets = FakeSockets(self.faults)
        self.lessons = FakeLessons(self.faults, {"0": 0, "1": 3, "2": 2})
        self.seats = FakeSeats(self.faults, self.redis)
        self.presence = FakePresence(self.faults, self.redis)
        self.analytics = FakeAnalytics()
        self.metrics = Metrics()
        self.services = Services(
            sockets=self.sockets,
            lessons=self.lessons,
            seats=self.seats,
            presence=self.presence,
            identities=FakeIdentities(),
            analytics=self.analytics,
            metrics=self.metrics,
            trust_teacher_user_id=trust_teacher_user_id,
        )
        self.gateway = Gateway(self.sockets, self.services, admission or Admission(1_000, 0, 0))

    async def connect(self, sid: str, auth: object) -> Connection:
        self.sockets.open(sid)
        await self.sockets.handlers["connect"](sid, {}, auth)
        return self.gateway.connections[sid]

    async def join(self, sid: str, *data: object) -> Answer | None:
        return await self.sockets.handlers["join_lesson"](sid, *data)

    async def disconnect(self, sid: str) -> None:
        """The transport closes, and in the same turn of the loop the handler begins, as in the real engine."""
        self.sockets.close(sid)
        await self.sockets.handlers["disconnect"](sid, "transport close")

    def joins(self, client: str) -> dict[str, float]:
        """The answers counted for a client, by outcome."""
        (family,) = self.metrics.joins.collect()
        return {
            sample.labels["outcome"]: sample.value
            for sample in family.samples
            if sample.name == "lesson_joins_total" and sample.labels["client"] == client
        }

    def held_by(self, sid: str) -> list[str]:
        """Every place that holds something of a connection."""
        rooms = [f"room {room}" for room, members in self.sockets.rooms.items() if sid in members or not members]
        session = [f"session {key}" for key in self.sockets.sessions.get(sid, {})]
        redis = [f"redis {key}" for key, fields in self.redis.hashes.items() if sid in fields.values()]
        return rooms + session + redis

    def snapshot(self) -> tuple[object, ...]:
        """What the services hold, to be compared with another time or another world."""
        copy = {key: dict(fields) for key, fields in self.redis.hashes.items()}
        sessions = {sid: dict(session) for sid, session in self.sockets.sessions.items()}
        rooms = {room: set(members) for room, members in self.sockets.rooms.items()}
        return copy, sessions, rooms, list(self.analytics.reconnects)
