"""The nodes of an explored world: the real code on a store whose commands wait for the explorer. See explorer.py."""

import asyncio
import contextlib
import inspect
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

from explorer_choices import keys_of
from explorer_loop import NodeLoop, origin
from explorer_scenarios import Scenario, Tab, seat_in, tab_of
from fakes import FakeAnalytics, FakeLessons, FakeSockets, FakeTokens, Faults, unlimited

from lesson_server.errors import StoreUnavailable
from lesson_server.events.join_lesson import JOIN_LESSON
from lesson_server.events.leave_seat import LEAVE_SEAT
from lesson_server.events.registry import EVENTS
from lesson_server.events.services import Services
from lesson_server.events.take_seat import TAKE_SEAT
from lesson_server.gateway.handlers import Answer, Gateway
from lesson_server.metrics import Metrics
from lesson_server.stores.redis import nodes, removals
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.nodes import Node
from lesson_server.stores.redis.presence import Presence
from lesson_server.stores.redis.store import Command

RETENTION = 7 * 86_400

# The constants of production, made small; see above.
LOST_AFTER = 1
CHECK_PERIOD = 1.0
# Seconds since the machine of each node has started: longer than anything looks back.
UPTIME = 1_000.0
# Seconds after which everything has settled: a node has been found lost and swept, its sweep has been noticed by a node
# that lives after all, and every record has been checked twice.
SETTLED_AFTER = (LOST_AFTER + 3) * nodes.HEARTBEAT_INTERVAL + 2 * CHECK_PERIOD


@dataclass(eq=False, slots=True)
class Step:
    """What a node has asked of Redis in one round trip.

    Attributes:
        name: ``a3`` for the third step of node a.
        bookkeeping: how many of the commands may fail.
        origin: whose step it is.
        waiting: for each master, the positions of the commands that are still to be carried out there.
        cause: how many choices had been made when it was asked.
        given_up: whether the node has its StoreUnavailable, or does not wait any more.
    """

    name: str
    loop: NodeLoop
    commands: tuple[Command, ...]
    bookkeeping: int
    origin: str
    waiting: list[deque[int]]
    answers: list[Any]
    done: "asyncio.Future[list[Any]]"
    cause: int = 0
    given_up: bool = False

    @property
    def is_carried_out(self) -> bool:
        return not any(self.waiting)

    @property
    def awaited(self) -> bool:
        return not self.given_up and not self.done.done()


class ExploredStore:
    """In place of :class:`RedisStore`, of which nodes see no more than this: what they ask waits for the explorer.

    Attributes:
        failures: as there.
    """

    def __init__(self, loop: NodeLoop, cluster: bool, submit: Callable[[Step], None]) -> None:
        self.failures = 0
        self._loop = loop
        self._cluster = cluster
        self._submit = submit
        self._numbers = itertools.count(1)

    def key(self, name: str) -> str:
        return name

    async def execute(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]:
        every = bookkeeping + commands
        masters: dict[str, deque[int]] = {}
        for position, command in enumerate(every):
            master = self._hash_tag(command) if self._cluster else ""
            masters.setdefault(master, deque()).append(position)
        step = Step(
            f"{self._loop.name}{next(self._numbers)}",
            self._loop,
            every,
            len(bookkeeping),
            origin.get(),
            list(masters.values()),
            [None] * len(every),
            self._loop.create_future(),
        )
        self._submit(step)
        return await step.done

    @staticmethod
    def _hash_tag(command: Command) -> str:
        (key, *_) = keys_of(command) or ("",)
        tag = key.partition("{")[2].rpartition("}")[0]
        return tag or key


def _same_signature(mine: Any, original: Any) -> None:
    """The explorer replaces what it knows, and nothing that was renamed meanwhile."""
    if inspect.signature(mine) != inspect.signature(original):
        raise TypeError(f"{original.__qualname__} has changed, and {mine.__qualname__} takes its place: adapt it")


_same_signature(ExploredStore.execute, RedisStore.execute)
_same_signature(ExploredStore.key, RedisStore.key)


