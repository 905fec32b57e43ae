"""The Socket.IO handlers: they turn a handshake into a connection, and an event into an acknowledgement.

This is the only error boundary. Every exception of a step ends here: as an answer to the client and, if the exception
is a defect, as a traceback in the log. A handler that raised would send no acknowledgement, and the client would wait
for ever.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from socketio.exceptions import ConnectionRefusedError  # noqa: A004 (the library's, not the builtin)

from lesson_server.errors import EventNotAllowed, InternalError, InvalidTransition, Refusal, StoreUnavailable
from lesson_server.events.connection import REGION, Connection, Region
from lesson_server.events.event import Event
from lesson_server.events.machine import ChartMachine, StepObserver
from lesson_server.events.services import Services
from lesson_server.gateway.admission import Admission
from lesson_server.gateway.handshake import parse_handshake
from lesson_server.log import EventLogger
from lesson_server.metrics import StateOf

if TYPE_CHECKING:
    from lesson_server.gateway.spans import Spans

logger = EventLogger(__name__)

Answer = dict[str, Any]

# The outcomes, in the metrics, of an event that has succeeded, and of one whose client has disconnected meanwhile.
SUCCESS = "success"
DISCONNECTED = "disconnected"


class Dispatcher(Protocol):
    """The part of the Socket.IO server that registers handlers."""

    def on(self, event: str, handler: Callable[..., Any]) -> None: ...


class Gateway:
    """Every connection of this process, and the handlers of its events.

    Args:
        sio: the Socket.IO server, with which the handlers are registered.
        services: what the steps of the charts use.
        admission: the limits on connections and events.
        events: the events that clients may send.
        spans: the spans of OpenTelemetry; None: there are none.
    """

    def __init__(
        self,
        sio: Dispatcher,
        services: Services,
        admission: Admission,
        events: Sequence[Event],
        spans: "Spans | None" = None,
    ) -> None:
        self.connections: dict[str, Connection] = {}
        self._services = services
        self._metrics = services.metrics
        self._admission = admission
        self._regions = [(event, client, cls) for event in events for client, cls in event.regions.items()]
        self._clients = frozenset(client for _, client, _ in self._regions)
        self._spans = spans
        self._machines = {cls: ChartMachine(cls.CHART, self._step_observer(event)) for event, _, cls in self._regions}
        self._count_of = Counter[str]()  # kind of client → the number of connections
        # The running request of each region, with the future of its answer.
        self._running: dict[Region, tuple[object, asyncio.Future[Answer | None]]] = {}
        sio.on("connect", self.connect)
        for event in events:
            sio.on(event.name, partial(self.answer, event))
        sio.on("disconnect", self.disconnect)

    def _step_observer(self, event: Event) -> StepObserver:
        observe = self._metrics.step_observer(event.name)
        return observe if self._spans is None else self._spans.observer(observe)

    # Called by the metrics

    def count_states(self) -> Iterator[tuple[StateOf, int]]:
        """Yield event, client and state, with the number of connections, for each state except the final ones."""
        for event, client, cls in self._regions:
            counts = self._machines[cls].counts
            for state in cls.CHART.STATES:
                if state not in cls.CHART.FINAL:
                    # A connection whose client has not sent the event has no region yet.
                    without_region = self._count_of[client] - counts.total() if state == cls.CHART.INITIAL else 0
                    yield (event.name, client, state), counts[state] + without_region

    def states_of(self, connection: Connection) -> Iterator[tuple[StateOf, float, bool, bool]]:
        """Yield the state of a connection for each event that its client may send.

        Yields:
            event, client and state; since when, in seconds of ``time.monotonic``; whether a connection may rest in this
            state; and whether its client is a guest.
        """
        regions = {type(region): region for region in connection}
        for event, client, cls in self._regions:
            if client == connection.handshake.client:
                region = regions.get(cls)
                state = cls.CHART.INITIAL if region is None else region.state
                since = connection.connected_at if region is None else region.since
                is_resting = self._machines[cls].is_resting(state)
                yield (event.name, client, state), since, is_resting, region is not None and region.is_guest

    @property
    def guests(self) -> int:
        """The number of guests, including participants whose join is about to be complete."""
        return sum(self._machines[cls].counts[state] for _, _, cls in self._regions for state in cls.CHART.GUEST)

    # Handlers. None of them may raise TypeError: python-socketio would then call the handler with another signature.

    def connect(self, sid: str, environ: dict[str, Any], auth: object) -> None:
        """Accept a client, or refuse its handshake.

        Raises:
            ConnectionRefusedError: the handshake is refused; the client gets ``connect_error`` with the message.
        """
        try:
            handshake = parse_handshake(auth, self._clients)
            self._admission.admit_connection(len(self.connections))
        except Refusal as refusal:
            self._metrics.observe_handshake_refused(refusal.outcome)
            raise ConnectionRefusedError(str(refusal)) from None
        self.connections[sid] = Connection(sid, handshake, self._services, self._machines)
        self._count_of[handshake.client] += 1

    async def answer(self, event: Event, sid: str, *data: object) -> Answer | None:
        """Answer one event.

        Events of one name on one connection are answered one after the other. An event that asks for the same as the
        running event does not run: both get the same answer.

        Returns:
            the acknowledgement, or None when the client has disconnected.
        """
        connection = self.connections.get(sid)
        if connection is None:
            return None
        deadline = asyncio.get_running_loop().time() + event.deadline
        client = connection.handshake.client
        cls = event.regions.get(client)
        try:
            if cls is None:
                raise EventNotAllowed(client=client, event=event.name)
            region = connection.region(cls)
            request = cls.parse(data)
            while (running := self._running.get(region)) is not None:
                answer = await asyncio.shield(running[1])
                if running[0] == request:
                    return answer
            if not region.has_begun:  # a repeated event costs nothing, and is never refused
                self._admission.admit_event(event.name)
        except Refusal as refusal:
            self._count(event, client, refusal.outcome)
            return _error(refusal)
        return await self._run(event, region, request, deadline)

    async def disconnect(self, sid: str, reason: str) -> None:
        """End a connection and clean up, even if the client disconnected in the middle of an event."""
        connection = self.connections.pop(sid, None)
        if connection is not None:  # the handshake was accepted
            try:
                await connection.end()
            finally:
                self._count_of[connection.handshake.client] -= 1

    # Called by the roster

    def is_busy(self) -> bool:
        """Return whether events are being answered."""
        return bool(self._running)

    async def remove(self, lesson_id: str, client: str, person: str, sids: Collection[str] | None = None) -> None:
        """Close every connection of a person in a lesson, and clean up.

        Args:
            lesson_id: the lesson.
            client: the kind of client, ``teacher`` or ``participant``.
            person: the person's ``user_id`` or ``client_id``.
            sids: the connections to which this is limited; None: all of the person's.
        """
        regions = (
            region
            for sid, connection in list(self.connections.items())
            if (sids is None or sid in sids)
            and (connection.handshake.lesson_id, connection.handshake.client) == (lesson_id, client)
            for region in connection
            if region.person == person
        )
        await asyncio.gather(*(region.attempt("remove") for region in regions))

    # Called by nodes.py

    def figures(self) -> dict[str, int]:
        """Return the numbers of connections and guests."""
        return {"connections": len(self.connections), "guests": self.guests}

    def present(self) -> list[str]:
        """Return the sids of the connections whose presence Redis should hold."""
        return [sid for sid, connection in self.connections.items() if any(region.is_present for region in connection)]

    def seated(self) -> dict[str, list[str]]:
        """Return the lessons whose seat map Redis should hold, each with the sids of the connections in the lesson."""
        seated: defaultdict[str, list[str]] = defaultdict(list)
        for sid, connection in self.connections.items():
            if any(region.needs_seat_map for region in connection):
                seated[connection.handshake.lesson_id].append(sid)
        return seated

    def holders(self) -> dict[str, tuple[str, str]]:
        """Return the connections of people who have a seat: sid → the lesson and the ``client_id``."""
        return {
            sid: (connection.handshake.lesson_id, region.person)
            for sid, connection in self.connections.items()
            if connection.seat
            for region in connection
            if region.is_present and region.person is not None
        }

    async def restore(self, sids: Sequence[str]) -> int:
        """Write the Redis data of these connections again.

        Returns:
            how many of the connections still exist and should have data in Redis.

        Raises:
            StoreUnavailable: Redis failed or was too slow; some connections have been restored.
        """
        connections = (self.connections[sid] for sid in sids if sid in self.connections)
        return sum(await asyncio.gather(*(connection.restore() for connection in connections)))

    # Events

    async def _run(self, event: Event, region: Region, request: object, deadline: float) -> Answer | None:
        answered = asyncio.get_running_loop().create_future()
        self._running[region] = request, answered
        span = None if self._spans is None else self._spans.begin(region)
        outcome, answer = DISCONNECTED, None
        try:
            region.request = request
            outcome, answer = await self._outcome(event, region, deadline)
        finally:
            del self._running[region]
            answered.set_result(answer)
            if span is not None:
                span.end(outcome)
        return answer

    async def _outcome(self, event: Event, region: Region, deadline: float) -> tuple[str, Answer | None]:
        started = time.perf_counter()
        refusal = None
        try:
            async with asyncio.timeout_at(deadline):
                if event.pace:
                    await region.wait_for_turn(event.pace)
                await region.run()
        except Exception as error:
            refusal = self._refusal_of(event, region, error)
            await region.attempt("abandon")
        client = region.CHART.CLIENT
        self._metrics.event_seconds_of(event.name, client).observe(time.perf_counter() - started)
        if region.has_ended:
            outcome, answer = DISCONNECTED, None
        elif refusal is not None:
            outcome, answer = refusal.outcome, _error(refusal)
        else:
            outcome, answer = SUCCESS, {"status": "SUCCESS", "data": region.result()}
        self._count(event, client, outcome)
        return outcome, answer

    def _refusal_of(self, event: Event, region: Region, error: Exception) -> Refusal:
        """Return the refusal that the client gets for an error.

        A defect is logged, and the client gets no details of it.
        """
        if isinstance(error, Refusal):
            return error
        if isinstance(error, TimeoutError):
            refusal = StoreUnavailable("the stores", f"not done within {event.deadline} s")
            logger.error("event_timed_out", f"{REGION} failed: {{cause}}", cause=refusal.cause, **region.log_fields())
            return refusal
        if not (isinstance(error, InvalidTransition) and region.has_ended):
            logger.exception("event_failed", f"{REGION} failed", error, **region.log_fields())
        return InternalError()

    def _count(self, event: Event, client: str, outcome: str) -> None:
        self._metrics.events_of(event.name, client, outcome).inc()


def _error(refusal: Refusal) -> Answer:
    return {"status": "ERROR", "message": str(refusal)}
