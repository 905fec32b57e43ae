"""A connection: what the charts move, and one method for each step that they name.

The methods stand in the order of the sequence diagrams. They are written as if nothing else could happen meanwhile,
and that is so: :meth:`Connection.fire` is the one door by which a connection moves, one transition at a time.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import statecharts.participant
import statecharts.teacher
from lesson_server.analytics import Analytics
from lesson_server.errors import AccessTokenInvalid, AccessTokenRequired, NotATeacher
from lesson_server.events.machine import Chart, LessonMachine
from lesson_server.identity import Identities, Identity, is_subject
from lesson_server.metrics import Metrics
from lesson_server.stores.rds.lessons import Lesson, Lessons
from lesson_server.stores.redis.presence import Presence
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.stores.redis.seats import Seats

logger = logging.getLogger(__name__)

# How much of its past a connection remembers for the message of a refused trigger.
STORY_LENGTH = 6


class Sockets(Protocol):
    """The part of the Socket.IO server that the steps use."""

    async def enter_room(self, sid: str, room: str) -> None: ...
    async def leave_room(self, sid: str, room: str) -> None: ...
    async def get_session(self, sid: str) -> dict[str, Any]: ...
    async def save_session(self, sid: str, session: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What the steps work with; the same for all connections."""

    sockets: Sockets
    lessons: Lessons
    seats: Seats
    presence: Presence
    identities: Identities
    analytics: Analytics
    metrics: Metrics
    trust_teacher_user_id: bool


