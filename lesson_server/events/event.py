"""What the server knows of an event of Socket.IO; each module of an event defines one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lesson_server.events.connection import Region
from lesson_server.settings.schema import ServerSettings


def no_limit(settings: ServerSettings) -> float:
    """Return the rate of an event that any number of clients may send at once."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """An event that clients send, and the server acknowledges.

    Args:
        name: of the event.
        regions: the class of the region that handles it, for each client that may send it.
        deadline: seconds for its steps. The contract promises an answer within 5; cleaning up takes the rest.
        rate: events a second that one process begins, from the settings; 0 for no limit.
    """

    name: str
    regions: Mapping[str, type[Region]]
    deadline: float
    rate: Callable[[ServerSettings], float] = no_limit
