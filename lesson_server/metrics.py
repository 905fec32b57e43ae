"""What Prometheus can ask the server: every metric's name stands here and nowhere else.

Names begin with ``lesson_``, durations are in seconds, and counters end in ``_total``. Labels hold only names of our
own: never an id, a token or an address.
"""

import os
from collections import Counter as Count
from collections.abc import Callable, Iterable

import prometheus_client
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

# Seconds. A join takes about a millisecond; five seconds are its limit.
JOIN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STEP_BUCKETS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)

# A second series for each counter and histogram, with the time it was made: nobody asked for it.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

ClientAndState = tuple[str, str]


class Metrics:
    """The metrics of one server. In one of several workers, the figures told are the sums over all of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._all_workers: CollectorRegistry | None = None
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            self._all_workers = CollectorRegistry()
            MultiProcessCollector(self._all_workers)  # type: ignore[no-untyped-call]
        else:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        self.connections = Gauge(
            "lesson_connections",
            "Connections held",
            ("client", "state"),
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.joins = Counter(
            "lesson_joins", "join_lesson events answered", ("client", "outcome"), registry=self.registry
        )
        self.join_seconds = Histogram(
            "lesson_join_seconds",
            "From join_lesson to its answer",
            ("client",),
            buckets=JOIN_BUCKETS,
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "lesson_step_seconds", "Steps of the statecharts", ("step",), buckets=STEP_BUCKETS, registry=self.registry
        )
        self.reconnects = Counter("lesson_reconnects", "Participants who came back", registry=self.registry)
        self.mixpanel_events = Counter(
            "lesson_mixpanel_events", "Events for Mixpanel", ("outcome",), registry=self.registry
        )
        self._steps: dict[str, Callable[[float], None]] = {}

    def count_connections(self, connections: Iterable[ClientAndState], states: Iterable[ClientAndState]) -> None:
        """Notes the connections of this process. Done when somebody asks, so that one that moves costs nothing.

        Args:
            connections: the client and the state of each.
            states: those shown even when no connection is in them.
        """
        count = Count(connections)
        for client, state in states:
            self.connections.labels(client, state).set(count[client, state])

    def text(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self._all_workers or self.registry)

    def observe_step(self, step: str, seconds: float) -> None:
        """Notes how long a step took, whether it succeeded or not."""
        observe = self._steps.get(step)
        if observe is None:
            observe = self._steps[step] = self.step_seconds.labels(step).observe
        observe(seconds)

    def observe_mixpanel(self, outcome: str, count: int) -> None:
        """Notes what became of events for Mixpanel."""
        self.mixpanel_events.labels(outcome).inc(count)
