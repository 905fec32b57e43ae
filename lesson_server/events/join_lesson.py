"""``join_lesson``: the methods that the charts of ``statecharts/join_lesson/`` name, in the order of the diagrams.

Each method is written as if nothing else could happen at the same time. That is so: only
:meth:`~lesson_server.events.connection.Region.fire` runs them, one transition at a time.

Source: contract, section 1; ``docs/events/join_lesson.md`` has the diagrams and the table of arrows.
"""

from typing import Any, ClassVar

import statecharts.join_lesson.participant
import statecharts.join_lesson.teacher
from lesson_server.errors import AccessTokenInvalid, AccessTokenRequired, Refusal
from lesson_server.events.connection import Connection, Region, cleanup
from lesson_server.events.event import Event
from lesson_server.events.machine import Chart
from lesson_server.stores.rds.lessons import Lesson
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.tokens import Identity, is_subject

# Seconds.
DEADLINE = 4.0


class NotATeacher(Refusal):
    """The access token of a teacher's connection is somebody else's."""

    message = "only a teacher can join as teacher"
    outcome = "not_a_teacher"


class Join(Region):
    """The steps that both charts have."""

    __slots__ = ("_identity", "_lesson", "_seat_count", "_session")

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._identity: Identity | None = None
        self._lesson: Lesson | None = None
        self._session: dict[str, Any] = {}

    @property
    def needs_seat_map(self) -> bool:
        """Whether the lesson has seats, and the chart has come to where Redis holds their map."""
        return self.state in self.CHART.SEATED and self._seat_count > 0

    async def check_lesson_exists(self) -> None:
        """Arrows 2 to 4."""
        self._lesson = await self.connection.services.lessons.get(self.connection.handshake.lesson_id)

    def check_access_token(self) -> None:
        """Verify who this is before the room is entered. The lesson is checked first, as in the diagrams."""
        raise NotImplementedError

    def has_access_token(self) -> bool:
        """Return whether there is a token. An empty text is one, as in the diagram (``access_token is not None``)."""
        return self.connection.handshake.access_token is not None

    async def enter_room(self) -> None:
        """Arrow 5."""
        await self.connection.services.sockets.enter_room(self.connection.sid, self.connection.handshake.lesson_id)

    def get_seat(self) -> None:
        """Arrow 6. RDS told the number of seats when it was asked whether the lesson exists."""
        assert self._lesson is not None
        self._seat_count = self._lesson.seat_count

    async def get_session(self) -> None:
        """Arrow 7."""
        self._session = await self.connection.services.sockets.get_session(self.connection.sid)

    def add_seat(self) -> None:
        """Arrow 8."""
        if self._seat_count:
            self._session["seat"] = self._seat_count

    async def save_session(self) -> None:
        """Arrow 9."""
        await self.connection.services.sockets.save_session(self.connection.sid, self._session)

    async def ensure_seat_map(self) -> None:
        """Arrows 10 and 11."""
        await self.connection.services.seats.ensure_map(self.connection.handshake.lesson_id, self._seat_count)

    # After Redis has lost what it held

    async def restore_presence(self) -> None:
        """Write the presence again. Newer connections of the same person stay before this one."""
        await self.connection.services.presence.restore(self._record())

    # Cleaning up

    @cleanup
    async def clear_session(self) -> None:
        """Remove from the session what the join may have put there."""
        await self.get_session()  # the join may have failed before it had the session
        for key in ("seat", "client_id", "role"):
            self._session.pop(key, None)
        await self.save_session()

    @cleanup
    async def leave_room(self) -> None:
        """Leave the room of the lesson, also where the join failed before it was entered."""
        await self.connection.services.sockets.leave_room(self.connection.sid, self.connection.handshake.lesson_id)

    @cleanup
    async def undo_presence(self) -> None:
        """Remove what a join may have written that failed or did not come to its end."""
        await self.connection.services.presence.remove(self.connection.sid, undo=True)

    @cleanup
    async def remove_presence(self) -> None:
        """Remove the presence of a connection that has ended."""
        await self.connection.services.presence.remove(self.connection.sid)

    def _record(self) -> Record:
        raise NotImplementedError


class TeacherJoin(Join):
    """The Teacher App joins. Its ``user_id`` counts only where ``auth.trust_teacher_user_id`` is on."""

    CHART: ClassVar[Chart] = statecharts.join_lesson.teacher
    ROLE = "teacher"

    __slots__ = ()

    def check_access_token(self) -> None:
        """Verify that this is a teacher, by the trusted ``user_id`` or by the token."""
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
        """Arrows 12 and 13."""
        await self.connection.services.presence.write(self._record())

    def _record(self) -> TeacherRecord:
        assert self._identity is not None
        return TeacherRecord(self.connection.sid, self.connection.handshake.lesson_id, self._identity.subject)


class ParticipantJoin(Join):
    """A Participant joins. Without an access token it is a guest, who is seated and no more."""

    CHART: ClassVar[Chart] = statecharts.join_lesson.participant

    __slots__ = ("_client_id", "_is_reconnect")

    def check_access_token(self) -> None:
        """Verify the token, if there is one."""
        if self.has_access_token():
            self._identity = self.connection.services.tokens.verify(self.connection.handshake.access_token)

    def get_client_id(self) -> None:
        """Take the subject of the token, which has been verified before."""
        assert self._identity is not None
        self._client_id = self._identity.subject

    async def save_client(self) -> None:
        """Put who this is into the session."""
        assert self._identity is not None
        self._session.update(client_id=self._client_id, role=self._identity.role)
        await self.save_session()

    async def set_client_presence(self) -> None:
        """Look whether Redis knows the client from before, and write its presence."""
        self._is_reconnect = await self.connection.services.presence.write(self._record())

    def report_reconnect(self) -> None:
        """Report to Mixpanel a client that was known."""
        if self._is_reconnect:
            record, services = self._record(), self.connection.services
            services.analytics.reconnect(record.client_id, record.sid, record.lesson_id, record.role)
            services.metrics.reconnects.inc()

    def _record(self) -> ClientRecord:
        assert self._identity is not None
        sid, lesson_id = self.connection.sid, self.connection.handshake.lesson_id
        return ClientRecord(sid, lesson_id, self._identity.subject, self._identity.role)


JOIN_LESSON = Event(
    name="join_lesson",
    regions={"teacher": TeacherJoin, "participant": ParticipantJoin},
    deadline=DEADLINE,
    rate=lambda settings: settings.join_rate,
)