def giving_back(step: Callable[["Connection"], Awaitable[None]]) -> Callable[["Connection"], Coroutine[Any, Any, None]]:
    """Marks a step that gives something back. An error in it is told to the log and keeps nothing else from being done.

    Nobody could do anything about it, and a connection that could not end because of it would go on with its join.
    """

    @functools.wraps(step)
    async def attempt(connection: "Connection") -> None:
        try:
            await step(connection)
        except Exception:
            logger.exception("%s of %r failed", step.__name__, connection)

    return attempt


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a handshake says of who joins; None is nothing, an empty text is an invalid one."""

    access_token: str | None
    user_id: str | None


class Connection:
    """One client's connection. It owns its state; its chart says how the state moves.

    Args:
        sid: the Socket.IO id of the connection.
        lesson_id: the lesson that the handshake named.
        services: what the steps work with.
        machine: runs the chart.
        credentials: what the handshake says of who joins; the access token is not checked before the join.
    """

    CHART: ClassVar[Chart]
    CLIENT: ClassVar[str]

    __slots__ = (
        "_credentials",
        "_identity",
        "_lesson",
        "_lock",
        "_machine",
        "_seat_count",
        "_services",
        "_session",
        "lesson_id",
        "sid",
        "state",
        "story",
    )

    def __init__(
        self, sid: str, lesson_id: str, services: Services, machine: LessonMachine, credentials: Credentials
    ) -> None:
        self.sid = sid
        self.lesson_id = lesson_id
        self.state = self.CHART.INITIAL
        self.story: tuple[str, ...] = ()
        self._services = services
        self._machine = machine
        self._credentials = credentials
        self._identity: Identity | None = None
        self._lesson: Lesson | None = None
        self._session: dict[str, Any] = {}
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<{self.CLIENT} {self.sid} lesson {self.lesson_id} {self.state}>"

    @property
    def is_present(self) -> bool:
        """Whether Redis should tell of this connection."""
        return self.state in self.CHART.PRESENT

    @property
    def needs_seat_map(self) -> bool:
        """Whether Redis should hold the seat map of the lesson because of this connection."""
        return self.state in self.CHART.SEATED and self._seat_count > 0

    # The one door

    async def fire(self, trigger: str) -> bool:
        """Moves the connection. All transitions go through here, one at a time; a later one waits.

        Returns:
            False when a condition of the chart kept the connection where it is.

        Raises:
            InvalidTransition: the chart has no row for the trigger in this state; nothing has changed.
            Refusal: a step refused; the state is as it was.
        """
        async with self._lock:
            moved = await self._machine.fire(self, trigger)
            self.story = (*self.story[1 - STORY_LENGTH :], f"{trigger} → {self.state}")
            return moved

    async def join(self) -> None:
        """Fires what is left of the join. A disconnect that arrives meanwhile waits for the running transition, and
        then the chart refuses the next one.

        Raises:
            InvalidTransition: the connection ended in the middle of the join.
            Refusal: a step refused. :meth:`fire` ``abandon`` leads back.
        """
        for trigger in self._machine.rest_of_join(self.state):
            await self.fire(trigger)

    # The steps of both diagrams

    async def check_lesson_exists(self) -> None:
        self._lesson = await self._services.lessons.get(self.lesson_id)

    def check_access_token(self) -> None:
        """Verifies who this is before the room is entered; the lesson is checked first, as in the diagrams."""
        raise NotImplementedError

    def has_access_token(self) -> bool:
        """An empty text is a token, as in the diagram (``access_token is not None``), and an invalid one."""
        return self._credentials.access_token is not None

    async def enter_room(self) -> None:
        await self._services.sockets.enter_room(self.sid, self.lesson_id)

    def get_seat(self) -> None:
        """RDS told the number of seats when it was asked whether the lesson exists."""
        assert self._lesson is not None
        self._seat_count = self._lesson.seat_count

    async def get_session(self) -> None:
        self._session = await self._services.sockets.get_session(self.sid)

    def add_seat(self) -> None:
        if self._seat_count:
            self._session["seat"] = self._seat_count

    async def save_session(self) -> None:
        await self._services.sockets.save_session(self.sid, self._session)

    async def ensure_seat_map(self) -> None:
        await self._services.seats.ensure_map(self.lesson_id, self._seat_count)

    # After Redis has lost what it held

    async def restore_presence(self) -> None:
        await self._services.presence.restore(self._record())

    # Giving back

    @giving_back
    async def clear_session(self) -> None:
        await self.get_session()  # the join may have failed before it had it
        for key in ("seat", "client_id", "role"):
            self._session.pop(key, None)
        await self.save_session()

    @giving_back
    async def leave_room(self) -> None:
        await self._services.sockets.leave_room(self.sid, self.lesson_id)

    @giving_back
    async def undo_presence(self) -> None:
        """Removes what a join may have written that failed or did not come to its end."""
        await self._services.presence.remove(self.sid, undo=True)

    @giving_back
    async def remove_presence(self) -> None:
        await self._services.presence.remove(self.sid)

    def _record(self) -> Record:
        raise NotImplementedError


class TeacherConnection(Connection):
    """The Teacher App's connection. Its ``user_id`` counts only where ``auth.trust_teacher_user_id`` is on."""

    CHART: ClassVar[Chart] = statecharts.teacher
    CLIENT = "teacher"
    ROLE = "teacher"

    __slots__ = ()

    def check_access_token(self) -> None:
        user_id = self._credentials.user_id
        if user_id is not None and self._services.trust_teacher_user_id:
            if not is_subject(user_id):
                raise AccessTokenInvalid
            self._identity = Identity(user_id, self.ROLE)
            return
        if not self.has_access_token():
            raise AccessTokenRequired
        identity = self._services.identities.verify(self._credentials.access_token)
        if identity.role != self.ROLE:
            raise NotATeacher
        self._identity = identity

    async def set_teacher_presence(self) -> None:
        await self._services.presence.write(self._record())

    def _record(self) -> TeacherRecord:
        assert self._identity is not None
        return TeacherRecord(self.sid, self.lesson_id, self._identity.subject)


class ParticipantConnection(Connection):
    """A Participant's connection. Without an access token it is a guest's, which is seated and no more."""

    CHART: ClassVar[Chart] = statecharts.participant
    CLIENT = "participant"

    __slots__ = ("_client_id", "_is_reconnect")

    def check_access_token(self) -> None:
        if self.has_access_token():
            self._identity = self._services.identities.verify(self._credentials.access_token)

    def get_client_id(self) -> None:
        assert self._identity is not None
        self._client_id = self._identity.subject

    async def save_client(self) -> None:
        assert self._identity is not None
        self._session.update(client_id=self._client_id, role=self._identity.role)
        await self.save_session()

    async def set_client_presence(self) -> None:
        self._is_reconnect = await self._services.presence.write(self._record())

    def report_reconnect(self) -> None:
        if self._is_reconnect:
            record = self._record()
            self._services.analytics.reconnect(record.client_id, record.sid, record.lesson_id, record.role)
            self._services.metrics.reconnects.inc()

    def _record(self) -> ClientRecord:
        assert self._identity is not None
        return ClientRecord(self.sid, self.lesson_id, self._identity.subject, self._identity.role)