class Member:
    """One node: everything that a process of the server has, as server.py builds it, without its sockets."""

    def __init__(self, name: str, scenario: Scenario, submit: Callable[[Step], None]) -> None:
        self.name = name
        self.alive = True
        self.loop = NodeLoop(name, UPTIME)
        self.store: Any = ExploredStore(self.loop, scenario.cluster, submit)
        faults = Faults()
        self.sockets: Any = FakeSockets(faults)
        self.analytics = FakeAnalytics()
        self.seats = scenario.seats(self.store, RETENTION, scenario.grace)
        with self.loop.running():  # it gives itself a name
            claims = scenario.claims(self.store, RETENTION, self.seats)
        self.presence = Presence(self.store, claims, scenario.removals(self.store, claims))
        self.tabs = {tab.sid: tab for tab in scenario.tabs}
        services: Any = Services(
            sockets=self.sockets,
            lessons=FakeLessons(faults, {tab.lesson_id: scenario.seat_count for tab in scenario.tabs}),
            seats=self.seats,
            presence=self.presence,
            tokens=FakeTokens(),
            analytics=self.analytics,
            metrics=_metrics(),
            trust_teacher_user_id=False,
        )
        events = [event for event in EVENTS if event.name in scenario.events]
        self.gateway = Gateway(self.sockets, services, unlimited(events), events)
        self.node = Node(self.store, self.presence, self.seats, self.gateway)

    # The events of a scenario

    def begin(self, verb: str, who: str, origin: str) -> "asyncio.Task[Any] | None":
        """Begins an event of this node; returns what the node does for it, if that has an end."""
        if verb == "tick":
            self.loop.pass_time(self.loop.time() + nodes.HEARTBEAT_INTERVAL)
            return None
        if verb == "check":
            with self.loop.running():
                self.node.check_all()
            return None
        if verb == "sweep":
            return self.loop.begin(self._sweep_seats(), origin)
        return self.loop.begin(self._answer(verb, self.tabs[tab_of(who)], seat_in(who)), origin)

    async def _answer(self, verb: str, tab: Tab, seat: int | None) -> Answer | None:
        """An event of a client, and its acknowledgement."""
        match verb:
            case "join":
                if tab.sid not in self.gateway.connections:
                    self.sockets.open(tab.sid)
                    self.gateway.connect(tab.sid, {}, tab.auth)
                return await self.gateway.answer(JOIN_LESSON, tab.sid)
            case "take":
                return await self.gateway.answer(TAKE_SEAT, tab.sid, *([] if seat is None else [{"seat": seat}]))
            case "leave_seat":
                return await self.gateway.answer(LEAVE_SEAT, tab.sid)
            case "leave":
                await self.gateway.disconnect(tab.sid, "transport close")
                self.sockets.close(tab.sid)
                return None
        raise ValueError(f"there is no event {verb}")

    async def _sweep_seats(self) -> None:
        """What the node's SeatSweeper does twice a second."""
        with contextlib.suppress(StoreUnavailable):
            await self.seats.sweep()


@cache
def _metrics() -> Metrics:
    """Counted by all worlds, and read by nobody."""
    return Metrics()


class LogHandler(logging.Handler):
    """Collects errors that are logged: whatever comes to an end there is a defect."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.messages.append(f"{record.getMessage()} ({error!r})")


@contextlib.contextmanager
def controlled() -> Iterator[LogHandler]:
    """What must be so while worlds run: no randomness, no pauses, and errors that are logged are seen."""

    def token_hex(_size: int) -> str:
        """Node ids: a.1, a.2, …"""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, NodeLoop)
        return f"{loop.name}.{next(loop.ids)}"

    # patch.object refuses what is not there, so a constant that is renamed is not silently left as it is.
    with (
        patch("lesson_server.stores.redis.claims.secrets.token_hex", token_hex),
        patch.object(removals, "RETRY_INTERVAL", 0),
        patch.object(removals, "UNINDEX_INTERVAL", 0),
        patch.object(removals, "LATE_WRITE", nodes.HEARTBEAT_INTERVAL),
        patch.object(nodes, "CHECK_RETRY_INTERVAL", 0),
        patch.object(nodes, "LOST_AFTER", LOST_AFTER),
        patch("lesson_server.stores.redis.nodes.time.time", lambda: 0.0),
        patch.object(nodes, "CHECK_PERIOD", CHECK_PERIOD),
    ):
        logger = logging.getLogger("lesson_server")
        handler = LogHandler()
        logger.addHandler(handler)
        propagate, logger.propagate = logger.propagate, False
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield handler
        finally:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)
