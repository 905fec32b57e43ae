"""``join_lesson``: the methods that the charts of ``statecharts/join_lesson/`` name, in the order of the diagrams.

No other transition of the connection runs at the same time as a method: only
:meth:`~lesson_server.events.connection.Region.fire` calls the methods, one transition at a time.

Source: contract, section 1; ``docs/events/join_lesson.md`` has the diagrams and the table of arrows.
"""

from typing import Any, ClassVar

import statecharts.join_lesson.participant
import statecharts.join_lesson.teacher
from lesson_server.errors import (
    AccessTokenExpired,
    AccessTokenInvalid,
    AccessTokenRequired,
    LessonNotFound,
    Refusal,
    UnexpectedData,
)
from lesson_server.events.connection import Connection, Region, cleanup
from lesson_server.events.event import Event
from lesson_server.events.machine import Chart
from lesson_server.stores.rds.lesson import Lesson
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.tokens import Identity, is_subject

# Seconds for the steps; see event.py.
DEADLINE = 4.0


class NotATeacher(Refusal):
    """A client connected as a teacher, with an access token of another role."""

    message = "only a teacher can join as teacher"
    outcome = "not_a_teacher"


class Join(Region):
    """The steps that both charts share."""

    __slots__ = ("_identity", "_lesson", "_seat_count", "_session")

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._identity: Identity | None = None
        self._lesson: Lesson | None = None
        self._session: dict[str, Any] = {}

    @property
    def person(self) -> str | None:
        """The subject of the access token, or the trusted ``user_id``."""
        return None if self._identity is None else self._identity.subject

    @property
    def needs_seat_map(self) -> bool:
        """Whether the lesson has seats, and the chart is in a state in which Redis holds the seat map."""
        return self.state in self.CHART.SEATED and self._seat_count > 0

    async def check_lesson_exists(self) -> None:
        """Get the lesson from RDS (arrows 2 to 4)."""
        self._lesson = await self.connection.services.lessons.get(self.connection.handshake.lesson_id)

    def check_access_token(self) -> None:
        """Verify the client's identity before the client enters the room.

        The lesson is checked first, as in the diagrams.
        """
        raise NotImplementedError

    def has_access_token(self) -> bool:
        """Return whether the client sent an access token.

        An empty string counts as a token, as in the diagram (``access_token is not None``).
        """
        return self.connection.handshake.access_token is not None

    async def enter_room(self) -> None:
        """Enter the room of the lesson (arrow 5)."""
        await self.connection.services.sockets.enter_room(self.connection.sid, self.connection.handshake.lesson_id)

    def get_seat(self) -> None:
        """Get the number of seats (arrow 6), which RDS returned with the lesson."""
        assert self._lesson is not None
        self._seat_count = self._lesson.seat_count

    async def get_session(self) -> None:
        """Get the session (arrow 7)."""
        self._session = await self.connection.services.sockets.get_session(self.connection.sid)

    def add_seat(self) -> None:
        """Add the number of seats to the session (arrow 8)."""
        if self._seat_count:
            self._session["seat"] = self._seat_count

    async def save_session(self) -> None:
        """Save the session (arrow 9)."""
        await self.connection.services.sockets.save_session(self.connection.sid, self._session)

    async def ensure_seat_map(self) -> None:
        """Create the seat map in Redis if there is none (arrows 10 and 11)."""
        await self._ensure_seat_map(None)

    # After Redis has lost its data

    async def restore_presence(self) -> None:
        """Write the presence again.

        Newer connections of the same person keep precedence over this connection.
        """
        await self.connection.services.presence.restore(self._record())

    # Cleaning up

    @cleanup
    async def clear_session(self) -> None:
        """Remove the keys that the join may have added to the session."""
        await self.get_session()  # the join may have failed before `get_session`
        for key in ("seat", "client_id", "role"):
            self._session.pop(key, None)
        await self.save_session()

    @cleanup
    async def leave_room(self) -> None:
        """Leave the room of the lesson, even if the join failed before the client entered the room."""
        await self.connection.services.sockets.leave_room(self.connection.sid, self.connection.handshake.lesson_id)

    @cleanup
    async def undo_presence(self) -> None:
        """Remove the presence that a failed or unfinished join may have written."""
        await self.connection.services.presence.remove(self.connection.sid, undo=True)

    @cleanup
    async def remove_presence(self) -> None:
        """Remove the presence of a connection that has ended."""
        await self.connection.services.presence.remove(self.connection.sid)

    def close_connection(self) -> None:
        """Close the connection from the server's side."""
        self.connection.services.sockets.close_connection(self.connection.sid)

    async def _ensure_seat_map(self, client_id: str | None) -> int:
        lesson_id = self.connection.handshake.lesson_id
        return await self.connection.services.seats.ensure_map(lesson_id, self._seat_count, client_id)

    def _record(self) -> Record:
        raise NotImplementedError


