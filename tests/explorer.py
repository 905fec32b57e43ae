"""An explorer of interleavings: the real code of several nodes on a store whose commands are carried out one at a time.

A :class:`Scenario` says what happens: which tabs of a browser join and leave on which node, whose clock goes on. A
:class:`World` runs it: the real gateway, connections, presence, seats and node of each node, each on an event loop of
its own whose clock stands still. What a node asks of Redis waits in a *step*; nothing moves until the explorer makes a
*choice*:

=====================  ==============================================================================================
``join:1``, …          the next event of one of the scenario's actors begins
``a3``                 the next command of node a's third step is carried out, on a real Valkey
``a3!``                the answers of that step reach the node, which then runs until it waits again
=====================  ==============================================================================================

and, as often in a schedule as its budget of faults allows:

=====================  ==============================================================================================
``lost:a3``            the rest of the step never reaches Redis; the node gets StoreUnavailable
``late:a3``            the node gets StoreUnavailable now, and the rest of the step is carried out later, at any time
``unanswered:a3``      all of the step has been carried out, and its answer gets lost: StoreUnavailable
``crash:a``            node a is never heard of again, and what it has asked and is not yet carried out never will be
``flush``              FLUSHALL
=====================  ==============================================================================================

A *schedule* is a sequence of choices until none is left. :func:`explore` goes through all of them, depth first, each
from an empty Valkey; a world can't be copied. After each, time goes on until everything must have settled, and
:meth:`World.verdict` tells what is wrong. Some rules are checked after every choice as well.

What is left out, and why nothing is missed by that. Two choices are *independent* when in any state that offers both,
neither takes the other away, and both orders lead to the same state. Of schedules that differ only in the order of
neighbours that are independent, one is carried out (by sleep sets: Godefroid, Partial-Order Methods, 1996, chapter 5;
without persistent sets, so every *state* that can be reached is visited, and a rule about states can be checked on the
way). :class:`Footprint` says what a choice touches, and so what is independent:

* Commands of different keys; reads of one key; HSET, HSETNX and HINCRBY of different fields of a key, which only ever
  add. A script touches the keys that it declares, for a cluster would refuse any other.
* What two nodes do by themselves: an answer that reaches one changes nothing for the other.
* A crash and whatever another node does. A fault is not independent of another fault: it may be the last one.

What is not explored: the order within one node of what its event loop does by itself (asyncio's is fixed); a clock that
fires while commands wait, unless the scenario says so (``tick``), for ``late`` does the same to the node; part of a
command; a crashed node's commands that are carried out after the crash. The time between two retries is 0, so that a
retry is one more step that can be carried out at any time. A node is lost after fewer heartbeats, and records are
checked more often, than in production, which makes the settling cheaper and changes no order.
"""

import asyncio
import contextlib
import contextvars
import heapq
import inspect
import itertools
import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import redis
from fakes import FakeAnalytics, FakeIdentities, FakeLessons, FakeSockets, Faults

from lesson_server import nodes, presence, seats
from lesson_server.admission import Admission
from lesson_server.connection import Services
from lesson_server.errors import StoreUnavailable
from lesson_server.gateway import SUCCESS, Answer, Gateway
from lesson_server.metrics import Metrics
from lesson_server.nodes import Node
from lesson_server.presence import Presence
from lesson_server.records import ClientRecord, Record, TeacherRecord, decode
from lesson_server.redis_shard import Command
from lesson_server.redis_store import RedisStore
from lesson_server.seats import Seats

RETENTION = 7 * 86_400
SEAT_COUNT = 2
UNAVAILABLE: Answer = {"status": "ERROR", "message": str(StoreUnavailable("", ""))}

# The constants of production, made small; see above.
LOST_AFTER = 1
CHECK_PERIOD = 1.0
# Seconds after which everything has settled: a node has been found lost and swept, its sweep has been noticed by a node
# that lives after all, and every record has been checked twice.
SETTLED_AFTER = (LOST_AFTER + 3) * nodes.HEARTBEAT_INTERVAL + 2 * CHECK_PERIOD

# More choices than any scenario has: one that goes on has a node that asks without end.
ENDLESS = 2_000

LOST, LATE, UNANSWERED, CRASH, FLUSH = "lost", "late", "unanswered", "crash", "flush"
FAULTS = (LOST, LATE, UNANSWERED, CRASH, FLUSH)

origin = contextvars.ContextVar("origin", default="?")


# What a scenario says


@dataclass(frozen=True, slots=True)
class Tab:
    """A tab of a browser, which connects to a node and joins a lesson. Its name is its sid."""

    sid: str
    node: str
    client: str
    subject: str
    lesson_id: str = "1"

    @property
    def auth(self) -> dict[str, str]:
        role = "teacher" if self.client == "teacher" else "student"
        return {"client": self.client, "lesson_id": self.lesson_id, "access_token": f"{role}:{self.subject}"}

    @property
    def record(self) -> Record:
        if self.client == "teacher":
            return TeacherRecord(self.sid, self.lesson_id, self.subject)
        return ClientRecord(self.sid, self.lesson_id, self.subject, "student")


