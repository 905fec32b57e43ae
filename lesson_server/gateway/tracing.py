"""Traces of single connections: each step and each new state, for the page that shows a join as it happens.

The node that is asked for a trace publishes the request; the node of the connection publishes what happens.
"""

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncIterator
from typing import Any

from lesson_server.errors import Refusal, StoreUnavailable
from lesson_server.events.connection import Connection
from lesson_server.events.machine import ChartMachine, Model
from lesson_server.gateway.handlers import Gateway
from lesson_server.stores.redis.messages import Messages

# The kinds of messages: the request for a trace of a connection, and what happens there.
TRACE, TRACED = "trace", "traced"

Event = tuple[str, dict[str, Any]]


class TracingMachine(ChartMachine):
    """A chart's machine for one connection, which reports what happens.

    Args:
        original: the machine that this machine replaces, whose counts and observer it uses.
        reports: takes an event for each step and for each new state.
    """

    def __init__(self, original: ChartMachine, reports: "asyncio.Queue[Event]") -> None:
        super().__init__(original.chart, self._observe)
        self.counts = original.counts
        self._original = original
        self._reports = reports
        self._labels = {"event": original.chart.EVENT, "client": original.chart.CLIENT}

    async def fire(self, model: Model, trigger: str) -> bool:
        moved = await super().fire(model, trigger)
        self._reports.put_nowait(("state", {**self._labels, "trigger": trigger, "state": model.state}))
        return moved

    def _observe(self, step: str, seconds: float) -> None:
        self._original.observe_step(step, seconds)
        error = sys.exception()  # of the step, which is on its way to the caller
        sentence = None if error is None else str(error) if isinstance(error, Refusal) else "internal error"
        self._reports.put_nowait(
            ("step", {**self._labels, "step": step, "seconds": round(seconds, 6), "error": sentence})
        )


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
        self._tasks: set[asyncio.Task[None]] = set()
        messages.on(TRACE, self._begin)
        messages.on(TRACED, self._receive)

    async def events(self, sid: str) -> AsyncIterator[Event]:
        """Yield the events of a connection: first ``ready``, when the trace has begun.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        trace = secrets.token_hex(8)
        queue = self._traces[trace] = asyncio.Queue()
        try:
            await self._messages.publish(TRACE, trace=trace, sid=sid)
            while True:
                yield await queue.get()
        finally:
            del self._traces[trace]

    async def close(self) -> None:
        """Stop."""
        for task in list(self._tasks):
            task.cancel()

    async def _begin(self, message: dict[str, Any]) -> None:
        connection = self._gateway.connections.get(message["sid"])
        if connection is not None:
            task = asyncio.create_task(self._report(connection, message["trace"]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _report(self, connection: Connection, trace: str) -> None:
        reports: asyncio.Queue[Event] = asyncio.Queue()
        connection.machines = {cls: TracingMachine(machine, reports) for cls, machine in connection.machines.items()}
        for region in connection:
            region.machine = connection.machines[type(region)]
        reports.put_nowait(("ready", {}))
        with contextlib.suppress(StoreUnavailable):
            while connection.sid in self._gateway.connections or not reports.empty():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        name, data = await reports.get()
                        await self._messages.publish(TRACED, trace=trace, name=name, data=data)

    async def _receive(self, message: dict[str, Any]) -> None:
        queue = self._traces.get(message["trace"])
        if queue is not None:
            queue.put_nowait((message["name"], message["data"]))