class TeacherJoin(Join):
    """The join of the Teacher App; its ``user_id`` is used only if ``auth.trust_teacher_user_id`` is on."""

    CHART: ClassVar[Chart] = statecharts.join_lesson.teacher
    REFUSALS = (
        UnexpectedData,
        LessonNotFound,
        AccessTokenExpired,
        AccessTokenInvalid,
        AccessTokenRequired,
        NotATeacher,
    )
    ROLE = "teacher"

    __slots__ = ()

    def check_access_token(self) -> None:
        """Verify that the client is a teacher, by the trusted ``user_id`` or by the token."""
        user_id = self.connection.handshake.user_id
        if user_id is not None and self.connection.services.trust_teacher_user_id:
            if not is_subject(user_id):
                raise AccessTokenInvalid
            self._identity = Identity(user_id, self.ROLE)
            return
        if not self.has_access_token():
            raise AccessTokenRequired
        identity = self.connection.services.tokens.verify(self.connection.handshake.access_token)
        if identity.role != self.ROLE:
            raise NotATeacher
        self._identity = identity

    async def set_teacher_presence(self) -> None:
        """Write the presence of the teacher (arrows 12 and 13)."""
        await self.connection.services.presence.write(self._record())

    def _record(self) -> TeacherRecord:
        assert self._identity is not None
        return TeacherRecord(self.connection.sid, self.connection.handshake.lesson_id, self._identity.subject)


class ParticipantJoin(Join):
    """The join of a Participant; without an access token the client is a guest, whose join ends once it is seated."""

    CHART: ClassVar[Chart] = statecharts.join_lesson.participant
    REFUSALS = (UnexpectedData, LessonNotFound, AccessTokenExpired, AccessTokenInvalid)

    __slots__ = ("_client_id", "_is_reconnect")

    def check_access_token(self) -> None:
        """Verify the token, if there is one."""
        if self.has_access_token():
            self._identity = self.connection.services.tokens.verify(self.connection.handshake.access_token)

    async def ensure_seat_map(self) -> None:
        """Create the seat map in Redis if there is none, and note the seat that the person has from before."""
        seat = await self._ensure_seat_map(self.person)
        self.connection.seat = seat or self.connection.seat

    def get_client_id(self) -> None:
        """Get the client's id: the subject of the verified token."""
        assert self._identity is not None
        self._client_id = self._identity.subject

    async def save_client(self) -> None:
        """Save the client's id and role in the session."""
        assert self._identity is not None
        self._session.update(client_id=self._client_id, role=self._identity.role)
        await self.save_session()

    async def set_client_presence(self) -> None:
        """Write the presence of the client, and note whether Redis already knew the client."""
        self._is_reconnect = await self.connection.services.presence.write(self._record())

    def report_reconnect(self) -> None:
        """Report a reconnect to Mixpanel if Redis already knew the client."""
        if self._is_reconnect:
            record, services = self._record(), self.connection.services
            services.analytics.reconnect(record.client_id, record.sid, record.lesson_id, record.role)
            services.metrics.reconnects.inc()

    async def restore_seat(self) -> None:
        """Write the person's seat again, if the person had one."""
        if self.connection.seat:
            record, services = self._record(), self.connection.services
            seat = await services.seats.restore(record.lesson_id, record.client_id, self.connection.seat)
            self.connection.seat = seat

    def _record(self) -> ClientRecord:
        assert self._identity is not None
        sid, lesson_id = self.connection.sid, self.connection.handshake.lesson_id
        return ClientRecord(sid, lesson_id, self._identity.subject, self._identity.role)


JOIN_LESSON = Event((TeacherJoin, ParticipantJoin), DEADLINE, rate=lambda settings: settings.join_rate)