Event = tuple[str, str]


@dataclass(frozen=True)
class Scenario:
    """What happens, in any order.

    Attributes:
        name: one word for the command line.
        text: one line for people.
        tabs: the connections that there are.
        before: events that come first, each with all that follows from it.
        actors: the events of each actor. One begins when the one before it has begun, and need not have ended.
            ``("join", sid)``, ``("leave", sid)``; ``("tick", node)``: a heartbeat's time passes on a node;
            ``("check", node)``: all its records are to be checked.
        witness: nodes of which nothing happens, and that find out when another one dies.
        stalled: nodes that live and may be taken for lost: while they are being swept, their people are absent.
        faults: the kinds of faults that are injected. A kind that never happened is an error.
        max_faults: in one schedule.
        cluster: every key is on a master of its own, so that commands of one step have no order.
        presence: the class of the records, for planted defects.
    """

    name: str
    text: str
    tabs: tuple[Tab, ...]
    actors: tuple[tuple[Event, ...], ...]
    before: tuple[Event, ...] = ()
    witness: tuple[str, ...] = ()
    stalled: tuple[str, ...] = ()
    faults: tuple[str, ...] = FAULTS
    max_faults: int = 1
    cluster: bool = False
    presence: type[Presence] = Presence

    @property
    def nodes(self) -> tuple[str, ...]:
        named = {*self.witness, *(tab.node for tab in self.tabs)}
        named |= {who for actor in (self.before, *self.actors) for verb, who in actor if verb in ("tick", "check")}
        return tuple(sorted(named))


# What a choice touches


@dataclass(frozen=True, slots=True)
class Touch:
    """One thing that a choice reads or writes.

    Attributes:
        what: a key of Redis, a node, a step, …
        part: the fields of a key; None: all of it.
    """

    what: tuple[str, str]
    writes: bool
    part: frozenset[str] | None = None

    def conflicts(self, other: "Touch") -> bool:
        if self.what != other.what or not (self.writes or other.writes):
            return False
        return self.part is None or other.part is None or bool(self.part & other.part)


Footprint = tuple[Touch, ...]

DATA = ("all keys", "")
BUDGET = ("the budget of faults", "")

READS = frozenset({"EXISTS", "HEXISTS", "HGET", "HGETALL", "HLEN", "HRANDFIELD", "HSCAN", "TTL"})
# What nodes ask all the time, and what a history leaves out once time passes.
ROUTINE = READS | {"EXPIRE", "HINCRBY", "HSETNX"}
KEYLESS = frozenset({"PING", "PUBLISH"})


def keys_of(command: Command) -> tuple[str, ...]:
    """The keys of a command."""
    if command[0] in KEYLESS:
        return ()
    if command[0] == "EVAL":
        return tuple(map(str, command[3 : 3 + int(command[2])]))
    return (str(command[1]),)


def touches_of(command: Command) -> Footprint:
    """What a command touches in Redis."""
    name, *words = command
    part = None
    if name in ("HSET", "HINCRBY", "HSETNX", "HGET", "HEXISTS"):
        part = frozenset(map(str, words[1::2] if name == "HSET" else words[1:2]))
    return tuple(Touch(("key", key), name not in READS, part) for key in keys_of(command))


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice that the explorer has.

    Attributes:
        name: the same in every schedule that has it.
        footprint: what it touches.
        of: the step or the actor whose next move it is. Moves of the same are not offered at the same time, except
            commands of different masters.
        cause: how many choices had been made when it was first offered.
        is_fault: whether it uses up the budget.
    """

    name: str
    footprint: Footprint
    of: str
    cause: int
    is_fault: bool = False

    def conflicts(self, other: "Choice") -> bool:
        return any(one.conflicts(two) for one in self.footprint for two in other.footprint)


# Event loops


class NodeLoop(asyncio.AbstractEventLoop):
    """The event loop of one node: it runs when told to, and its clock goes on when told to.

    Args:
        name: of the node.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.errors: list[str] = []
        self.ids = itertools.count(1)
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._now = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()

    # What asyncio asks of a loop

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
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


# The store


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

    async def run(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]:
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


_same_signature(ExploredStore.run, RedisStore.run)
_same_signature(ExploredStore.key, RedisStore.key)


# The world


