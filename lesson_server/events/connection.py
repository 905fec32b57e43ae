"""One client's connection, and the regions in which its charts run.

A *region*, a term of statecharts, is a part of a connection that has a state of its own: here, one chart. A connection
has a region for each event that the client has sent, so an event that the client never sends costs nothing.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from lesson_server.errors import InvalidTransition, Refusal, UnexpectedData
from lesson_server.events.handshake import Handshake
from lesson_server.events.machine import Chart, ChartMachine
from lesson_server.events.services import Services
from lesson_server.log import EventLogger

logger = EventLogger(__name__)

# Events of a connection that may come at once, if the event has a pace.
PACE_BURST = 40
# Transitions that a region remembers for the message of :class:`InvalidTransition`.
HISTORY_LENGTH = 6
# What a sentence of the log says of a region.
REGION = "<{socketio_event} of {client} {sid} lesson {lesson_id} {state}>"

AnyRegion = TypeVar("AnyRegion", bound="Region")


class Connection:
    """One client's connection.

    Args:
        sid: the Socket.IO id of the connection.
        handshake: what the client sent when it connected.
        services: what the steps of the charts use.
        machines: the machine of each chart, by the class of its region.

    Attributes:
        seat: the person's seat in the lesson when this connection last heard of it, to be written again if Redis loses
            it; 0: none. The seat belongs to the person, whose other connections may change it.
    """

    __slots__ = ("_regions", "connected_at", "handshake", "lock", "machines", "seat", "services", "sid")

    def __init__(
        self,
        sid: str,
        handshake: Handshake,
        services: Services,
        machines: Mapping[type["Region"], ChartMachine],
    ) -> None:
        self.sid = sid
        self.connected_at = time.monotonic()
        self.handshake = handshake
        self.services = services
        self.machines = machines
        self.lock = asyncio.Lock()
        self.seat = 0
        self._regions: tuple[Region, ...] = ()

    def __iter__(self) -> Iterator["Region"]:
        """Return the regions that the connection has so far."""
        return iter(self._regions)

    def region(self, cls: type[AnyRegion]) -> AnyRegion:
        """Return the region of class ``cls``; the first call creates the region."""
        for region in self._regions:
            if type(region) is cls:
                return region
        region = cls(self)
        self._regions = (*self._regions, region)
        return region

    @property
    def has_joined(self) -> bool:
        """Whether the client has joined its lesson, with or without an access token."""
        return any(region.is_present or region.is_guest for region in self)

    async def restore(self) -> bool:
        """Write the data of this connection again after Redis has lost it.

        Returns:
            False when Redis should hold no data of this connection.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        return any([await region.attempt("restore") for region in self])

    async def end(self) -> None:
        """End the connection in all of its regions, the newest first, and clean up."""
        async with self.lock:  # one lock for all of them: a step of a join must not run between two ends
            for region in reversed(self._regions):
                with contextlib.suppress(InvalidTransition):
                    await region.move("disconnect")


class Nothing(TypedDict):
    """No data."""


