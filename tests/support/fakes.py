"""The services of a connection in memory, and the faults that can be made to happen in them.

Every await of a fake is a *point* that a test can choose: ``presence.write`` comes before the effect of that call,
and a ``#2`` tells the second time from the first. What writes to Redis has a second point after the effect,
``presence.write, done``: a write that fails there is one whose answer was lost. The rooms and sessions of the
sockets are in the process, and have no answer to lose.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from joins import join_of

from lesson_server.errors import AccessTokenExpired, AccessTokenInvalid, LessonNotFound, StoreUnavailable
from lesson_server.events.event import Event
from lesson_server.events.join_lesson import Join
from lesson_server.events.registry import EVENTS
from lesson_server.events.services import Services
from lesson_server.gateway.admission import Admission
from lesson_server.gateway.handlers import Answer, Gateway
from lesson_server.gateway.spans import Spans
from lesson_server.metrics import Metrics
from lesson_server.status import Status
from lesson_server.stores.rds.lesson import Lesson
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.records import Entry, Record
from lesson_server.stores.redis.seats import Taking
from lesson_server.stores.redis.store import Command
from lesson_server.tokens import Identity

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

    As in the real one, a sid loses its session, and leaves its rooms, only after the handler of ``disconnect``. So what
    is in ``rooms`` when that handler is done was forgotten by it.
    """

    def __init__(self, faults: Faults) -> None:
        self.handlers: dict[str, Callable[..., Awaitable[Any]]] = {}
        self.rooms: dict[str, set[str]] = {}
        self.sessions: dict[str, dict[str, Any]] = {}
        self.closed: list[str] = []  # the sids whose connections the server has closed
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

    def close_connection(self, sid: str) -> None:
        self.closed.append(sid)


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


Claimed = tuple[int, object, Entry]  # the order of joining, whose claim it is, and the entry as it would be shown