class Member:
    """One node: everything that a process of the server has, as server.py builds it, without its sockets."""

    def __init__(self, name: str, scenario: Scenario, submit: Callable[[Step], None]) -> None:
        self.name = name
        self.alive = True
        self.loop = NodeLoop(name)
        self.store: Any = ExploredStore(self.loop, scenario.cluster, submit)
        faults = Faults()
        self.sockets: Any = FakeSockets(faults)
        self.analytics = FakeAnalytics()
        with self.loop.running():  # it gives itself a name
            self.presence = scenario.presence(self.store, RETENTION)
        seat_maps = Seats(self.store, RETENTION)
        services: Any = Services(
            sockets=self.sockets,
            lessons=FakeLessons(faults, {tab.lesson_id: SEAT_COUNT for tab in scenario.tabs}),  # type: ignore[arg-type]
            seats=seat_maps,
            presence=self.presence,
            identities=FakeIdentities(),  # type: ignore[arg-type]
            analytics=self.analytics,  # type: ignore[arg-type]
            metrics=_metrics(),
            trust_teacher_user_id=False,
        )
        self.gateway = Gateway(self.sockets, services, Admission(1_000, 0, 0))
        self.node = Node(self.store, self.presence, seat_maps, self.gateway)

    # The events of a scenario

    async def join(self, tab: Tab) -> Answer | None:
        if tab.sid not in self.gateway.connections:
            self.sockets.open(tab.sid)
            await self.gateway.connect(tab.sid, {}, tab.auth)
        return await self.gateway.join_lesson(tab.sid)

    async def leave(self, tab: Tab) -> None:
        self.sockets.close(tab.sid)
        await self.gateway.disconnect(tab.sid, "transport close")


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

    logger = logging.getLogger("lesson_server")
    handler = LogHandler()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    level = logger.level
    logger.setLevel(logging.ERROR)
    # patch.object refuses what is not there, so a constant that is renamed is not silently left as it is.
    with (
        patch.object(presence.secrets, "token_hex", token_hex),
        patch.object(presence, "RETRY_INTERVAL", 0),
        patch.object(nodes, "RETRY_INTERVAL", 0),
        patch.object(nodes, "LOST_AFTER", LOST_AFTER),
        patch.object(nodes, "CHECK_PERIOD", CHECK_PERIOD),
    ):
        try:
            yield handler
        finally:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)


class Violation(Exception):
    """A rule does not hold."""