class Region:
    """One chart on one connection: its state, and a method for each step and condition that the chart names.

    ``DATA``, ``RESULT`` and ``REFUSALS`` are what ``/asyncapi.json`` says of the event for this client.

    Args:
        connection: the connection.

    Attributes:
        CHART: the chart.
        DATA: the type of the data of the event, which :meth:`parse` checks; no data counts as null.
        RESULT: the type of the data of a successful acknowledgement; None: the event never succeeds.
        BAD_DATA: the refusal of data that are not of that type.
        REFUSALS: what :meth:`parse` and the steps may raise, in the order in which they are tried, without the refusals
            that any event has; see :meth:`~lesson_server.events.event.Event.refusals`.
        state: the current state of the chart.
        since: when the region entered this state, in seconds of ``time.monotonic``.
        history: the last transitions, oldest first, as ``trigger → state``.
        request: the parsed data of the event that runs now.
    """

    CHART: ClassVar[Chart]
    DATA: ClassVar[TypeAdapter[Any]] = TypeAdapter(None)
    RESULT: ClassVar[type | None] = Nothing
    BAD_DATA: ClassVar[type[Refusal]] = UnexpectedData
    REFUSALS: ClassVar[tuple[type[Refusal], ...]] = ()

    __slots__ = ("_next_turn", "connection", "history", "machine", "request", "since", "state")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.machine = connection.machines[type(self)]
        self.state = self.CHART.INITIAL
        self.since = connection.connected_at
        self.machine.count(None, self.state)
        self.history: tuple[str, ...] = ()
        self.request: object = None
        self._next_turn = 0.0  # loop time

    def __repr__(self) -> str:
        return REGION.format_map(self.log_fields())

    def log_fields(self) -> dict[str, str]:
        """Return what the log says of the region; REGION names each field."""
        return {
            "socketio_event": self.CHART.EVENT,
            "client": self.CHART.CLIENT,
            "sid": self.connection.sid,
            "lesson_id": self.connection.handshake.lesson_id,
            "state": self.state,
        }

    # Called by the gateway

    @classmethod
    def parse(cls, data: tuple[object, ...]) -> object:
        """Parse the data of an event into a request; two requests are equal when both ask for the same.

        Raises:
            Refusal: the data is not of the type ``DATA``.
        """
        try:
            (value,) = data or (None,)
            return cls.DATA.validate_python(value, strict=True)  # JSON's true is an int in Python
        except ValueError:  # also that of pydantic
            raise cls.BAD_DATA(event=cls.CHART.EVENT) from None

    def result(self) -> Mapping[str, Any]:
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
    def is_guest(self) -> bool:
        """Whether the event is complete, and the client is a guest."""
        return self.state in self.CHART.GUEST and self.person is None

    @property
    def person(self) -> str | None:
        """The id that the client has proven in this region; None before, and for a guest."""
        return None

    @property
    def needs_seat_map(self) -> bool:
        """Whether Redis should hold the seat map of the lesson because of this region."""
        return False

    async def wait_for_turn(self, pace: float) -> None:
        """Wait until the next event may run.

        Args:
            pace: see :class:`~lesson_server.events.event.Event`.
        """
        now = asyncio.get_running_loop().time()
        turn = max(self._next_turn, now - (PACE_BURST - 1) * pace)
        self._next_turn = turn + pace
        if turn > now:
            await asyncio.sleep(turn - now)

    # Transitions

    async def fire(self, trigger: str) -> bool:
        """Fire a trigger of the chart.

        All transitions of a connection but its end go through this method, one at a time; a later one waits.

        Returns:
            False when a condition of the chart does not hold; the state is unchanged.

        Raises:
            InvalidTransition: the chart has no row for the trigger in this state; nothing has changed.
            Refusal: a step refused; the state is unchanged.
        """
        async with self.connection.lock:
            return await self.move(trigger)

    async def move(self, trigger: str) -> bool:
        """Fire a trigger of the chart, as :meth:`fire` does; the caller has the lock of the connection."""
        former = self.state
        moved = await self.machine.fire(self, trigger)
        if self.state != former:
            self.machine.count(former, self.state)
            self.since = time.monotonic()
        self.history = (*self.history[1 - HISTORY_LENGTH :], f"{trigger} → {self.state}")
        return moved

    async def run(self) -> None:
        """Fire the remaining triggers of the event.

        A disconnect meanwhile waits for the running transition; then the chart refuses the next trigger of the event.

        Raises:
            InvalidTransition: the connection ended in the middle of the event.
            Refusal: a step refused. The trigger ``abandon`` returns to the initial state.
        """
        for trigger in self.machine.rest_of_path(self.state):
            await self.fire(trigger)

    async def attempt(self, trigger: str) -> bool:
        """Call :meth:`fire`, but return False when the chart has no row for the trigger in this state."""
        try:
            return await self.fire(trigger)
        except InvalidTransition:
            return False


def cleanup(step: Callable[[AnyRegion], Awaitable[None]]) -> Callable[[AnyRegion], Coroutine[Any, Any, None]]:
    """Mark a step that cleans up, so that its errors are logged and the next steps run nevertheless.

    The client can do nothing about such an error, and a connection that could not end because of such an error would
    continue its event.
    """

    @functools.wraps(step)
    async def attempt(region: AnyRegion) -> None:
        try:
            await step(region)
        except Exception:
            logger.exception(
                "cleanup_failed", f"{{step}} of {REGION} failed", step=step.__name__, **region.log_fields()
            )

    return attempt
