"""How many connections and events one process takes on, so that a burst of clients slows it down and does not stop it.

A process has one core. If more clients came in a second than that core can serve, all of them would time out at the
same time, and come back at the same time. Clients that are refused at once come back one after the other.
"""

import time
from collections.abc import Mapping

from lesson_server.errors import ServiceBusy

# Seconds of the allowed rate that may come at once after a quiet time: a lesson begins on the hour.
BURST = 2.0


class RateLimit:
    """A token bucket.

    Args:
        rate: how many a second; 0 for no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._full = self._left = max(rate * BURST, 1.0)
        self._filled = time.monotonic()

    def take(self) -> None:
        """Admit one.

        Raises:
            ServiceBusy: they come faster than the rate.
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
        max_connections: held at the same time.
        connect_rate: connections a second; 0 for no limit.
        event_rates: for each event, how many a second may begin; 0 for no limit.
    """

    def __init__(self, max_connections: int, connect_rate: float, event_rates: Mapping[str, float]) -> None:
        self._max_connections = max_connections
        self._connects = RateLimit(connect_rate)
        self._events = {event: RateLimit(rate) for event, rate in event_rates.items()}

    def admit_connection(self, held: int) -> None:
        """Admit a connection beside the ``held`` ones.

        Raises:
            ServiceBusy: there are too many, or they come too fast.
        """
        if held >= self._max_connections:
            raise ServiceBusy
        self._connects.take()

    def admit_event(self, event: str) -> None:
        """Let an event begin.

        Raises:
            ServiceBusy: events of that name come too fast.
        """
        self._events[event].take()
