"""Limits on the connections and events of one process, so that a burst of clients slows it down but does not stop it.

A process uses one core. If more clients connected per second than one core can serve, all of them would time out at the
same time, and reconnect at the same time. Clients that are refused at once reconnect one after the other.
"""

import time
from collections.abc import Mapping

from lesson_server.errors import ServiceBusy

# Size of a burst after an idle time, in seconds of the allowed rate: a lesson begins on the hour.
BURST = 2.0


class RateLimit:
    """A token bucket.

    Args:
        rate: tokens per second; 0 for no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._full = self._left = max(rate * BURST, 1.0)
        self._filled = time.monotonic()

    def take(self) -> None:
        """Take a token.

        Raises:
            ServiceBusy: no token is left.
        """
        if not self._rate:
            return
        now = time.monotonic()
        self._left = min(self._left + (now - self._filled) * self._rate, self._full)
        self._filled = now
        if self._left < 1:
            raise ServiceBusy
        self._left -= 1


class Admission:
    """The limits of one process.

    Args:
        max_connections: connections at the same time.
        connect_rate: new connections per second; 0 for no limit.
        event_rates: for each event, how many may begin per second; 0 for no limit.
    """

    def __init__(self, max_connections: int, connect_rate: float, event_rates: Mapping[str, float]) -> None:
        self._max_connections = max_connections
        self._connects = RateLimit(connect_rate)
        self._events = {event: RateLimit(rate) for event, rate in event_rates.items()}

    def admit_connection(self, held: int) -> None:
        """Admit a connection when the process already has ``held`` connections.

        Raises:
            ServiceBusy: there are too many connections, or new connections arrive too fast.
        """
        if held >= self._max_connections:
            raise ServiceBusy
        self._connects.take()

    def admit_event(self, event: str) -> None:
        """Admit an event.

        Raises:
            ServiceBusy: events of that name arrive too fast.
        """
        self._events[event].take()
