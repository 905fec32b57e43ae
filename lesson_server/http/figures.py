"""What each node tells the others of itself while somebody looks at a console, and the last ten minutes of it.

A node keeps a sample of its counters every :data:`SAMPLE_INTERVAL` seconds. It publishes its figures only while it is
being *watched*: for :data:`WATCH_LIFE` seconds after a message of a console. While nobody looks, nothing is published.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from lesson_server.errors import StoreUnavailable
from lesson_server.events.join_lesson import JOIN_LESSON
from lesson_server.gateway.handlers import SUCCESS, Gateway
from lesson_server.log import EventLogger
from lesson_server.metrics import Metrics, StateOf
from lesson_server.status import Status
from lesson_server.stores.redis.messages import Messages
from lesson_server.tasks import end

logger = EventLogger(__name__)

# The kinds of messages: a console asks the nodes for their figures, and a node tells them.
WATCH, FIGURES = "watch", "figures"
# Seconds between two samples, and the number of samples that are kept: ten minutes.
SAMPLE_INTERVAL = 5
SAMPLES = 120
# A timer may fire this many seconds early: uvloop rounds to milliseconds. Such a sample belongs to the moment meant.
TIMER_TOLERANCE = 0.05
# Seconds between two publications of a node, and for which it publishes after a message of a console.
PUBLISH_INTERVAL = 1.0
WATCH_LIFE = 12.0
# Seconds in a state in which a connection does not rest after which it counts as stuck: twice the longest event.
STUCK_AFTER = 10.0
# Connections that are looked at before other tasks have a turn.
CONNECTIONS_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters of a node at one moment.

    Attributes:
        number: the time in units of SAMPLE_INTERVAL, the same on all nodes.
        outcomes: answered events by event, client and outcome.
        latencies: see :meth:`~lesson_server.metrics.Metrics.latencies`.
        reconnects: reported reconnects.
    """

    number: int
    outcomes: Mapping[StateOf, int]
    latencies: list[int]
    reconnects: int


class Figures:
    """The figures of this node.

    Args:
        gateway: the connections of this node.
        metrics: the counters of this node.
        services: the external services: name → a function that returns the status.
        node_id: returns the current id of this node.
        messages: the messages between nodes.
    """

    def __init__(
        self,
        gateway: Gateway,
        metrics: Metrics,
        services: Mapping[str, Callable[[], Status]],
        node_id: Callable[[], str],
        messages: Messages,
    ) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._services = services
        self._node_id = node_id
        self._messages = messages
        self._started = time.time()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES + 1)
        self._watched_until = float("-inf")
        self._sampling: asyncio.Task[None] | None = None
        self._publishing: asyncio.Task[None] | None = None
        messages.on(WATCH, self._watch)

    def start(self) -> None:
        """Begin to take samples."""
        self._sampling = asyncio.create_task(self._take_samples())

    async def close(self) -> None:
        """Stop taking samples and publishing."""
        await end(self._sampling)
        await end(self._publishing)

    async def _take_samples(self) -> None:
        while True:
            self.take_sample()
            await asyncio.sleep((self._samples[-1].number + 1) * SAMPLE_INTERVAL - time.time())

    def take_sample(self) -> None:
        """Keep the counters of this moment."""
        self._samples.append(self._sample())

    def _sample(self) -> Sample:
        return Sample(
            int((time.time() + TIMER_TOLERANCE) // SAMPLE_INTERVAL),
            self._metrics.outcomes(),
            self._metrics.latencies(JOIN_LESSON.name),
            self._metrics.reconnect_count(),
        )

    async def _watch(self, _: dict[str, Any]) -> None:
        self._watched_until = time.monotonic() + WATCH_LIFE
        if self._publishing is None or self._publishing.done():
            self._publishing = asyncio.create_task(self._publish())

    async def _publish(self) -> None:
        """Publish the figures until nobody watches any more."""
        lag = 0.0
        used, wall = time.process_time(), time.monotonic()
        while time.monotonic() < self._watched_until:
            passed = time.monotonic() - wall
            cpu = (time.process_time() - used) / passed if passed > PUBLISH_INTERVAL / 2 else 0.0
            used, wall = time.process_time(), time.monotonic()
            try:
                await self._messages.publish(FIGURES, **await self.read(), cpu=cpu, lag=lag)
            except StoreUnavailable:
                pass  # logged; the consoles see that the node is silent
            except Exception:
                logger.exception("figures_failed", "the figures of this node could not be published")
            before = time.monotonic()
            await asyncio.sleep(PUBLISH_INTERVAL)
            lag = max(time.monotonic() - before - PUBLISH_INTERVAL, 0.0)

    async def read(self) -> dict[str, Any]:
        """Return the figures of this moment, as they are published."""
        guests, longest = await self._look_at_connections()
        return {
            "node": self._node_id(),
            "started": self._started,
            "connections": len(self._gateway.connections),
            "states": [[*state, count, longest.get(state)] for state, count in self._gateway.count_states()],
            "guests": guests,
            "services": {name: asdict(status()) for name, status in self._services.items()},
            **self._last_ten_minutes(),
        }

    async def _look_at_connections(self) -> tuple[dict[str, int], dict[StateOf, float]]:
        """Return the guests of each lesson, and the longest time that a connection has been in a state without rest."""
        guests: dict[str, int] = {}
        longest: dict[StateOf, float] = {}
        now = time.monotonic()
        for number, connection in enumerate(list(self._gateway.connections.values())):
            if number % CONNECTIONS_AT_ONCE == CONNECTIONS_AT_ONCE - 1:
                await asyncio.sleep(0)
            lesson_id = connection.handshake.lesson_id
            for state, since, is_resting, is_guest in self._gateway.states_of(connection):
                if is_guest:
                    guests[lesson_id] = guests.get(lesson_id, 0) + 1
                if not is_resting:
                    longest[state] = max(longest.get(state, 0.0), now - since)
        return guests, longest

    def _last_ten_minutes(self) -> dict[str, Any]:
        samples = list(self._samples)
        if not samples:
            return {"numbers": [], "joins": [], "latencies": [], "outcomes": [], "reconnects": 0}
        # Sums are of this moment, not of the last sample.
        oldest, now = samples[0], self._sample()
        steps = list(pairwise(samples))
        return {
            "numbers": [later.number for _, later in steps],
            "joins": [_joins(later) - _joins(earlier) for earlier, later in steps],
            "latencies": [
                [after - before for before, after in zip(earlier.latencies, later.latencies, strict=True)]
                for earlier, later in steps
            ],
            "outcomes": [
                [*labels, count - oldest.outcomes.get(labels, 0)]
                for labels, count in now.outcomes.items()
                if count > oldest.outcomes.get(labels, 0)
            ],
            "reconnects": now.reconnects - oldest.reconnects,
        }


def _joins(sample: Sample) -> int:
    return sum(
        count
        for (event, _, outcome), count in sample.outcomes.items()
        if event == JOIN_LESSON.name and outcome == SUCCESS
    )