class World:
    """One run of a scenario, from an empty Valkey.

    Args:
        client: of the Valkey, which is emptied.
        scenario: what happens.
        max_faults: in this run.
        log: collects what :func:`controlled` sees.
    """

    def __init__(self, client: redis.Redis, scenario: Scenario, max_faults: int, log: LogHandler) -> None:
        client.flushall()
        log.messages.clear()
        self.injected: list[str] = []
        self.replays = False  # the choices have been made before, and the rules that hold at any time were checked then
        self.history: list[str] = []
        self._redis = client
        self._scenario = scenario
        self._max_faults = max_faults
        self._log = log
        self._tabs = {tab.sid: tab for tab in scenario.tabs}
        self._steps: list[Step] = []
        self._made = 0
        self._members = {name: Member(name, scenario, self._submit) for name in scenario.nodes}
        self._events: dict[str, asyncio.Task[Any]] = {}
        self._left: set[str] = set()
        self._writes: dict[str, list[str]] = {}  # key → the tabs whose joins have written there, in their order
        self._actions: dict[str, Callable[[], None]] = {}
        self._settling = False
        self._actors = [deque(zip(_labels(scenario, number), actor, strict=True)) for number, actor in enumerate(scenario.actors)]
        for name, member in self._members.items():
            member.loop.begin(member.node.start(), f"node {name}")
            member.loop.run_ready()
            self._carry_out_everything()
        for number, event in enumerate(scenario.before):
            self._begin(f"{':'.join(event)} (before, {number + 1})", event)
            self._carry_out_everything()
        self._made = 0

    # Choices

    def choices(self) -> list[Choice]:
        """What can happen next. None: everything has happened."""
        self._actions.clear()
        choices = [*self._step_choices(), *self._event_choices()]
        if choices and len(self.injected) < self._max_faults:
            choices += self._fault_choices()
        return choices

    def perform(self, name: str) -> None:
        """Makes one choice, which :meth:`choices` has offered.

        Raises:
            Violation: a rule that holds at any time does not.
        """
        self._made += 1
        self._actions[name]()

    def _submit(self, step: Step) -> None:
        step.cause = self._made
        self._steps.append(step)

    def _offer(
        self, name: str, action: Callable[[], None], of: str, cause: int, *footprint: Touch, is_fault: bool = False
    ) -> Choice:
        self._actions[name] = action
        return Choice(name, footprint, of, cause, is_fault)

    def _step_choices(self) -> Iterator[Choice]:
        for step in self._steps:
            alive = Touch(("life of", step.loop.name), writes=False)
            if step.is_carried_out:
                yield self._offer(
                    f"{step.name}!",
                    partial(self._deliver, step),
                    step.name,
                    step.cause,
                    alive,
                    Touch(("node", step.loop.name), writes=True),
                    Touch(("step", step.name), writes=True),
                    *self._sees(step.origin),
                )
            for number, waiting in enumerate(step.waiting):
                if waiting:
                    name = f"{step.name}.{number + 1}" if len(step.waiting) > 1 else step.name
                    yield self._offer(
                        name,
                        partial(self._carry_out, step, waiting),
                        step.name,
                        step.cause,
                        alive,
                        Touch(DATA, writes=False),
                        Touch(("step", step.name), writes=True, part=frozenset({str(number)})),
                        *touches_of(step.commands[waiting[0]]),
                    )

    def _event_choices(self) -> Iterator[Choice]:
        for number, actor in enumerate(self._actors):
            if actor:
                label, event = actor[0]
                node = self._node_of(event)
                if self._members[node].alive:
                    yield self._offer(
                        label,
                        partial(self._begin_next, actor),
                        f"actor {number}",
                        0,
                        Touch(("life of", node), writes=False),
                        Touch(("node", node), writes=True),
                        *self._sees(":".join(event)),
                    )

    def _sees(self, origin: str) -> Footprint:
        """Whether a person is there, for the rule that nobody who is there is absent: an answer and an end read what
        Redis says, so that the rule is checked for every order of these and of what changes it."""
        verb, _, sid = origin.partition(":")
        return (Touch(("key", _lesson_key(self._tabs[sid])), writes=False),) if verb in ("join", "leave") else ()

    def _fault_choices(self) -> Iterator[Choice]:
        offer = partial(self._offer, is_fault=True)
        budget = Touch(BUDGET, writes=True)
        for step in self._steps:
            if not step.awaited:
                continue
            touches = (
                budget,
                Touch(("life of", step.loop.name), writes=False),
                Touch(("node", step.loop.name), writes=True),
                Touch(("step", step.name), writes=True),
            )
            for kind in (UNANSWERED,) if step.is_carried_out else (LOST, LATE):
                if kind in self._scenario.faults:
                    name = f"{kind}:{step.name}"
                    yield offer(name, partial(self._give_up, step, kind), name, step.cause, *touches)
        living = [member for member in self._members.values() if member.alive]
        if CRASH in self._scenario.faults and len(living) > 1:
            for member in living:
                name = f"{CRASH}:{member.name}"
                life = Touch(("life of", member.name), writes=True)
                keys = {_lesson_key(tab) for tab in self._tabs.values() if tab.node == member.name}
                seen = (Touch(("key", key), writes=False) for key in sorted(keys))
                yield offer(name, partial(self._crash, member), name, 0, budget, life, *seen)
        if FLUSH in self._scenario.faults:
            yield offer(FLUSH, self._flush, FLUSH, 0, budget, Touch(DATA, writes=True))

    def _node_of(self, event: Event) -> str:
        verb, who = event
        return self._tabs[who].node if verb in ("join", "leave") else who

    # What happens

    def _begin_next(self, actor: "deque[tuple[str, Event]]") -> None:
        label, event = actor.popleft()
        self._begin(label, event)

    def _begin(self, label: str, event: Event) -> None:
        verb, who = event
        member = self._members[self._node_of(event)]
        self._note(label, f"node {member.name}")
        if verb == "join":
            self._events[label] = member.loop.begin(member.join(self._tabs[who]), f"join:{who}")
        elif verb == "leave":
            self._left.add(who)
            self._events[label] = member.loop.begin(member.leave(self._tabs[who]), f"leave:{who}")
        elif verb == "tick":
            member.loop.pass_time(member.loop.time() + nodes.HEARTBEAT_INTERVAL)
        elif verb == "check":
            with member.loop.running():
                member.node.check_all()
        else:
            raise ValueError(f"no such event: {verb}")
        member.loop.run_ready()

    def _carry_out(self, step: Step, waiting: "deque[int]") -> None:
        position = waiting.popleft()
        command = step.commands[position]
        try:
            answer = self._redis.execute_command(*command)
        except redis.RedisError as error:
            raise Violation(f"Valkey refuses {_short(command)}: {error}") from error
        step.answers[position] = answer
        if not self._settling or command[0] not in ROUTINE:
            self._note(step.name, f"node {step.loop.name}, {step.origin}: {_short(command)} → {answer}")
        if command[:2] == ("EVAL", presence.WRITE) and step.origin.startswith("join:"):
            self._writes.setdefault(str(command[3]), []).append(step.origin.removeprefix("join:"))
        if step.is_carried_out and not step.awaited:
            self._steps.remove(step)
        if any(key.startswith(("lesson_student_", "lesson_teacher_")) for key in keys_of(command)):
            self._nobody_is_absent()

    def _deliver(self, step: Step) -> None:
        self._steps.remove(step)
        if not self._settling:
            self._note(f"{step.name}!", f"node {step.loop.name}, {step.origin}: gets the answers")
        if not step.done.done():
            step.done.set_result(step.answers)
        step.loop.run_ready()
        self._nobody_is_absent()

    def _give_up(self, step: Step, kind: str) -> None:
        self.injected.append(kind)
        self._note(f"{kind}:{step.name}", f"node {step.loop.name}, {step.origin}: {_FAULT_TEXTS[kind]}")
        step.given_up = True
        if kind != LATE:
            self._steps.remove(step)
        member = self._members[step.loop.name]
        member.store.failures += 1
        step.done.set_exception(StoreUnavailable("Redis", kind))
        step.loop.run_ready()

    def _crash(self, member: Member) -> None:
        self.injected.append(CRASH)
        self._note(f"{CRASH}:{member.name}", f"node {member.name} is killed")
        member.alive = False
        self._steps[:] = [step for step in self._steps if step.loop is not member.loop]

    def _flush(self) -> None:
        assert self._redis.dbsize(), "there is nothing that could be lost"
        self.injected.append(FLUSH)
        self._note(FLUSH, "FLUSHALL")
        self._redis.flushall()

    def _note(self, choice: str, text: str) -> None:
        self.history.append(f"{choice:<16} {text}")

    def _carry_out_everything(self) -> None:
        for _ in range(ENDLESS):
            name = next((choice.name for choice in self._step_choices()), None)
            if name is None:
                return
            self.perform(name)
        raise Violation("a node asks Redis without end")

    def settle(self) -> None:
        """Time passes, on all nodes that live, until nothing more should change.

        Raises:
            Violation: a rule that holds at any time does not.
        """
        self._note("", "time passes")
        self._settling = True
        living = [member.loop for member in self._members.values() if member.alive]
        ends = {loop: loop.time() + SETTLED_AFTER for loop in living}
        self._carry_out_everything()
        while True:
            # The one that has the longest way to go is the first: the clocks of nodes don't differ.
            loop = min(living, key=lambda loop: loop.next_timer() - ends[loop])
            if loop.next_timer() > ends[loop]:
                return
            loop.pass_time(loop.next_timer())
            self._carry_out_everything()

    def close(self) -> None:
        """Ends all tasks."""
        for member in self._members.values():
            member.loop.close()

    # Rules

    @property
    def flushed(self) -> bool:
        return FLUSH in self.injected

    def _answers(self, tab: Tab) -> list[Answer | None]:
        return [
            task.result()
            for label, task in self._events.items()
            if label.split()[0].split("/")[0] == f"join:{tab.sid}" and task.done()
        ]

    def _has_joined(self, tab: Tab) -> bool:
        return SUCCESS in self._answers(tab)

    def _is_live(self, tab: Tab) -> bool:
        """Whether the connection has joined and is there."""
        return tab.sid not in self._left and self._members[tab.node].alive and self._has_joined(tab)

    def _nobody_is_absent(self) -> None:
        """Whoever has a live, joined connection is told of, at any time."""
        if self.flushed or self.replays:
            return
        for tab in self._tabs.values():
            if self._is_live(tab) and tab.node not in self._scenario.stalled and self._shown(tab) is None:
                raise Violation(f"{tab.subject} is in lesson {tab.lesson_id} by {tab.sid}, and Redis says: absent")

    def _shown(self, tab: Tab) -> str | None:
        """The sid by which Redis tells that the person of a tab is in its lesson."""
        sid: str | None = self._redis.hget(_lesson_key(tab), tab.subject)  # type: ignore[assignment]
        return sid

    def verdict(self) -> list[str]:
        """Everything that is wrong after all has settled."""
        wrong = [f"logged: {message}" for message in self._log.messages]
        for member in self._members.values():
            wrong += [f"node {member.name}: {error}" for error in member.loop.errors]
        return [*wrong, *self._events_not_answered(), *self._records(), *self._own_keys(), *self._reconnects()]

    def _events_not_answered(self) -> Iterator[str]:
        for label, task in self._events.items():
            verb, who = label.split()[0].split("/")[0].split(":")
            tab = self._tabs[who]
            member = self._members[tab.node]
            if not member.alive:
                continue
            if not task.done():
                yield f"{label} has no end"
            elif verb == "join":
                answer = task.result()
                allowed = [SUCCESS]
                if self.injected:
                    allowed.append(UNAVAILABLE)
                if who in self._left:
                    allowed.append(None)
                if answer not in allowed:
                    yield f"{label} was answered {answer}"
                if self._is_live(tab) and not member.gateway.connections[who].is_present:
                    yield f"{who} has joined, and is {member.gateway.connections[who]}"

    def _newest(self, tabs: list[Tab]) -> list[Tab]:
        """Those of the tabs that may have joined last. One joined before another when its write came first on every
        key that both wrote to; where the keys differ in that, any of the two may be the last."""
        return [tab for tab in tabs if not any(self._is_before(tab, other) for other in tabs)]

    def _is_before(self, tab: Tab, other: Tab) -> bool:
        orders = []
        for sids in self._writes.values():
            last = {sid: position for position, sid in enumerate(sids)}
            if tab is not other and tab.sid in last and other.sid in last:
                orders.append(last[tab.sid] < last[other.sid])
        return bool(orders) and all(orders)

    def _records(self) -> Iterator[str]:
        """Contract, section 5."""
        live = [tab for tab in self._tabs.values() if self._is_live(tab)]
        people: dict[tuple[str, str], list[Tab]] = {}
        for tab in self._tabs.values():
            people.setdefault((tab.client, tab.subject), []).append(tab)
        for (client, subject), tabs in people.items():
            yield from self._lessons_of(subject, tabs, live)
            if client == "teacher":
                yield from self._teacher(subject, [tab for tab in tabs if tab in live])
            else:
                yield from self._participant(subject, tabs, [tab for tab in tabs if tab in live])
        for lesson_id in {tab.lesson_id for tab in live}:
            if self._redis.hlen(f"lesson_seat_{lesson_id}") != SEAT_COUNT:
                yield f"lesson {lesson_id} has no seat map"
        for key in self._redis.scan_iter():
            if not key.startswith("lesson_node_") and self._redis.ttl(key) < 0:
                yield f"{key} has no TTL"

    def _lessons_of(self, subject: str, tabs: list[Tab], live: list[Tab]) -> Iterator[str]:
        for lesson_id in {tab.lesson_id for tab in tabs}:
            in_lesson = [tab for tab in tabs if tab.lesson_id == lesson_id]
            shown = self._shown(in_lesson[0])
            right = [tab.sid for tab in self._newest([tab for tab in in_lesson if tab in live])] or [None]
            if shown not in right:
                yield f"{subject} in lesson {lesson_id}: {shown} stands, and should be {_any_of(right)}"

    def _teacher(self, subject: str, live: list[Tab]) -> Iterator[str]:
        lesson_id = self._redis.hget(subject, "lesson_id")
        right = [tab.lesson_id for tab in self._newest(live)] or [None]
        if lesson_id not in right:
            yield f"{subject} is told to be in lesson {lesson_id}, and should be in {_any_of(right)}"

    def _participant(self, subject: str, tabs: list[Tab], live: list[Tab]) -> Iterator[str]:
        record = self._redis.hgetall(subject)
        sid = record.get("sid")
        if live:
            right: list[str | None] = [tab.sid for tab in self._newest(live)]
            same = [tab for tab in live if tab.sid == sid]
            if same and (shown := self._shown(same[0])) != sid:
                yield f"{subject}: {sid} is the newest connection, and in its lesson {shown} stands"
        else:
            joined = [tab.sid for tab in tabs if self._has_joined(tab)]
            # Nobody knows of these, not even who ended them, whether they had joined.
            cut_off = [tab.sid for tab in tabs if not all(self._answers(tab)) or not self._members[tab.node].alive]
            right = [*joined, *cut_off]
            if not joined or self.flushed:
                right.append(None)
        if sid not in right:
            yield f"{{client_id}} of {subject} names {sid}, and should name {_any_of(right)}"
        if record and record != {"sid": sid, "client_id": subject, "role": "student"}:
            yield f"{{client_id}} of {subject} is {record}"

    def _own_keys(self) -> Iterator[str]:
        """The server's own keys hold what is, and nothing of dead nodes or ended connections."""
        living = [member for member in self._members.values() if member.alive]
        node_ids = {member.presence.incarnation.node_id for member in living}
        known = set(self._redis.hkeys(living[0].presence.nodes_key))
        if known != node_ids:
            yield f"the nodes are {sorted(node_ids)}, and Redis knows {sorted(known)}"
        expected: dict[str, set[str]] = {}
        found: dict[str, set[str]] = {}
        claims: dict[str, str] = {}  # name of a claim → the sid of its record
        indexes = {member.presence.index_key(member.presence.incarnation.node_id): member for member in living}
        for key, member in indexes.items():
            for number, text in self._redis.hgetall(key).items():
                sid = decode(text).sid
                claims[f"{member.presence.incarnation.node_id}:{number}"] = sid
                found.setdefault(key, set()).add(sid)
            for tab in self._tabs.values():
                if tab.node == member.name and self._is_live(tab):
                    expected.setdefault(key, set()).add(tab.sid)
                    for entry in tab.record.entries():
                        claims_key = f"lesson_node_claims:{entry.fields[0]}{{{entry.name}}}"
                        expected.setdefault(claims_key, set()).add(tab.sid)
        for key in self._redis.scan_iter("lesson_node_*"):
            if key.startswith("lesson_node_claims:"):
                for claim, order in self._redis.zrange(key, 0, -1, withscores=True):
                    if order:  # else it is what is known of ended connections
                        name = json.loads(claim)[0]
                        found.setdefault(key, set()).add(claims.get(name, f"claim {name} of no index"))
            elif key not in (living[0].presence.nodes_key, *indexes):
                yield f"{key} belongs to nobody"
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key, set()) != found.get(key, set()):
                yield f"{key} holds {sorted(found.get(key, ()))}, and should hold {sorted(expected.get(key, ()))}"

    def _reconnects(self) -> Iterator[str]:
        """Of several first joins of a client exactly one is the first, and all others are reconnects."""
        answers = [answer for tab in self._tabs.values() for answer in self._answers(tab)]
        if self.injected or not all(answer == SUCCESS for answer in answers):
            return
        reported = Counter(
            client_id for member in self._members.values() for client_id, *_ in member.analytics.reconnects
        )
        for client_id in {tab.subject for tab in self._tabs.values() if tab.client == "participant"}:
            joined = sum(tab.subject == client_id and self._has_joined(tab) for tab in self._tabs.values())
            if joined and reported[client_id] != joined - 1:
                yield f"{client_id} has joined by {joined} connections, and {reported[client_id]} reconnects were reported"


