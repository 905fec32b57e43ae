"""``raise_hand``, the event of toy_chart.py: its data are a reason, and its acknowledgement repeats the reason."""

from typing import ClassVar

import toy_chart
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from lesson_server.errors import Refusal
from lesson_server.events.connection import Connection, Region, cleanup
from lesson_server.events.event import Event
from lesson_server.events.machine import Chart

# The reasons of all hands that are raised, by sid.
REASONS: dict[str, str] = {}


class NotJoined(Refusal):
    message = "join the lesson first"
    outcome = "not_joined"


class NoReason(Refusal):
    message = "raise_hand takes a reason"
    outcome = "no_reason"


class Reason(TypedDict):
    reason: str


class RaiseHand(Region):
    CHART: ClassVar[Chart] = toy_chart
    DATA = TypeAdapter(str)
    RESULT = Reason
    BAD_DATA = NoReason
    REFUSALS = (NoReason, NotJoined)

    __slots__ = ("_reason",)

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._reason = ""

    def result(self) -> Reason:
        return {"reason": self._reason}

    def check_joined(self) -> None:
        if not any(region.is_present for region in self.connection):
            raise NotJoined

    async def keep_reason(self) -> None:
        assert isinstance(self.request, str)
        await self.connection.services.sockets.get_session(self.connection.sid)  # a step that waits
        self._reason = REASONS[self.connection.sid] = self.request

    @cleanup
    async def forget_reason(self) -> None:
        del REASONS[self.connection.sid]


RAISE_HAND = Event((RaiseHand,), deadline=1.0)
