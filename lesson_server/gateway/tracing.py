"""Traces of single connections: each step and each new state, for the page that shows a join as it happens.

The node that is asked for a trace publishes the request, and repeats it while somebody reads the trace. The node of the
connection publishes what happens, until it is not asked any more or the connection has ended.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from lesson_server.errors import Refusal, StoreUnavailable
from lesson_server.events.connection import Connection, Region
from lesson_server.events.machine import ChartMachine, Model
from lesson_server.gateway.handlers import Gateway
from lesson_server.stores.redis.messages import Messages
from lesson_server.tasks import end

# The kinds of messages: the request for a trace of a connection, what happens there, and that nobody reads any more.
TRACE, TRACED, LEAVE_TRACE = "trace", "traced", "leave_trace"
# The names of the events that only the nodes see: the answer to a repeated request, and the end of the trace.
CONTINUES, ENDED = "continues", "ended"
# Seconds between two requests for a trace, and after which either node ends a trace if it has not heard of the other.
REQUEST_INTERVAL = 2.0
TRACE_LIFE = 10.0
# Seconds between two signs of life of a trace, and between two looks whether its connection has ended.
LIFE_INTERVAL = 1.0

Event = tuple[str, dict[str, Any]]


class TracingMachine(ChartMachine):
    """A chart's machine for one connection, which reports what happens.

    Args:
        original: the machine that this machine replaces, whose counts and observer it uses.
        queues: take an event for each step and for each new state.
    """

    def __init__(self, original: ChartMachine, queues: "list[asyncio.Queue[Event]]") -> None:
        super().__init__(original.chart, self._observe)
        self.counts = original.counts
        self._original = original
        self._queues = queues
        self._labels = {"event": original.chart.EVENT, "client": original.chart.CLIENT}
        self._trigger = ""

    async def fire(self, model: Model, trigger: str) -> bool:
        self._trigger = trigger
        moved = await super().fire(model, trigger)
        self._report("state", {"trigger": trigger, "state": model.state})
        return moved

    def _observe(self, step: str, seconds: float, error: BaseException | None) -> None:
        self._original.observe_step(step, seconds, error)
        sentence = None if error is None else str(error) if isinstance(error, Refusal) else "internal error"
        self._report("step", {"trigger": self._trigger, "step": step, "seconds": round(seconds, 6), "error": sentence})

    def _report(self, name: str, data: dict[str, Any]) -> None:
        for queue in self._queues:
            queue.put_nowait((name, {**self._labels, **data}))


class Tap:
    """The traces of one connection, whose machines are replaced while there are any.

    Args:
        connection: the connection.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._originals = connection.machines
        self.queues: list[asyncio.Queue[Event]] = []
        self._use({cls: TracingMachine(machine, self.queues) for cls, machine in self._originals.items()})

    def remove(self) -> None:
        """Give the connection its own machines again."""
        self._use(self._originals)

    def _use(self, machines: Mapping[type[Region], ChartMachine]) -> None:
        self._connection.machines = machines
        for region in self._connection:
            region.machine = machines[type(region)]


class Tracing:
    """Traces connections of any node.

    Args:
        gateway: the connections of this node.
        messages: the messages between nodes.
    """

    def __init__(self, gateway: Gateway, messages: Messages) -> None:
        self._gateway = gateway
        self._messages = messages
        self._traces: dict[str, asyncio.Queue[Event]] = {}  # traces that this node has asked for
        self._tasks: dict[str, asyncio.Task[None]] = {}  # traces of connections of this node
        self._asked_at: dict[str, float] = {}  # as for _tasks: when another node has asked for the trace
        self._taps: dict[Connection, Tap] = {}
        messages.on(TRACE, self._begin)
        messages.on(LEAVE_TRACE, self._leave)
        messages.on(TRACED, self._receive)

    async def close(self) -> None:
        """Stop."""
        for task in list(self._tasks.values()):
            await end(task)

    # On the node that is asked for a trace

    async def events(self, sid: str) -> AsyncIterator[Event | None]:
        """Yield the events of a connection: first ``ready``, when the trace has begun; None is a sign of life.

        The events end with the connection.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        trace = secrets.token_hex(8)
        queue = self._traces[trace] = asyncio.Queue()
        asked_at, heard_at = float("-inf"), time.monotonic()
        try:
            while time.monotonic() - heard_at < TRACE_LIFE:
                if time.monotonic() - asked_at >= REQUEST_INTERVAL:
                    await self._messages.publish(TRACE, trace=trace, sid=sid)
                    asked_at = time.monotonic()
                event = await _next(queue)
                if event is not None:
                    heard_at = time.monotonic()
                    if event[0] == ENDED:
                        return
                    if event[0] == CONTINUES:
                        continue
                yield event
        finally:
            del self._traces[trace]
            with contextlib.suppress(StoreUnavailable):
                await self._messages.publish(LEAVE_TRACE, trace=trace)

    async def _receive(self, message: dict[str, Any]) -> None:
        queue = self._traces.get(message["trace"])
        if queue is not None:
            queue.put_nowait((message["name"], message["data"]))

    # On the node of the connection

    async def _begin(self, message: dict[str, Any]) -> None:
        trace = message["trace"]
        connection = self._gateway.connections.get(message["sid"])
        if trace not in self._tasks:
            if connection is None:
                return
            task = self._tasks[trace] = asyncio.create_task(self._report(connection, trace))
            task.add_done_callback(lambda _: self._forget(trace))
        self._asked_at[trace] = time.monotonic()

    async def _leave(self, message: dict[str, Any]) -> None:
        if message["trace"] in self._tasks:
            self._tasks[message["trace"]].cancel()

    def _forget(self, trace: str) -> None:
        del self._tasks[trace], self._asked_at[trace]

    async def _report(self, connection: Connection, trace: str) -> None:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        tap = self._taps.get(connection) or self._taps.setdefault(connection, Tap(connection))
        tap.queues.append(queue)
        told_at = self._asked_at[trace]
        try:
            queue.put_nowait(("ready", {}))
            while time.monotonic() - self._asked_at[trace] < TRACE_LIFE:
                if told_at != self._asked_at[trace]:
                    told_at = self._asked_at[trace]
                    queue.put_nowait((CONTINUES, {}))
                event = await _next(queue)
                if event is None and self._has_ended(connection) and queue.empty():
                    event = ENDED, {}
                if event is not None:
                    name, data = event
                    await self._messages.publish(TRACED, trace=trace, name=name, data=data)
                    if name == ENDED:
                        break
        except StoreUnavailable:
            pass  # logged; the other node ends the trace too
        finally:
            tap.queues.remove(queue)
            if not tap.queues:
                tap.remove()
                del self._taps[connection]

    def _has_ended(self, connection: Connection) -> bool:
        return connection.sid not in self._gateway.connections and all(region.has_ended for region in connection)


async def _next(queue: "asyncio.Queue[Event]") -> Event | None:
    """Return the next event of a queue; None if there is none for a while."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIFE_INTERVAL):
            return await queue.get()
    return None
