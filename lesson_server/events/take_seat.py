"""``take_seat``: the methods that the charts of ``statecharts/take_seat/`` name, in the order of the diagram.

Source: contract, section 12; ``docs/events/take_seat.md`` has the diagram and the table of arrows.
"""

from typing import Any, ClassVar

import statecharts.take_seat.participant
import statecharts.take_seat.teacher
from lesson_server.errors import AccessTokenRequired, Refusal
from lesson_server.events.connection import Connection, Region
from lesson_server.events.event import Event
from lesson_server.events.machine import Chart
from lesson_server.stores.redis.seats import Taking

# Seconds for the steps, and between two events of one connection; see event.py.
DEADLINE = 4.0
PACE = 0.05


class NotJoined(Refusal):
    """The event needs a join, and the connection has not joined."""

    message = "join the lesson first"
    outcome = "not_joined"
    retryable = True


class NotAParticipant(Refusal):
    """A client of another kind asked for a seat."""

    message = "only a participant takes a seat"
    outcome = "not_a_participant"


class NotASeatNumber(Refusal):
    """The data of the event is neither nothing nor a seat number."""

    message = "take_seat takes a seat number or nothing"
    outcome = "unexpected_data"


class NoSuchSeat(Refusal):
    """The lesson has seats, and none of this number."""

    outcome = "no_such_seat"

    def __init__(self, seat: object) -> None:
        super().__init__(f"seat {seat} does not exist")


class SeatIsTaken(Refusal):
    """Somebody else has the seat; a retry can help, because the seat may be left."""

    outcome = "seat_is_taken"
    retryable = True

    def __init__(self, seat: object) -> None:
        super().__init__(f"seat {seat} is taken")


class LessonIsFull(Refusal):
    """No seat is free; a retry can help, because a seat may be left."""

    message = "the lesson is full"
    outcome = "lesson_full"
    retryable = True


class LessonHasNoSeats(Refusal):
    """The lesson has no seats at all."""

    message = "the lesson has no seats"
    outcome = "no_seats"


class SeatEvent(Region):
    """The steps that the charts of ``take_seat`` and ``leave_seat`` share."""

    __slots__ = ("_session",)

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._session: dict[str, Any] = {}

    def check_joined(self) -> None:
        """Check that the connection has joined its lesson."""
        if not self.connection.has_joined:
            raise NotJoined

    def check_access_token(self) -> None:
        """Check that the client is no guest; the join has verified the token."""
        if self.connection.handshake.access_token is None:
            raise AccessTokenRequired

    def check_participant(self) -> None:
        """Refuse a client that is no participant."""
        raise NotAParticipant

    def check_data(self) -> None:
        """Check the data of the event. As in the contract, the client is checked first."""
        raise NotImplementedError

    async def get_session(self) -> None:
        """Get the session, in which the join has saved the ``client_id`` and the number of seats."""
        self._session = await self.connection.services.sockets.get_session(self.connection.sid)


class MalformedData:
    """The request of an event whose data is none that the event takes."""


class ParticipantTakeSeat(SeatEvent):
    """A participant who takes a seat."""

    CHART: ClassVar[Chart] = statecharts.take_seat.participant

    __slots__ = ()

    @classmethod
    def parse(cls, data: tuple[object, ...]) -> object:
        """Return the seat number, None for any seat, or a MalformedData."""
        match data:
            case () | (None,):
                return None
            case ({"seat": int() as seat, **others},) if not others and not isinstance(seat, bool):
                return seat
        return MalformedData()

    def result(self) -> dict[str, Any]:
        """Return the number of the seat."""
        return {"seat": self.connection.seat}

    def check_data(self) -> None:
        """Check that the data is a seat number or nothing."""
        if isinstance(self.request, MalformedData):
            raise NotASeatNumber

    async def set_seat(self) -> None:
        """Take the seat in the seat map, in place of the seat that the person has."""
        wanted = self.request
        assert wanted is None or isinstance(wanted, int)
        outcome, seat = await self.connection.services.seats.take(
            self.connection.handshake.lesson_id, self._session["client_id"], wanted, self._session.get("seat", 0)
        )
        match outcome:
            case Taking.NO_SEATS:
                raise LessonHasNoSeats
            case Taking.NO_SUCH_SEAT:
                raise NoSuchSeat(wanted)
            case Taking.HELD_BY_ANOTHER:
                raise SeatIsTaken(wanted)
            case Taking.FULL:
                raise LessonIsFull
        self.connection.seat = seat


class TeacherTakeSeat(SeatEvent):
    """A teacher, who takes no seat."""

    CHART: ClassVar[Chart] = statecharts.take_seat.teacher

    __slots__ = ()

    @classmethod
    def parse(cls, data: tuple[object, ...]) -> object:
        """Accept any data, because the client is refused first."""
        return None


TAKE_SEAT = Event((ParticipantTakeSeat, TeacherTakeSeat), DEADLINE, pace=PACE)
