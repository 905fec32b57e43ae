"""One client's connection, and the regions in which its charts run.

A *region*, in the words of statecharts, is a part of a connection that has a state of its own: here, one chart. A
connection has a region for each event that it has sent, so an event that it never sends costs nothing.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lesson_server.errors import InvalidTransition, UnexpectedData
from lesson_server.events.machine import Chart, ChartMachine
from lesson_server.events.services import Services

logger = logging.getLogger(__name__)

# How many transitions a region remembers for the message of a trigger that is refused.
HISTORY_LENGTH = 6

AnyRegion = TypeVar("AnyRegion", bound="Region")


@dataclass(frozen=True, slots=True)
class Handshake:
    """Who connects, and to which lesson.

    Attributes:
        client: the kind of client, ``teacher`` or ``participant``.
        lesson_id: the lesson; not looked up yet.
        access_token: not verified yet. None when there is none; an empty text is an invalid token.
        user_id: counts for a teacher where ``auth.trust_teacher_user_id`` is on. None and empty as above.
    """

    client: str
    lesson_id: str
    access_token: str | None
    user_id: str | None


class Connection:
    """One client's connection.

    Args:
        sid: the Socket.IO id of the connection.
        handshake: what the client said when it connected.
        services: what the steps of the charts work with.
        machines: the machine of each chart, by the class of its region.
    """

    __slots__ = ("_regions", "handshake", "lock", "machines", "services", "sid")

    def __init__(
        self,
        sid: str,
        handshake: Handshake,
        services: Services,
        machines: Mapping[type["Region"], ChartMachine],
    ) -> None:
        self.sid = sid
        self.handshake = handshake
        self.services = services
        self.machines = machines
        self.lock = asyncio.Lock()
        self._regions: tuple[Region, ...] = ()

    def __iter__(self) -> Iterator["Region"]:
        """Return the regions that the connection has so far."""
        return iter(self._regions)

    def region(self, cls: type[AnyRegion]) -> AnyRegion:
        """Return the region of that class; the first call makes it."""
        for region in self._regions:
            if type(region) is cls:
                return region
        region = cls(self)
        self._regions = (*self._regions, region)
        return region

    async def restore(self) -> bool:
        """Write again what Redis has lost of this connection.

        Returns:
            False when Redis should hold nothing of it.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        return any([await region.attempt("restore") for region in self])

    async def end(self) -> None:
        """End the connection in all of its regions, the latest first, and clean up."""
        for region in reversed(self._regions):
            await region.attempt("disconnect")


class Region:
    """One chart on one connection: its state, and a method for each step and condition that the chart names.

    Args:
        connection: the connection.

    Attributes:
        state: of the chart.
        history: the last transitions, oldest first, as ``trigger → state``.
        request: what the event that runs now asks for.
    """

    CHART: ClassVar[Chart]

    __slots__ = ("connection", "history", "request", "state")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.state = self.CHART.INITIAL
        self.history: tuple[str, ...] = ()
        self.request: object = None

    def __repr__(self) -> str:
        client, sid, lesson_id = self.CHART.CLIENT, self.connection.sid, self.connection.handshake.lesson_id
        return f"<{self.CHART.EVENT} of {client} {sid} lesson {lesson_id} {self.state}>"

    # What the gateway asks

    @classmethod
    def parse(cls, data: tuple[object, ...]) -> object:
        """Read the data of an event: the request, which equals that of another event when both ask for the same.

        Without an override, the event has no data, and its request is None. A single null is no data.

        Raises:
            Refusal: these are not the data of the event.
        """
        if data not in ((), (None,)):
            raise UnexpectedData(cls.CHART.EVENT)
        return None

    def result(self) -> dict[str, Any]:
        """Return the data of the acknowledgement of an event that has succeeded."""
        return {}

    @property
    def has_begun(self) -> bool:
        """Whether the event has changed the state."""
        return self.state != self.CHART.INITIAL

    @property
    def has_ended(self) -> bool:
        """Whether the connection has ended."""
        return self.state in self.CHART.FINAL

    @property
    def is_present(self) -> bool:
        """Whether Redis should hold the presence of the client because of this region."""
        return self.state in self.CHART.PRESENT

    @property
    def needs_seat_map(self) -> bool:
        """Whether Redis should hold the seat map of the lesson because of this region."""
        return False

    # The one door

    async def fire(self, trigger: str) -> bool:
        """Move the region. All transitions of a connection go through here, one at a time; a later one waits.

        Returns:
            False when a condition of the chart does not hold; the state is unchanged.

        Raises:
            InvalidTransition: the chart has no row for the trigger in this state; nothing has changed.
            Refusal: a step refused; the state is unchanged.
        """
        async with self.connection.lock:
            moved = await self.connection.machines[type(self)].fire(self, trigger)
            self.history = (*self.history[1 - HISTORY_LENGTH :], f"{trigger} → {self.state}")
            return moved

    async def run(self) -> None:
        """Fire the rest of the event's triggers.

        A disconnect in the meantime waits for the running transition, and then the chart refuses the next one.

        Raises:
            InvalidTransition: the connection ended in the middle of the event.
            Refusal: a step refused. The trigger ``abandon`` leads back.
        """
        for trigger in self.connection.machines[type(self)].rest_of_path(self.state):
            await self.fire(trigger)

    async def attempt(self, trigger: str) -> bool:
        """As :meth:`fire`, but False where the chart has no row for the trigger in this state."""
        try:
            return await self.fire(trigger)
        except InvalidTransition:
            return False


def cleanup(step: Callable[[AnyRegion], Awaitable[None]]) -> Callable[[AnyRegion], Coroutine[Any, Any, None]]:
    """Mark a step that cleans up: an error in it is logged, and the next steps run nevertheless.

    The client can do nothing about such an error, and a connection that could not end because of it would go on with
    its event.
    """

    @functools.wraps(step)
    async def attempt(region: AnyRegion) -> None:
        try:
            await step(region)
        except Exception:
            logger.exception("%s of %r failed", step.__name__, region)

    return attempt