_FAULT_TEXTS = {
    LOST: "the rest never reaches Redis; StoreUnavailable",
    LATE: "StoreUnavailable; the rest is carried out later",
    UNANSWERED: "the answer gets lost; StoreUnavailable",
}

_SCRIPTS = {
    text: name
    for module in (presence, seats)
    for name, text in vars(module).items()
    if name.isupper() and isinstance(text, str) and "redis.call" in text
}


def _lesson_key(tab: Tab) -> str:
    return f"lesson_{'teacher' if tab.client == 'teacher' else 'student'}_{tab.lesson_id}"


def _short(command: Command) -> str:
    """A command for people: a script by its name."""
    if command[0] == "EVAL":
        command = (_SCRIPTS.get(str(command[1]), "EVAL"), *command[3:])
    words = [word.decode() if isinstance(word, bytes) else str(word) for word in command]
    return " ".join(words)


def _any_of(values: Sequence[str | None]) -> str:
    return " or ".join(map(str, values))


def _labels(scenario: Scenario, actor: int) -> list[str]:
    """The names of an actor's events: ``join:1``; the second of that name is ``join:1/2``."""
    met: Counter[str] = Counter()
    labels: list[list[str]] = []
    for events in scenario.actors:
        labels.append([])
        for event in events:
            name = ":".join(event)
            met[name] += 1
            labels[-1].append(name if met[name] == 1 else f"{name}/{met[name]}")
    return labels[actor]


