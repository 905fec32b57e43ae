"""Samples for the metrics what no event reports: the stores, the event loop, the process.

A sample is taken every SAMPLE_INTERVAL seconds, not at a scrape: with several workers, any worker exports the metrics
of all workers.
"""

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

from lesson_server.log import EventLogger
from lesson_server.metrics import Metrics
from lesson_server.status import Status
from lesson_server.tasks import end

logger = EventLogger(__name__)

# Seconds between two samples. Each costs one request to each store.
SAMPLE_INTERVAL = 5.0
# Seconds between two timers that measure the lag of the event loop. A block of twice this time is seen by at least one.
LAG_INTERVAL = 0.25

PROC = Path("/proc/self")
PAGE_SIZE = resource.getpagesize()


class Sampler:
    """Takes samples while the server runs.

    Args:
        metrics: the metrics of this process.
        silent: returns the names of the stores that do not answer a probe, and ``rooms`` if the rooms do not.
        statuses: store → a function that returns its status, which knows of requests that have failed since.
        alive: returns the number of nodes that are alive.
    """

    def __init__(
        self,
        metrics: Metrics,
        silent: Callable[[], Awaitable[Collection[str]]],
        statuses: Mapping[str, Callable[[], Status]],
        alive: Callable[[], int],
    ) -> None:
        self._metrics = metrics
        self._silent = silent
        self._statuses = statuses
        self._alive = alive
        self._cpu_seconds = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Take samples until :meth:`close`."""
        self.sample_process()
        self._tasks = [asyncio.create_task(self._take_samples()), asyncio.create_task(self._measure_lag())]

    async def close(self) -> None:
        """Stop taking samples."""
        await asyncio.gather(*map(end, self._tasks))

    async def _take_samples(self) -> None:
        while True:
            try:
                await self.sample_stores()
                self.sample_process()
            except Exception:
                logger.exception("sample_failed", "a sample for the metrics failed")
            await asyncio.sleep(SAMPLE_INTERVAL)

    async def sample_stores(self) -> None:
        """Sample whether the stores answer.

        A master of a Redis Cluster may be down although a probe, which any master can answer, is answered.
        """
        silent = await self._silent()
        for store, status in self._statuses.items():
            self._metrics.store_up.labels(store).set(store not in silent and status().status != "down")
        self._metrics.rooms_up.set("rooms" not in silent)
        self._metrics.nodes.set(self._alive())

    def sample_process(self) -> None:
        """Sample CPU time, memory and open files."""
        cpu_seconds = time.process_time()
        self._metrics.cpu_seconds.inc(cpu_seconds - self._cpu_seconds)
        self._cpu_seconds = cpu_seconds
        self._metrics.open_files_limit.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        with contextlib.suppress(OSError):  # not Linux
            self._metrics.memory.set(int((PROC / "statm").read_text().split()[1]) * PAGE_SIZE)
            self._metrics.open_files.set(_open_files())

    async def _measure_lag(self) -> None:
        while True:
            due = time.perf_counter() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            lag = max(time.perf_counter() - due, 0.0)
            self._metrics.event_loop_lag.observe(lag)
            # The timers that would have been due meanwhile. Otherwise a block of 2 s would weigh as much as one of 1 s.
            while (lag := lag - LAG_INTERVAL) > 0:
                self._metrics.event_loop_lag.observe(lag)


def _open_files() -> int:
    """Return the number of open files; Linux before 6.2 does not tell it without a list, 40 ms for 20,000 files."""
    folder = PROC / "fd"
    return folder.stat().st_size or len(os.listdir(folder))
