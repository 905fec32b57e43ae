"""The HTTP pages for operators: /healthz, /readyz, /metrics."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from lesson_server.errors import StoreUnavailable
from lesson_server.protocol.http_server import PlainHandler

# Seconds that the results of the probes are reused, so that many requests for /readyz cause one probe.
READINESS_AGE = 1.0
# Seconds for a store to answer a probe.
PROBE_TIMEOUT = 1.0

Probe = Callable[[], Awaitable[None]]


class Readiness:
    """Tells whether the server can serve a join; :meth:`down` probes the stores at most once a second.

    Args:
        probes: name → a function that raises StoreUnavailable if the store can't answer.
    """

    def __init__(self, probes: dict[str, Probe]) -> None:
        self._probes = probes
        self._lock = asyncio.Lock()
        self._down: list[str] = []
        self._closed = False
        self._asked = float("-inf")

    def close(self) -> None:
        """Report the server as not ready from now on."""
        self._closed = True

    async def down(self) -> list[str]:
        """Return the names of what is down; an empty list means that the server is ready."""
        if not self._closed:
            async with self._lock:
                if time.monotonic() - self._asked > READINESS_AGE:
                    self._down = await self.silent()
                    self._asked = time.monotonic()
        return ["the server"] if self._closed else self._down

    async def silent(self) -> list[str]:
        """Probe now, and return the names of the probes that were not answered."""
        answers = await asyncio.gather(*(self._answers(probe) for probe in self._probes.values()))
        return [name for name, answered in zip(self._probes, answers, strict=True) if not answered]

    @staticmethod
    async def _answers(probe: Probe) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await probe()
        except (StoreUnavailable, TimeoutError):
            return False
        return True


class HealthHandler(PlainHandler):
    """Answers 200 while the process lives; probes no store, because a restart would not repair a store."""

    def get(self) -> None:
        self.finish("ok\n")

    head = get  # some load balancers send HEAD


class ReadyHandler(PlainHandler):
    """Answers 200 if a join can be served, otherwise 503 with the names of what is down."""

    def initialize(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def get(self) -> None:
        down = await self._readiness.down()
        if down:
            self.set_status(503)
        self.finish(f"{', '.join(down)} down\n" if down else "ready\n")

    head = get


class MetricsHandler(PlainHandler):
    """Answers with the metrics in Prometheus' text format."""

    def initialize(self, text: Callable[[], bytes]) -> None:
        self._text = text

    def get(self) -> None:
        self.set_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        self.finish(self._text())