# The search


@dataclass(frozen=True)
class Counterexample:
    """A schedule after which a rule does not hold.

    Attributes:
        schedule: its choices: what ``scripts/explore.py --replay`` takes.
        history: the same for people, with commands and answers.
        violations: what is wrong.
    """

    scenario: Scenario
    schedule: tuple[str, ...]
    history: tuple[str, ...]
    violations: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.scenario.name}: {self.scenario.text}", *self.history, *(f"WRONG: {v}" for v in self.violations)]
        return "\n".join([*lines, f"replay: {self.scenario.name} {' '.join(self.schedule)}"])


@dataclass
class Report:
    """What a search has seen.

    Attributes:
        schedules: number of faults → how many different schedules were carried out.
        pruned: runs that were broken off, since only the order of independent choices was left to differ.
        cut: the numbers of faults of which these are not all schedules, but the first of more.
        injected: kind of fault → in how many schedules it was injected.
        counterexample: the first, which ends the search.
    """

    scenario: Scenario
    schedules: Counter[int] = field(default_factory=Counter)
    pruned: int = 0
    cut: set[int] = field(default_factory=set)
    injected: Counter[str] = field(default_factory=Counter)
    counterexample: Counterexample | None = None

    @property
    def missing(self) -> list[str]:
        """The kinds of faults that were to be injected, and never were."""
        return [kind for kind in self.scenario.faults if not self.injected[kind]] if self.scenario.max_faults else []

    def __str__(self) -> str:
        extents = [
            f"{'the first' if faults in self.cut else 'all'} {count:,} with {faults} faults"
            for faults, count in sorted(self.schedules.items())
        ]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.injected.items()))
        return (
            f"{self.scenario.name}: {self.schedules.total():,} schedules: {', '.join(extents) or 'none'}"
            f" ({kinds or 'no fault was injected'}); {self.pruned:,} runs were broken off"
        )


