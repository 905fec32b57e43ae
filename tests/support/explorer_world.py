"""A world of explored nodes: what can happen next in it, and what happens then. See explorer.py."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis
from explorer_choices import BUDGET, CLOCK, DATA, ROUTINE, Choice, Footprint, Touch, touches_of
from explorer_clock import RedisClock, keys_of_server
from explorer_nodes import SETTLED_AFTER, LogHandler, Member, Step
from explorer_scenarios import CRASH, FLUSH, LATE, LOST, UNANSWERED, Event, Scenario, tab_of
from explorer_scripts import script_names, short
from explorer_seats import Listener, SeatWatch, Violation

from lesson_server.errors import StoreUnavailable

# More choices than any scenario has: one that goes on has a node that asks without end.
ENDLESS = 2_000


@dataclass(frozen=True, slots=True)
class Begun:
    """An event that has begun; ``task`` is what the node does for it, if that has an end."""

    label: str
    event: Event
    task: "asyncio.Task[Any] | None"


class World:
    """One run of a scenario, from an empty Valkey.

    Args:
        client: of the Valkey, which is emptied.
        scenario: what happens.
        max_faults: in this run.
        log: of :func:`~explorer_nodes.controlled`, within which the world must run.
        listener: to what is told of the seats.

    Attributes:
        tabs, members: of the scenario, by their names.
        begun: the events that have begun.
        left: the tabs whose end has begun.
        writes: key → the tabs whose joins have written there, in their order.
        seats: what has happened to the seats.
        injected: the kinds of the faults that have happened.
        history: what has happened, for people.
    """

    def __init__(
        self, client: redis.Redis, scenario: Scenario, max_faults: int, log: LogHandler, listener: Listener
    ) -> None:
        client.flushall()
        self.clock = RedisClock(client)
        self.seats = SeatWatch(client, self.clock, scenario, listener)
        log.messages.clear()
        self.injected: list[str] = []
        self.history: list[str] = []
        self.redis = client
        self.scenario = scenario
        self._max_faults = max_faults
        self.log = log
        self.tabs = {tab.sid: tab for tab in scenario.tabs}
        self._steps: list[Step] = []
        self._made = 0
        self.members = {name: Member(name, scenario, self._submit) for name in scenario.nodes}
        self.begun: list[Begun] = []
        self.left: set[str] = set()
        self.writes: dict[str, list[str]] = {}
        self._script_names = script_names()
        self._actions: dict[str, Callable[[], None]] = {}
        self._settling = False
        self._actors = _labelled(scenario.actors)
        for name, member in self.members.items():
            member.loop.begin(member.node.start(), f"node {name}")
            member.loop.run_ready()
            self._execute_all()
        for event in scenario.before:
            self._begin(f"({':'.join(event)})", event)
            self._execute_all()
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
            Violation: Valkey refuses a command.
        """
        self._made += 1
        self._actions[name]()

    def _submit(self, step: Step) -> None:
        step.cause = self._made
        self._steps.append(step)

    def _offer(
        self, name: str, action: Callable[[], None], of: str, cause: int, *footprint: Touch, **kind: bool
    ) -> Choice:
        self._actions[name] = action
        return Choice(name, footprint, of, cause, **kind)

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
                        partial(self._execute, step, waiting),
                        step.name,
                        step.cause,
                        alive,
                        Touch(DATA, writes=False),
                        Touch(("step", step.name), writes=True, part=frozenset({str(number)})),
                        *touches_of(step.commands[waiting[0]]),
                        *self.seats.sees(step.commands[waiting[0]]),
                    )

    def _event_choices(self) -> Iterator[Choice]:
        for number, actor in enumerate(self._actors):
            if not actor:
                continue
            label, event = actor[0]
            action = partial(self._begin_next, actor)
            own = Touch(("actor", str(number)), writes=True)
            if event[0] == "pass":
                if all(step.origin.startswith("sweep:") for step in self._steps):
                    yield self._offer(
                        label, action, f"actor {number}", 0, own, Touch(CLOCK, writes=True), is_tried_everywhere=True
                    )
                continue
            node = self.node_of(event)
            if self.members[node].alive:
                yield self._offer(
                    label,
                    action,
                    f"actor {number}",
                    0,
                    Touch(("life of", node), writes=False),
                    Touch(("node", node), writes=True),
                    # While anything but a sweep is under way, no long time passes.
                    *([] if event[0] == "sweep" else [Touch(CLOCK, writes=False)]),
                    own,
                    *self._sees(label),
                )

    def _sees(self, origin: str) -> Footprint:
        """Whether a person is there, for the rule that nobody who is there is absent: an answer and an end read what
        Redis says, so that the rule is checked for every order of these and of what changes it."""
        verb, _, who = origin.partition(":")
        return (Touch(("key", self.tabs[tab_of(who)].lesson_key), writes=False),) if verb in ("join", "leave") else ()

    def _fault_choices(self) -> Iterator[Choice]:
        offer = partial(self._offer, is_fault=True, is_tried_everywhere=True)
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
                if kind in self.scenario.faults:
                    name = f"{kind}:{step.name}"
                    yield offer(name, partial(self._fail, step, kind), name, step.cause, *touches)
        living = [member for member in self.members.values() if member.alive]
        if CRASH in self.scenario.faults and len(living) > 1:
            for member in living:
                name = f"{CRASH}:{member.name}"
                life = Touch(("life of", member.name), writes=True)
                keys = {tab.lesson_key for tab in self.tabs.values() if tab.node == member.name}
                seen = (Touch(("key", key), writes=False) for key in sorted(keys))
                yield offer(name, partial(self._crash, member), name, 0, budget, life, *seen)
        if FLUSH in self.scenario.faults and FLUSH not in self.injected:
            yield offer(FLUSH, self._flush, FLUSH, 0, budget, Touch(DATA, writes=True))

    def node_of(self, event: Event) -> str:
        _, who = event
        tab = self.tabs.get(tab_of(who))
        return who if tab is None else tab.node

    # What happens

    def _begin_next(self, actor: "deque[tuple[str, Event]]") -> None:
        label, event = actor.popleft()
        self._begin(label, event)

    def _begin(self, label: str, event: Event) -> None:
        verb, who = event
        if verb == "pass":
            self._pass_time(label)
            return
        member = self.members[self.node_of(event)]
        self._note(label, f"node {member.name}")
        if verb == "leave":
            self.left.add(tab_of(who))
        self.begun.append(Begun(label, event, member.begin(verb, who, label.strip("()"))))
        member.loop.run_ready()

    def _pass_time(self, label: str) -> None:
        self.clock.set(self.clock.now() + 1_000 * self.scenario.long_time)
        self._note(label, "all that Redis has a deadline for is due")

    def _execute(self, step: Step, waiting: "deque[int]") -> None:
        position = waiting.popleft()
        command = step.commands[position]
        try:
            answer = self.clock.execute(command)
        except redis.RedisError as error:
            raise Violation(f"Valkey refuses {short(command, self._script_names)}: {error}") from error
        step.answers[position] = answer
        if not self._settling or command[0] not in ROUTINE:
            text = short(command, self._script_names)
            self._note(step.name, f"node {step.loop.name}, {step.origin}: {text} → {answer}")
        script = self._script_names[str(command[1])] if command[0] == "EVAL" else ""
        if script == "presence.WRITE":
            self.writes.setdefault(str(command[3]), []).append(tab_of(step.origin.removeprefix("join:")))
        self.seats.observe(step.origin, script, command, answer)
        if step.is_carried_out and not step.awaited:
            self._steps.remove(step)

    def _deliver(self, step: Step) -> None:
        self._steps.remove(step)
        if not self._settling:
            self._note(f"{step.name}!", f"node {step.loop.name}, {step.origin}: gets the answers")
        if not step.done.done():
            step.done.set_result(step.answers)
        step.loop.run_ready()

    def _fail(self, step: Step, kind: str) -> None:
        self.injected.append(kind)
        self._note(f"{kind}:{step.name}", f"node {step.loop.name}, {step.origin}: {_FAULT_TEXTS[kind]}")
        step.given_up = True
        if kind != LATE:
            self._steps.remove(step)
        member = self.members[step.loop.name]
        member.store.failures += 1
        error = StoreUnavailable("Redis", kind)
        if step.bookkeeping == len(step.commands):  # whose failure fails nobody
            step.done.set_result([error] * len(step.commands))
        else:
            step.done.set_exception(error)
        step.loop.run_ready()

    def _crash(self, member: Member) -> None:
        self.injected.append(CRASH)
        self._note(f"{CRASH}:{member.name}", f"node {member.name} is killed")
        member.alive = False
        self._steps[:] = [step for step in self._steps if step.loop is not member.loop]

    def _flush(self) -> None:
        assert keys_of_server(self.redis), "there is nothing that could be lost"
        self.injected.append(FLUSH)
        self._note(FLUSH, "FLUSHALL")
        now = self.clock.now()
        self.redis.flushall()
        self.clock.set(now)
        self.seats.forget({sid for sids in self.writes.values() for sid in sids})

    def _note(self, choice: str, text: str) -> None:
        self.history.append(f"{choice:<16} {text}")

    def settle(self, on_choice: Callable[[Choice], None]) -> None:
        """Time passes, on all nodes that live, until nothing more should change.

        Args:
            on_choice: called after each.

        Raises:
            Violation: Valkey refuses a command, or a node asks without end.
        """
        self._note("", "time passes")
        self._settling = True
        self._execute_all(on_choice)
        # The clocks of nodes don't tell the same time, but go at the same pace.
        ends = {member.loop: member.loop.time() + SETTLED_AFTER for member in self.members.values() if member.alive}
        while True:
            loop = min(ends, key=lambda loop: loop.next_timer() - ends[loop])
            if loop.next_timer() > ends[loop]:
                break
            loop.pass_time(loop.next_timer())
            self._execute_all(on_choice)
        self._pass_time("")
        sweeper = next(name for name, member in self.members.items() if member.alive)
        self._begin(f"(sweep:{sweeper})", ("sweep", sweeper))
        self._execute_all(on_choice)

    def _execute_all(self, on_choice: Callable[[Choice], None] = lambda choice: None) -> None:
        """What has been asked, in the order in which it was asked."""
        for _ in range(ENDLESS):
            choice = next(self._step_choices(), None)
            if choice is None:
                return
            self.perform(choice.name)
            on_choice(choice)
        raise Violation("a node asks Redis without end")

    def close(self) -> None:
        """Ends all tasks."""
        for member in self.members.values():
            member.loop.close()


_FAULT_TEXTS = {
    LOST: "the rest never reaches Redis; StoreUnavailable",
    LATE: "StoreUnavailable; the rest is carried out later",
    UNANSWERED: "the answer gets lost; StoreUnavailable",
}


def _labelled(actors: tuple[tuple[Event, ...], ...]) -> list[deque[tuple[str, Event]]]:
    """The events of the actors with their names: ``join:1``; the second of that name is ``join:1/2``."""
    met: Counter[str] = Counter()
    labelled: list[deque[tuple[str, Event]]] = []
    for events in actors:
        labelled.append(deque())
        for event in events:
            name = ":".join(event)
            met[name] += 1
            labelled[-1].append((name if met[name] == 1 else f"{name}/{met[name]}", event))
    return labelled
