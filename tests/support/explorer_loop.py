"""The event loop of one explored node: it runs when told to, and its clock goes on when told to. See explorer.py."""

import asyncio
import contextlib
import contextvars
import heapq
import itertools
import math
from collections import deque
from collections.abc import Coroutine, Iterator
from typing import Any

# Whose task this is: an event of the scenario, e.g. "join:1", or a node.
origin = contextvars.ContextVar("origin", default="?")


class NodeLoop(asyncio.AbstractEventLoop):
    """The event loop of one node: it runs when told to, and its clock goes on when told to.

    Args:
        name: of the node.
        now: the time at which the clock stands.
    """

    def __init__(self, name: str, now: float = 0.0) -> None:
        self.name = name
        self.errors: list[str] = []
        self.ids = itertools.count(1)
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._now = now
        self._tasks: set[asyncio.Task[Any]] = set()

    # What asyncio asks of a loop

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer is left out when its time comes."""

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None
    ) -> "asyncio.Task[Any]":
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    # What the explorer asks of it

    def begin(self, work: Coroutine[Any, Any, Any], of: str) -> "asyncio.Task[Any]":
        """Begins a task; the steps that follow from it are ``of`` that origin."""
        context = contextvars.copy_context()
        context.run(origin.set, of)
        return self.create_task(work, context=context)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """This is the loop of the thread."""
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)

    def run_ready(self) -> None:
        """Runs everything that can run now."""
        with self.running():
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()

    def next_timer(self) -> float:
        """When the next timer is due; infinite when there is none."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else math.inf

    def pass_time(self, until: float) -> None:
        """Lets the clock go on to that time. What is due meanwhile happens."""
        while self.next_timer() <= until:
            self._now, _, timer = heapq.heappop(self._timers)
            self._ready.append(timer)
            self.run_ready()
        self._now = max(self._now, until)

    def close(self) -> None:
        """Cancels what is left."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            self.run_ready()