@dataclass(slots=True)
class _Frame:
    """A point of a schedule: what could be chosen there, and what has been.

    Attributes:
        sleeping: choices of which every continuation from here has been seen, by their names.
        wanted: the names of choices whose continuations are to be seen.
        past: the frames whose choices come before this one's in every equivalent schedule, as bits.
    """

    offered: list[Choice]
    sleeping: dict[str, Choice]
    wanted: set[str]
    chosen: Choice
    past: int = 0

    def next_sleeping(self) -> dict[str, Choice]:
        return {name: choice for name, choice in self.sleeping.items() if not choice.conflicts(self.chosen)}

    def advance(self) -> bool:
        """Turns to the next choice; False when there is none."""
        self.sleeping[self.chosen.name] = self.chosen
        for choice in self.offered:
            if choice.name in self.wanted and choice.name not in self.sleeping:
                self.chosen = choice
                return True
        return False


def _find_races(path: list[_Frame]) -> None:
    """Computes the past of the last choice, and has the choices tried in the other order that may be a race with it."""
    last = path[-1]
    last.past = 0
    made_before = len(path) - 1
    for position in range(made_before - 1, -1, -1):
        if last.past >> position & 1:
            continue
        earlier = path[position].chosen
        causes = earlier.of == last.chosen.of or last.chosen.cause == position + 1
        if not causes and not earlier.conflicts(last.chosen):
            continue
        if not causes:
            _reverse(path, position)
        last.past |= path[position].past | 1 << position


