"""The definition of a Socket.IO event; each event's module has one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lesson_server.events.connection import Region
from lesson_server.settings.schema import ServerSettings


def no_limit(settings: ServerSettings) -> float:
    """Return 0, the rate of an event without a limit."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """An event that clients send, and the server acknowledges.

    Args:
        name: the name of the event.
        regions: the class of the region that handles it, for each client that may send it.
        deadline: seconds for the steps. The contract promises an answer within 5 s; the rest is for the clean-up.
        rate: returns, from the settings, the events per second that one process begins; 0 for no limit.
    """

    name: str
    regions: Mapping[str, type[Region]]
    deadline: float
    rate: Callable[[ServerSettings], float] = no_limit
