"""The Prometheus metrics of the server: every metric's name is here and nowhere else.

Names begin with ``lesson_``, durations are in seconds, and counters end in ``_total``. Label values are only names that
the code defines: never an id, a token or an address.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache, partial

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

# Seconds. A join takes about a millisecond; five seconds are the limit of an event.
EVENT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STEP_BUCKETS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)

# No second series for each counter and histogram with its creation time: nobody needs it.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

StateOf = tuple[str, str, str]  # an event, a client, and a state of their chart


class Metrics:
    """The metrics of one server; with several workers, each worker exports the sums over all workers."""

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
            "Connections held, by their state for each event",
            ("event", "client", "state"),
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.events = Counter(
            "lesson_events", "Events answered", ("event", "client", "outcome"), registry=self.registry
        )
        self.event_seconds = Histogram(
            "lesson_event_seconds",
            "From an event to its acknowledgement",
            ("event", "client"),
            buckets=EVENT_BUCKETS,
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "lesson_step_seconds",
            "Steps of the statecharts",
            ("event", "step"),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        # Cached by label values, because the library's own lookup takes 2 µs.
        self.events_of = cache(self.events.labels)
        self.event_seconds_of = cache(self.event_seconds.labels)
        self.reconnects = Counter("lesson_reconnects", "Participants who came back", registry=self.registry)
        self.seat_changes = Counter(
            "lesson_seats_changed",
            "Seats taken, left, freed after their grace or with a removed person, and restored after a loss of data",
            ("change",),
            registry=self.registry,
        )
        self.mixpanel_events = Counter(
            "lesson_mixpanel_events", "Events for Mixpanel", ("outcome",), registry=self.registry
        )

    def count_connections(self, counts: Iterable[tuple[StateOf, int]]) -> None:
        """Set the number of connections of this process in each state.

        Called before an export, not at each change of a state, so that a change costs nothing.
        """
        for state, count in counts:
            self.connections.labels(*state).set(count)

    def outcomes(self) -> dict[StateOf, int]:
        """Return how many events this process has answered, by event, client and outcome."""
        (family,) = self.events.collect()
        return {
            (sample.labels["event"], sample.labels["client"], sample.labels["outcome"]): int(sample.value)
            for sample in family.samples
        }

    def reconnect_count(self) -> int:
        """Return how many participants have come back to this process."""
        (family,) = self.reconnects.collect()
        return int(family.samples[0].value)

    def latencies(self, event: str) -> list[int]:
        """Return how many of the event's acknowledgements took up to each of EVENT_BUCKETS, and without limit."""
        (family,) = self.event_seconds.collect()
        counts = [0] * (len(EVENT_BUCKETS) + 1)
        buckets = (s for s in family.samples if s.name.endswith("_bucket") and s.labels["event"] == event)
        for position, sample in enumerate(buckets):
            counts[position % len(counts)] += int(sample.value)
        return counts

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._all_workers or self.registry)

    def step_observer(self, event: str) -> Callable[[str, float, BaseException | None], None]:
        """Return a function that observes a step of an event.

        The function is called with the name of the step, its duration in seconds, and what it raised.
        """
        histogram_of = cache(partial(self.step_seconds.labels, event))

        def observe(step: str, seconds: float, error: BaseException | None) -> None:
            histogram_of(step).observe(seconds)

        return observe

    def observe_seat(self, change: str) -> None:
        """Count a change of a seat map: ``taken``, ``left``, ``freed`` or ``restored``."""
        self.seat_changes.labels(change).inc()

    def observe_mixpanel(self, outcome: str, count: int) -> None:
        """Count the outcomes of events for Mixpanel."""
        self.mixpanel_events.labels(outcome).inc(count)
