"""``leave_seat``: the methods that the charts of ``statecharts/leave_seat/`` name, in the order of the diagram.

Source: contract, section 12; ``docs/events/leave_seat.md`` has the diagram and the table of arrows.
"""

from typing import ClassVar

import statecharts.leave_seat.participant
import statecharts.leave_seat.teacher
from lesson_server.errors import UnexpectedData
from lesson_server.events.event import Event
from lesson_server.events.machine import Chart
from lesson_server.events.take_seat import DEADLINE, PACE, MalformedData, SeatEvent, TeacherTakeSeat


class ParticipantLeaveSeat(SeatEvent):
    """A participant who leaves a seat."""

    CHART: ClassVar[Chart] = statecharts.leave_seat.participant

    __slots__ = ()

    @classmethod
    def parse(cls, data: tuple[object, ...]) -> object:
        """Return None, or a MalformedData."""
        return None if data in ((), (None,)) else MalformedData()

    def check_data(self) -> None:
        """Check that there is no data."""
        if self.request is not None:
            raise UnexpectedData(self.CHART.EVENT)

    async def clear_seat(self) -> None:
        """Free the person's seat in the seat map, if there is one."""
        await self.connection.services.seats.leave(self.connection.handshake.lesson_id, self._session["client_id"])
        self.connection.seat = 0  # so that it is not restored


class TeacherLeaveSeat(TeacherTakeSeat):
    """A teacher, who has no seat to leave."""

    CHART: ClassVar[Chart] = statecharts.leave_seat.teacher

    __slots__ = ()


LEAVE_SEAT = Event((ParticipantLeaveSeat, TeacherLeaveSeat), DEADLINE, pace=PACE)
