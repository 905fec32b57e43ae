"""``take_seat``: the methods that the charts of ``statecharts/take_seat/`` name, in the order of the diagram.

Source: contract, section 12; ``docs/events/take_seat.md`` has the diagram and the table of arrows.
"""

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

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

    message = "seat {seat} does not exist"
    outcome = "no_such_seat"
    fields: ClassVar = {"seat": "-?[0-9]+"}


class SeatIsTaken(Refusal):
    """Somebody else has the seat; a retry can help, because the seat may be left."""

    message = "seat {seat} is taken"
    outcome = "seat_is_taken"
    retryable = True
    fields: ClassVar = {"seat": "[0-9]+"}


class LessonIsFull(Refusal):
    """No seat is free; a retry can help, because a seat may be left."""

    message = "the lesson is full"
    outcome = "lesson_full"
    retryable = True


class LessonHasNoSeats(Refusal):
    """The lesson has no seats at all."""

    message = "the lesson has no seats"
    outcome = "no_seats"


class SeatChoice(TypedDict):
    """The seat that a participant takes."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    seat: Annotated[int, Field(description="The number of the seat.")]


class TakenSeat(TypedDict):
    """The seat that a participant has."""

    seat: Annotated[int, Field(description="The number of the seat.", ge=1)]


class SeatEvent(Region):
    """The steps that the charts of ``take_seat`` and ``leave_seat`` share."""

    __slots__ = ("_session",)

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._session: dict[str, Any] = {}

    @classmethod
    def parse(cls, data: tuple[object, ...]) -> object:
        """Parse the data into a request, or into the refusal that :meth:`check_data` raises."""
        try:
            return super().parse(data)
        except Refusal as refusal:
            return refusal

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
        if isinstance(self.request, Refusal):
            raise self.request

    async def get_session(self) -> None:
        """Get the session, in which the join has saved the ``client_id`` and the number of seats."""
        self._session = await self.connection.services.sockets.get_session(self.connection.sid)


class ParticipantTakeSeat(SeatEvent):
    """A participant who takes a seat."""

    CHART: ClassVar[Chart] = statecharts.take_seat.participant
    DATA = TypeAdapter(SeatChoice | None)
    RESULT = TakenSeat
    BAD_DATA = NotASeatNumber
    REFUSALS = (
        NotJoined,
        AccessTokenRequired,
        NotASeatNumber,
        LessonHasNoSeats,
        NoSuchSeat,
        SeatIsTaken,
        LessonIsFull,
    )

    __slots__ = ()

    def result(self) -> TakenSeat:
        """Return the number of the seat."""
        return {"seat": self.connection.seat}

    async def set_seat(self) -> None:
        """Take the seat in the seat map, in place of the seat that the person has."""
        assert self.request is None or isinstance(self.request, dict)
        wanted = None if self.request is None else self.request["seat"]
        outcome, seat = await self.connection.services.seats.take(
            self.connection.handshake.lesson_id, self._session["client_id"], wanted, self._session.get("seat", 0)
        )
        match outcome:
            case Taking.NO_SEATS:
                raise LessonHasNoSeats
            case Taking.NO_SUCH_SEAT:
                raise NoSuchSeat(seat=wanted)
            case Taking.HELD_BY_ANOTHER:
                raise SeatIsTaken(seat=wanted)
            case Taking.FULL:
                raise LessonIsFull
        self.connection.seat = seat


class TeacherTakeSeat(SeatEvent):
    """A teacher, who takes no seat."""

    CHART: ClassVar[Chart] = statecharts.take_seat.teacher
    RESULT = None
    REFUSALS = (NotJoined, NotAParticipant)

    __slots__ = ()


TAKE_SEAT = Event((ParticipantTakeSeat, TeacherTakeSeat), DEADLINE, pace=PACE)
