"""The Prometheus metrics of the server: every metric's name is here and nowhere else.

Names begin with ``lesson_``, durations are in seconds, and counters end in ``_total``. Label values are only names that
the code defines: never an id, a token or an address. A label value that an alert needs is exported from the start, with
0: a counter that begins with its first failure has no increase.

docs/operating/alerts.md tells what the alerts on these metrics mean.
"""

import os
from collections.abc import Callable, Collection, Iterable
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
# A timer of uvloop is late by up to a millisecond anyway; a node that stands still for 10 s is lost.
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# A sweep is one command, a few milliseconds, while no seat is due. A seat is freed half a second late at most.
SWEEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# The values of labels that are exported from the start.
SEAT_CHANGES = ("taken", "left", "freed", "restored")
CORRECTIONS = ("swept", "restored", "removed")
MIXPANEL_OUTCOMES = ("sent", "failed", "dropped")

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
        self.connections_limit = Gauge(
            "lesson_connections_limit",
            "Connections that the server holds at most",
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
        self.handshakes_refused = Counter(
            "lesson_handshakes_refused",
            "Handshakes refused: the client gets connect_error",
            ("reason",),
            registry=self.registry,
        )
        self.clients_dropped = Counter(
            "lesson_clients_dropped",
            "Clients whose Engine.IO socket the server ended because of what they did or did not do",
            ("reason",),
            registry=self.registry,
        )
        self.seat_changes = Counter(
            "lesson_seats_changed",
            "Seats taken, left, freed after their grace or with a removed person, and restored after a loss of data",
            ("change",),
            registry=self.registry,
        )
        self.mixpanel_events = Counter(
            "lesson_mixpanel_events", "Events for Mixpanel", ("outcome",), registry=self.registry
        )
        self._add_nodes()
        self._add_process()
        for change in SEAT_CHANGES:
            self.seat_changes.labels(change)
        for correction in CORRECTIONS:
            self.presence_corrections.labels(correction)
        for outcome in MIXPANEL_OUTCOMES:
            self.mixpanel_events.labels(outcome)

    def _add_nodes(self) -> None:
        """Add the metrics of the stores, the nodes, and what the nodes do in the background."""
        self.store_up = Gauge(
            "lesson_store_up",
            "Whether the store answers this node (with several workers: each of them)",
            ("store",),
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self.rooms_up = Gauge(
            "lesson_rooms_up",
            "Whether this node (with several workers: each of them) receives what nodes publish to the rooms",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self.processes = Gauge(
            "lesson_processes",
            "Processes that serve: the server, or its workers",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.processes.set(1)
        self.nodes = Gauge(
            "lesson_nodes",
            "Nodes that were alive at the last heartbeat of this node, itself included",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self.nodes_lost = Counter(
            "lesson_nodes_lost",
            "Other nodes that this node was the first to find lost",
            registry=self.registry,
        )
        self.presence_corrections = Counter(
            "lesson_presence_corrections",
            "Presence records swept of lost nodes, restored after a loss of data, removed for want of a connection",
            ("correction",),
            registry=self.registry,
        )
        self.seat_sweep_seconds = Histogram(
            "lesson_seats_sweep_seconds",
            "Sweeps of the seats that have succeeded, from the first command until no seat was due",
            buckets=SWEEP_BUCKETS,
            registry=self.registry,
        )

    def _add_process(self) -> None:
        """Add the metrics of the process: prometheus_client's own don't exist with several workers."""
        self.event_loop_lag = Histogram(
            "lesson_event_loop_lag_seconds",
            "How late the event loop ran a timer",
            buckets=LAG_BUCKETS,
            registry=self.registry,
        )
        self.cpu_seconds = Counter(
            "lesson_cpu_seconds", "CPU time, in user and system mode, of all workers", registry=self.registry
        )
        self.memory = Gauge(
            "lesson_memory_bytes",
            "Resident memory of all workers; what workers share counts several times",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.open_files = Gauge(
            "lesson_open_files",
            "Open files of the process (of the worker that has most)",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self.open_files_limit = Gauge(
            "lesson_open_files_limit",
            "Files that a process may open",
            registry=self.registry,
            multiprocess_mode="livemin",
        )

    def begin_at_zero(
        self, events: Iterable[tuple[str, str]], outcomes: Collection[str], reasons: Iterable[str]
    ) -> None:
        """Export counters before their first increment.

        Args:
            events: pairs of an event and a client that may send the event.
            outcomes: outcomes of each event.
            reasons: reasons for the refusal of a handshake.
        """
        for event, client in events:
            for outcome in outcomes:
                self.events_of(event, client, outcome)
        for reason in reasons:
            self.handshakes_refused.labels(reason)

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

    def observe_handshake_refused(self, reason: str) -> None:
        """Count a handshake that was refused; the reason is the ``outcome`` of the refusal."""
        self.handshakes_refused.labels(reason).inc()

    def observe_drop(self, why: str) -> None:
        """Count a client that was dropped.

        Args:
            why: one of a fixed set of texts. What stands in parentheses, the name of an exception, is left out.
        """
        self.clients_dropped.labels(why.partition(" (")[0].replace(" ", "_")).inc()

    def observe_correction(self, correction: str, count: int) -> None:
        """Count presence records that were ``swept``, ``restored`` or ``removed``."""
        self.presence_corrections.labels(correction).inc(count)

    def observe_seat(self, change: str) -> None:
        """Count a change of a seat map: ``taken``, ``left``, ``freed`` or ``restored``."""
        self.seat_changes.labels(change).inc()

    def observe_mixpanel(self, outcome: str, count: int) -> None:
        """Count the outcomes of events for Mixpanel."""
        self.mixpanel_events.labels(outcome).inc(count)
