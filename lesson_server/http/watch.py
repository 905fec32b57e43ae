"""What consoles on this node show of all nodes: asked for, collected and summed up while somebody looks."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lesson_server.errors import StoreUnavailable
from lesson_server.gateway.handlers import DISCONNECTED, SUCCESS
from lesson_server.http.figures import (
    FIGURES,
    SAMPLE_INTERVAL,
    SAMPLES,
    STUCK_AFTER,
    WATCH,
    WATCH_LIFE,
    Figures,
)
from lesson_server.http.roster import rfc3339
from lesson_server.log import EventLogger
from lesson_server.metrics import EVENT_BUCKETS
from lesson_server.stores.redis.messages import Messages
from lesson_server.stores.redis.roster import LessonCounts, Roster
from lesson_server.tasks import end

logger = EventLogger(__name__)

# Seconds between two messages that keep the nodes publishing, and between two reads of the lessons.
WATCH_INTERVAL = WATCH_LIFE / 3
READ_INTERVAL = 1.0
# Seconds after which the figures of a node are forgotten: it is gone, or its messages do not arrive.
FIGURES_LIFE = 3.5


class Watch:
    """The figures of all nodes, and the lessons, as long as somebody looks.

    Args:
        roster: reads the lessons and the nodes.
        own: the figures of this node, which are shown while Redis carries no messages.
        messages: the messages between nodes.
    """

    def __init__(self, roster: Roster, own: Figures, messages: Messages) -> None:
        self._roster = roster
        self._own = own
        self._messages = messages
        self._viewers = 0
        self._task: asyncio.Task[None] | None = None
        self._figures: dict[str, tuple[float, dict[str, Any]]] = {}  # node → when they arrived, and the figures
        self.lessons: list[LessonCounts] = []
        self.is_current = asyncio.Event()  # the lessons have been read since somebody began to look
        messages.on(FIGURES, self._receive)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Keep everything current until the end of the ``with``."""
        self._viewers += 1
        if self._task is None or self._task.done():
            self.is_current.clear()
            self._task = asyncio.create_task(self._keep_current())
        try:
            yield
        finally:
            self._viewers -= 1

    async def close(self) -> None:
        """Stop."""
        await end(self._task)

    async def _keep_current(self) -> None:
        asked_at = float("-inf")
        while self._viewers:
            try:
                if not self.is_current.is_set():
                    await self._show_own()  # so that the first view is not empty
                try:
                    if time.monotonic() - asked_at > WATCH_INTERVAL:
                        await self._messages.publish(WATCH)
                        asked_at = time.monotonic()
                    self.lessons = [lesson async for part in self._roster.all_lessons() for lesson in part]
                except StoreUnavailable:
                    await self._show_own()  # Redis carries no messages
            except Exception:
                logger.exception("console_failed", "the lessons could not be read for the console")
            self.is_current.set()
            await asyncio.sleep(READ_INTERVAL)
        self._figures.clear()
        self.lessons = []

    async def _show_own(self) -> None:
        await self._receive({**await self._own.read(), "cpu": 0.0, "lag": 0.0})

    async def _receive(self, figures: dict[str, Any]) -> None:
        if self._viewers:
            self._figures[figures["node"]] = time.monotonic(), figures

    # What the console shows

    def guests(self) -> dict[str, int]:
        """Return the number of guests by lesson."""
        guests = Counter[str]()
        for figures in self._nodes():
            guests.update(figures["guests"])
        return dict(guests)

    def overview(self) -> dict[str, Any]:
        """Return the event ``overview``."""
        nodes = self._nodes()
        return {
            "at": rfc3339(time.time()),
            "lessons": len(self.lessons),
            "teachers": sum(lesson.teachers for lesson in self.lessons),
            "participants": sum(lesson.participants for lesson in self.lessons),
            "guests": sum(self.guests().values()),
            "connections": sum(figures["connections"] for figures in nodes),
            "charts": _charts(nodes),
            "rates": _rates(nodes),
            "refusals": _refusals(nodes),
            "reconnects": sum(figures["reconnects"] for figures in nodes),
            "nodes": [
                {
                    "node": figures["node"],
                    "connections": figures["connections"],
                    "heard_of": rfc3339(figures["at"]),
                    "started": rfc3339(figures["started"]),
                    "cpu": round(figures["cpu"], 3),
                    "lag": round(figures["lag"], 4),
                }
                for figures in nodes
            ],
            "stores": _stores(nodes),
        }

    def _nodes(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        self._figures = {node: pair for node, pair in self._figures.items() if now - pair[0] < FIGURES_LIFE}
        return [
            {**figures, "at": time.time() - (now - arrived)} for _, (arrived, figures) in sorted(self._figures.items())
        ]


def _charts(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts: dict[tuple[str, str], dict[str, tuple[int, float | None]]] = {}
    for figures in nodes:
        for event, client, state, count, seconds in figures["states"]:
            states = counts.setdefault((event, client), {})
            count_before, longest = states.get(state, (0, None))
            states[state] = count_before + count, max((s for s in (longest, seconds) if s is not None), default=None)
    return [
        {
            "event": event,
            "client": client,
            "states": [
                {
                    "state": state,
                    "count": count,
                    "longest": None if longest is None else round(longest, 1),
                    "is_stuck": longest is not None and longest > STUCK_AFTER,
                }
                for state, (count, longest) in states.items()
            ],
        }
        for (event, client), states in sorted(counts.items())
    ]


def _rates(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    newest = max((figures["numbers"][-1] for figures in nodes if figures["numbers"]), default=0)
    joins = [0] * SAMPLES
    latencies = [[0] * (len(EVENT_BUCKETS) + 1) for _ in range(SAMPLES)]
    for figures in nodes:
        for number, count, counts in zip(figures["numbers"], figures["joins"], figures["latencies"], strict=True):
            position = SAMPLES - 1 - (newest - number)
            if 0 <= position < SAMPLES:
                joins[position] += count
                latencies[position] = [a + b for a, b in zip(latencies[position], counts, strict=True)]
    return {
        "seconds": SAMPLE_INTERVAL,
        "joins": [round(count / SAMPLE_INTERVAL, 2) for count in joins],
        "p50": [percentile(counts, 0.5) for counts in latencies],
        "p99": [percentile(counts, 0.99) for counts in latencies],
    }


def percentile(counts: list[int], share: float) -> float | None:
    """Return a percentile of a histogram of latencies, in milliseconds, interpolated within its bucket.

    Args:
        counts: how many took up to each of EVENT_BUCKETS, and without limit (cumulative).
        share: 0.5 for the median.

    Returns:
        None if the histogram is empty; the last bound if the percentile is beyond it.
    """
    if not counts[-1]:
        return None
    rank = share * counts[-1]
    below, lower = 0, 0.0
    for count, bound in zip(counts, EVENT_BUCKETS, strict=False):
        if count >= rank:
            return round(1_000 * (lower + (bound - lower) * (rank - below) / (count - below)), 2)
        below, lower = count, bound
    return 1_000 * EVENT_BUCKETS[-1]


def _refusals(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts = Counter[tuple[str, str, str]]()
    for figures in nodes:
        for event, client, outcome, count in figures["outcomes"]:
            if outcome not in (SUCCESS, DISCONNECTED):
                counts[event, client, outcome] += count
    return [
        {"event": event, "client": client, "outcome": outcome, "count": count}
        for (event, client, outcome), count in counts.most_common()
    ]


def _stores(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the external services: down if one node says so; the last failure on any node."""
    stores: dict[str, dict[str, Any]] = {}
    for figures in nodes:
        for name, status in figures["services"].items():
            known = stores.setdefault(name, {"name": name, "status": status["status"], "failed_at": 0, "cause": None})
            if status["status"] == "down":
                known["status"] = "down"
            if (status["failed_at"] or 0) > known["failed_at"]:
                known.update(failed_at=status["failed_at"], cause=status["cause"])
    for known in stores.values():
        known["failed_at"] = rfc3339(known["failed_at"]) if known["failed_at"] else None
    return list(stores.values())
