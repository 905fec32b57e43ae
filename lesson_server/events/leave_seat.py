"""``leave_seat``: the methods that the charts of ``statecharts/leave_seat/`` name, in the order of the diagram.

Source: contract, section 12; ``docs/events/leave_seat.md`` has the diagram and the table of arrows.
"""

from typing import ClassVar

import statecharts.leave_seat.participant
import statecharts.leave_seat.teacher
from lesson_server.errors import AccessTokenRequired, UnexpectedData
from lesson_server.events.event import Event
from lesson_server.events.machine import Chart
from lesson_server.events.take_seat import DEADLINE, PACE, NotJoined, SeatEvent, TeacherTakeSeat


class ParticipantLeaveSeat(SeatEvent):
    """A participant who leaves a seat."""

    CHART: ClassVar[Chart] = statecharts.leave_seat.participant
    REFUSALS = (NotJoined, AccessTokenRequired, UnexpectedData)

    __slots__ = ()

    async def clear_seat(self) -> None:
        """Free the person's seat in the seat map, if there is one."""
        await self.connection.services.seats.leave(self.connection.handshake.lesson_id, self._session["client_id"])
        self.connection.seat = 0  # so that it is not restored


class TeacherLeaveSeat(TeacherTakeSeat):
    """A teacher, who has no seat to leave."""

    CHART: ClassVar[Chart] = statecharts.leave_seat.teacher

    __slots__ = ()


LEAVE_SEAT = Event((ParticipantLeaveSeat, TeacherLeaveSeat), DEADLINE, pace=PACE)
