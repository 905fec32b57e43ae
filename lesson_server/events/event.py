"""The definitions of Socket.IO events; each event's module has one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lesson_server.errors import EventNotAllowed, InternalError, Refusal, ServiceBusy, StoreUnavailable
from lesson_server.events.connection import Region
from lesson_server.settings.schema import ServerSettings


def no_limit(settings: ServerSettings) -> float:
    """Return 0, the rate of an event without a limit."""
    return 0.0


@dataclass(frozen=True)
class Event:
    """An event that clients send, and the server acknowledges. Its charts say its name, and which clients send it.

    Args:
        classes: the class of the region for each chart of the event.
        deadline: seconds for the steps. The contract promises an answer within 5 s; the rest is for the clean-up.
        rate: returns, from the settings, the events per second that one process begins; 0 for no limit.
        pace: mean seconds between two of these events of one connection at least; an earlier event waits. The first
            PACE_BURST events may come at once. For an event that is told to everybody in the room, so that one client
            can't make the server send without end.
    """

    classes: tuple[type[Region], ...]
    deadline: float
    rate: Callable[[ServerSettings], float] = no_limit
    pace: float = 0.0

    @cached_property
    def name(self) -> str:
        """The name of the event."""
        (name,) = {cls.CHART.EVENT for cls in self.classes}
        return name

    @cached_property
    def regions(self) -> Mapping[str, type[Region]]:
        """The class of the region for each client that may send the event."""
        return {cls.CHART.CLIENT: cls for cls in self.classes}

    def refusals(self, client: str) -> tuple[type[Refusal], ...]:
        """Return the refusals that a kind of client may get, in the order in which they are tried."""
        cls = self.regions.get(client)
        if cls is None:
            return (EventNotAllowed,)
        busy = () if self.rate is no_limit else (ServiceBusy,)
        return (*cls.REFUSALS, StoreUnavailable, *busy, InternalError)


@dataclass(frozen=True)
class ServerEvent:
    """An event that the server sends, and no client acknowledges.

    Args:
        name: the name of the event.
        data: the type of its data.
    """

    name: str
    data: type