class FakeRedis:
    """The hashes of a Redis, and the claims on their entries. A hash without fields is gone, as there."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[str, str]] = {}
        self.claims: dict[tuple[str, str], list[Claimed]] = {}
        self.left: set[tuple[str, str]] = set()  # the people who have left their seats, by lesson and client_id

    def flushall(self) -> None:
        self.hashes.clear()
        self.claims.clear()
        self.left.clear()

    def hset(self, key: str, fields: dict[str, str]) -> None:
        self.hashes.setdefault(key, {}).update(fields)

    def shown(self, entry: Entry) -> str | None:
        """The value of the field that tells of the entry."""
        return self.hashes.get(entry.name, {}).get(entry.fields[0])

    def claims_on(self, entry: Entry) -> list[Claimed]:
        """The claims on an entry, the oldest first."""
        return self.claims.setdefault((entry.name, entry.fields[0]), [])

    def claim(self, entry: Entry, order: int, owner: object) -> None:
        """Adds a claim to an entry, which shows the newest then."""
        claims = self.claims_on(entry)
        if entry.outlives and not claims and self.shown(entry) is not None:
            fields = self.hashes[entry.name]
            ended = tuple(text for name in entry.fields[::2] for text in (name, fields[name]))
            claims.append((0, None, replace(entry, fields=ended)))
        claims[:] = sorted(
            [claim for claim in claims if claim[1] is not owner] + [(order, owner, entry)], key=lambda claim: claim[0]
        )
        self._show(claims[-1])

    def release(self, entry: Entry, owner: object, *, undo: bool) -> None:
        """Takes a claim from an entry."""
        claims = self.claims_on(entry)
        left = [claim for claim in claims if claim[1] is not owner]
        if entry.outlives and undo and len(left) == len(claims):
            return  # there is nothing to undo, or it has been undone; the connection may have joined, and ended, since
        if entry.outlives and not undo and len(left) < len(claims) and left and left[-1][0]:
            # The joins of all others may yet fail.
            left = [(0, None, entry), *(claim for claim in left if claim[0])]
        claims[:] = left
        if claims and (undo or claims[-1][0]):
            self._show(claims[-1])
        elif not (entry.outlives and not undo) and self.shown(entry) == entry.fields[1]:
            for name in entry.fields[::2]:
                del self.hashes[entry.name][name]
            if not self.hashes[entry.name]:
                del self.hashes[entry.name]
        if claims and not claims[-1][0]:
            claims.clear()

    def _show(self, claim: Claimed) -> None:
        fields = claim[2].fields
        self.hset(claim[2].name, dict(zip(fields[::2], fields[1::2], strict=True)))


class FakeSeats:
    """The seat maps: ``changes`` in which order they changed, as ``seat_changed`` tells them."""

    def __init__(self, faults: Faults, redis: FakeRedis) -> None:
        self.changes: list[tuple[str, int, str | None]] = []
        self._redis = redis
        self._point = faults.point

    async def ensure_map(self, lesson_id: str, seat_count: int, client_id: str | None = None) -> int:
        if seat_count == 0:
            return 0
        await self._point("seats.ensure_map")
        self._ensure(lesson_id, seat_count)
        seat = self._seat_of(lesson_id, client_id) if client_id else 0
        await self._point("seats.ensure_map, done")
        return seat

    async def take(self, lesson_id: str, client_id: str, seat: int | None, seat_count: int) -> tuple[Taking, int]:
        await self._point("seats.take")
        if seat_count:
            self._ensure(lesson_id, seat_count)
        outcome = self._take(lesson_id, client_id, seat)
        await self._point("seats.take, done")
        return outcome

    async def leave(self, lesson_id: str, client_id: str) -> None:
        await self._point("seats.leave")
        held = self._seat_of(lesson_id, client_id)
        if held:
            self._set(lesson_id, held, None)
            self._redis.left.add((lesson_id, client_id))
        await self._point("seats.leave, done")

    async def restore(self, lesson_id: str, client_id: str, seat: int) -> int:
        await self._point("seats.restore")
        held = self._seat_of(lesson_id, client_id)
        if not held and (lesson_id, client_id) not in self._redis.left and not self._map(lesson_id).get(str(seat)):
            self._set(lesson_id, seat, client_id)
            held = seat
        await self._point("seats.restore, done")
        return held

    def _map(self, lesson_id: str) -> dict[str, str]:
        return self._redis.hashes.get(f"lesson_seat_{lesson_id}", {})

    def _ensure(self, lesson_id: str, seat_count: int) -> None:
        seats = {str(seat): "" for seat in range(1, seat_count + 1)}
        self._redis.hset(f"lesson_seat_{lesson_id}", seats | self._map(lesson_id))

    def _seat_of(self, lesson_id: str, client_id: str) -> int:
        return next((int(seat) for seat, occupant in self._map(lesson_id).items() if occupant == client_id), 0)

    def _take(self, lesson_id: str, client_id: str, seat: int | None) -> tuple[Taking, int]:
        seats = self._map(lesson_id)
        held = self._seat_of(lesson_id, client_id)
        free = (int(number) for number, occupant in seats.items() if not occupant)
        wanted = seat if seat is not None else held or min(free, default=0)
        if not seats:
            return Taking.NO_SEATS, 0
        if seat is None and not wanted:
            return Taking.FULL, 0
        if str(wanted) not in seats:
            return Taking.NO_SUCH_SEAT, 0
        if seats[str(wanted)] not in ("", client_id):
            return Taking.HELD_BY_ANOTHER, 0
        if held == wanted:
            return Taking.HELD, held
        if held:
            self._set(lesson_id, held, None)
        self._set(lesson_id, wanted, client_id)
        self._redis.left.discard((lesson_id, client_id))
        return Taking.TAKEN, wanted

    def _set(self, lesson_id: str, seat: int, client_id: str | None) -> None:
        self._redis.hset(f"lesson_seat_{lesson_id}", {str(seat): client_id or ""})
        self.changes.append((lesson_id, seat, client_id))


class FakePresence:
    """The records of presence: ``written`` in which order they came to Redis, ``ended`` in which they were removed.

    A removal that fails is pending, as in the real one; :meth:`retry` is Redis coming back.
    """

    def __init__(self, faults: Faults, redis: FakeRedis) -> None:
        self.written: list[Record] = []
        self.ended: list[Record] = []  # without those that were undone
        self._redis = redis
        self._point = faults.point
        self._held: dict[str, tuple[Record, object, int]] = {}
        self._orders = itertools.count(1)
        self.pending: list[Callable[[], None]] = []

    async def write(self, record: Record) -> bool:
        owner = object()
        self._held[record.sid] = record, owner, 0
        await self._point("presence.write")
        order = next(self._orders)
        self._held[record.sid] = record, owner, order
        for entry in record.entries():
            self._redis.claim(entry, order, owner)
        self.written.append(record)
        known = any(
            other.fields[1] != entry.fields[1]
            for entry in record.entries()
            if entry.outlives
            for _, _, other in self._redis.claims_on(entry)
        )
        await self._point("presence.write, done")
        return known

    async def restore(self, record: Record) -> None:
        await self._point("presence.restore")
        _, owner, order = self._held[record.sid]
        for entry in record.entries():
            self._redis.claim(entry, order, owner)
        await self._point("presence.restore, done")

    async def remove(self, sid: str, *, undo: bool = False) -> None:
        held = self._held.pop(sid, None)
        if held is None:
            return
        record, owner, _ = held

        def removal() -> None:
            for entry in record.entries():
                self._redis.release(entry, owner, undo=undo)
            if not undo and record not in self.ended:  # repeated, a removal does nothing
                self.ended.append(record)

        try:
            await self._point("presence.remove")
            removal()
            await self._point("presence.remove, done")
        except StoreUnavailable:
            self.pending.append(removal)

    def retry(self) -> None:
        while self.pending:
            self.pending.pop(0)()


class BreakableStore(RedisStore):
    """A connection to a real Redis that a test may break, and that counts how often it was broken indeed.

    ``fault`` is ``unreachable`` (nothing is carried out), ``unanswered`` (everything is), or None.
    """

    fault: str | None = None
    injected = 0

    async def execute(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]:
        if self.fault == "unreachable":
            self._fail()
        answers = await super().execute(*commands, bookkeeping=bookkeeping)
        if self.fault == "unanswered":
            self._fail()
        return answers

    def _fail(self) -> NoReturn:
        self.injected += 1
        self.failures += 1
        raise store_down()


class FakeTokens:
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

    @property
    def status(self) -> Status:
        return Status("off")

    def start(self) -> None:
        """Nothing is sent."""

    def close(self, deadline: float) -> None:
        """Nothing is left."""


def unlimited(events: Sequence[Event] = EVENTS) -> Admission:
    return Admission(1_000, 0, dict.fromkeys((event.name for event in events), 0))


class World:
    """A gateway with its services in memory: lesson ``1`` has 3 seats, lesson ``2`` has 2, lesson ``0`` none."""

    def __init__(
        self,
        *,
        faults: Faults | None = None,
        trust_teacher_user_id: bool = False,
        admission: Admission | None = None,
        events: Sequence[Event] = EVENTS,
        spans: Spans | None = None,
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
            tokens=FakeTokens(),
            analytics=self.analytics,
            metrics=self.metrics,
            trust_teacher_user_id=trust_teacher_user_id,
        )
        self.gateway = Gateway(self.sockets, self.services, admission or unlimited(events), events, spans)

    async def connect(self, sid: str, auth: object) -> Join:
        """Connects a client; its join is in the state that its chart begins with."""
        self.sockets.open(sid)
        self.sockets.handlers["connect"](sid, {}, auth)
        return join_of(self.gateway.connections[sid])

    async def join(self, sid: str, *data: object) -> Answer | None:
        return await self.sockets.handlers["join_lesson"](sid, *data)

    async def disconnect(self, sid: str) -> None:
        """The transport has closed; when the handler is done, the session is gone too, as in the real engine."""
        await self.sockets.handlers["disconnect"](sid, "transport close")
        self.sockets.close(sid)

    def joins(self, client: str) -> dict[str, float]:
        """The answers counted for a client, by outcome."""
        (family,) = self.metrics.events.collect()
        return {
            sample.labels["outcome"]: sample.value
            for sample in family.samples
            if sample.name == "lesson_events_total"
            and (sample.labels["event"], sample.labels["client"]) == ("join_lesson", client)
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