def _reverse(path: list[_Frame], position: int) -> None:
    """Has a continuation seen from ``position`` in which the last choice comes before the one made there."""
    between = [index for index in range(position + 1, len(path) - 1) if not path[index].past >> position & 1]
    later = [*between, len(path) - 1]
    past = path[-1].past  # as far as it is known: what comes after ``position``
    first: set[str] = set()
    for number, index in enumerate(later):
        before = path[index].past if index < len(path) - 1 else past
        if not any(before >> other & 1 for other in later[:number]):
            first.add(path[index].chosen.name)
    frame = path[position]
    if first & frame.wanted:
        return
    offered = [choice.name for choice in frame.offered if choice.name in first]
    if not offered and path[-1].chosen.is_fault:
        return  # the earlier choice is what made the fault possible
    if not offered:
        raise NotDeterministic(f"{first} are not offered at {position}")
    frame.wanted.add(offered[0])


class NotDeterministic(Exception):
    """The same choices have led to different offers. Something is random, or depends on real time."""


def explore(
    client: redis.Redis,
    scenario: Scenario,
    limit: int,
    on_schedule: Callable[[Report], object] = lambda report: None,
    *,
    every_choice: bool = False,
) -> Report:
    """Goes through the schedules of a scenario, those with fewer faults first, until one breaks a rule.

    Args:
        client: of a Valkey of the explorer's own, with ``decode_responses``.
        limit: schedules at most, for each number of faults.
        on_schedule: called after each.
        every_choice: try every choice at every point, not only where there is a race: slow, and proves the search.

    Raises:
        NotDeterministic: the scenario can't be explored.
    """
    report = Report(scenario)
    with controlled() as log:
        for faults in range(scenario.max_faults + 1):
            _explore(client, faults, limit, report, log, on_schedule, every_choice)
            if report.counterexample:
                break
    return report


def _explore(
    client: redis.Redis,
    faults: int,
    limit: int,
    report: Report,
    log: LogHandler,
    on_schedule: Callable[[Report], object],
    every_choice: bool,
) -> None:
    """The schedules with exactly so many faults."""
    scenario = report.scenario
    path: list[_Frame] = []
    while True:
        if report.schedules[faults] >= limit:
            report.cut.add(faults)
            return
        world = World(client, scenario, faults, log)
        try:
            if _run(world, path, every_choice):
                report.pruned += 1
            elif len(world.injected) == faults:
                world.settle()
                if wrong := world.verdict():
                    raise Violation(*wrong)
                report.schedules[faults] += 1
                report.injected.update(set(world.injected))
                on_schedule(report)
        except Violation as violation:
            schedule = tuple(frame.chosen.name for frame in path)
            report.counterexample = Counterexample(scenario, schedule, tuple(world.history), violation.args)
            return
        finally:
            world.close()
        while path and not path[-1].advance():
            path.pop()
        if not path:
            return


def _run(world: World, path: list[_Frame], every_choice: bool) -> bool:
    """Makes the choices of ``path``, and goes on with the first at each point until none is left.

    Returns:
        whether the run was broken off, since all that could be chosen sleeps.
    """
    for frame in path:
        world.replays = frame is not path[-1]
        if [choice.name for choice in world.choices()] != [choice.name for choice in frame.offered]:
            raise NotDeterministic("\n".join(world.history))
        world.perform(frame.chosen.name)
    if path:
        _find_races(path)
    while offered := world.choices():
        if len(path) > ENDLESS:
            raise Violation("a node asks Redis without end")
        sleeping = path[-1].next_sleeping() if path else {}
        chosen = next((choice for choice in offered if choice.name not in sleeping), None)
        if chosen is None:
            return True
        wanted = {choice.name for choice in offered if every_choice or choice.is_fault}
        path.append(_Frame(offered, sleeping, wanted | {chosen.name}, chosen))
        world.perform(chosen.name)
        _find_races(path)
    return False


def replay(client: redis.Redis, scenario: Scenario, schedule: Sequence[str]) -> Counterexample | list[str]:
    """Carries out one schedule.

    Returns:
        the counterexample that the schedule is, or the history of one that breaks no rule.

    Raises:
        ValueError: a choice of the schedule is not offered where it stands.
    """
    with controlled() as log:
        world = World(client, scenario, len(schedule), log)
        try:
            for name in schedule:
                offered = [choice.name for choice in world.choices()]
                if name not in offered:
                    raise ValueError(f"after {len(world.history)} steps {name} is not offered, but {' '.join(offered)}")
                world.perform(name)
            world.settle()
            if wrong := world.verdict():
                raise Violation(*wrong)
        except Violation as violation:
            return Counterexample(scenario, tuple(schedule), tuple(world.history), violation.args)
        finally:
            world.close()
        return world.history
