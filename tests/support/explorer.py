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
:mod:`explorer_rules` tells what is wrong. Some rules are checked after every choice as well.

What is left out, and why nothing is missed by that. Two choices are *independent* when in any state that offers both,
neither takes the other away, and both orders lead to the same state. Of schedules that differ only in the order of
neighbours that are independent, one is carried out. Source sets (Abdulla, Aronis, Jonsson, Sagonas: Optimal Dynamic
Partial Order Reduction, 2014, algorithm 1) try another order only where two choices that are not independent could have
come the other way round; sleep sets break off what comes to a schedule that has been seen. A fault need not happen, so
each is tried at every point that is reached. A test compares the number of schedules with a search by sleep sets alone,
which tries every choice at every point. A rule that holds at any time is about what Redis says and who is there, so an
answer, an end and a crash count as reads of the lesson's record: their order with the writes is not left out.
The footprint of a choice says what it touches, and so what is independent:

* Commands of different keys; reads of one key; HSET, HSETNX and HINCRBY of different fields of a key, which only ever
  add. A script touches the keys that it declares, for a cluster would refuse any other.
* What two nodes do by themselves: an answer that reaches one changes nothing for the other.
* A crash and whatever another node does. A fault is not independent of another fault: it may be the last one.

What is not explored: the order within one node of what its event loop does by itself (asyncio's is fixed); a clock that
fires while commands wait, unless the scenario says so (``tick``), for ``late`` does the same to the node; part of a
command; a crashed node's commands that are carried out after the crash. The time between two retries is 0, so that a
retry is one more step that can be carried out at any time. A node is lost after fewer heartbeats, and records are
checked more often, than in production, which makes the settling cheaper and changes no order. A late write is carried
out before LATE_WRITE of removals.py has passed. Where a report says that it was cut, the first schedules are those that
differ most at their ends, for the search is depth first.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import redis
from explorer_choices import Choice
from explorer_nodes import LogHandler, controlled
from explorer_rules import nobody_is_absent, violations
from explorer_scenarios import Scenario
from explorer_seat_rules import seat_violations
from explorer_seats import Listener, Violation, listening
from explorer_world import ENDLESS, World

# The search


@dataclass(frozen=True)
class Counterexample:
    """A schedule after which a rule does not hold.

    Attributes:
        schedule: its choices: what ``tests/support/explore.py --replay`` takes.
        history: the same for people, with commands and answers.
        violations: what is wrong.
    """

    scenario: Scenario
    schedule: tuple[str, ...]
    history: tuple[str, ...]
    violations: tuple[str, ...]

    def __str__(self) -> str:
        wrong = (f"WRONG: {violation}" for violation in self.violations)
        again = f'tests/support/explore.py --replay "{self.scenario.name} {" ".join(self.schedule)}"'
        return "\n".join([f"{self.scenario.name}: {self.scenario.text}", *self.history, *wrong, again])


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

    def offers(self, name: str) -> bool:
        return any(choice.name == name for choice in self.offered)

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
        conflicts = earlier.conflicts(last.chosen)
        causes = (
            last.chosen.cause == position + 1
            or (conflicts and earlier.of == last.chosen.of)
            or (last.chosen.is_tried_everywhere and not path[position].offers(last.chosen.name))
        )
        if not (causes or conflicts):
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
    with controlled() as log, listening(client, scenario) as listener:
        for faults in range(scenario.max_faults + 1):
            _explore(client, faults, limit, report, log, listener, on_schedule, every_choice)
            if report.counterexample:
                break
    return report


def _explore(
    client: redis.Redis,
    faults: int,
    limit: int,
    report: Report,
    log: LogHandler,
    listener: Listener,
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
        world = World(client, scenario, faults, log, listener)
        try:
            if _run(world, path, every_choice):
                report.pruned += 1
            elif len(world.injected) == faults:
                _settle(world)
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
        if [choice.name for choice in world.choices()] != [choice.name for choice in frame.offered]:
            raise NotDeterministic("\n".join(world.history))
        world.perform(frame.chosen.name)
    if path:  # the choices before the last one have been seen in an earlier run
        _check_at_once(world, path[-1].chosen)
        _find_races(path)
    while offered := world.choices():
        if len(path) > ENDLESS:
            raise Violation("a node asks Redis without end")
        sleeping = path[-1].next_sleeping() if path else {}
        chosen = next((choice for choice in offered if choice.name not in sleeping), None)
        if chosen is None:
            return True
        wanted = {choice.name for choice in offered if every_choice or choice.is_tried_everywhere}
        path.append(_Frame(offered, sleeping, wanted | {chosen.name}, chosen))
        world.perform(chosen.name)
        _check_at_once(world, chosen)
        _find_races(path)
    return False


def _check_at_once(world: World, choice: Choice) -> None:
    """Checks the rules that hold at any time, where the choice may have changed what they say."""
    touched = {touch.what[1] for touch in choice.footprint}
    if any(name.startswith(("lesson_student_", "lesson_teacher_")) for name in touched):
        nobody_is_absent(world)
    if any(name.startswith(("lesson_seat_", "lesson_node_seats:")) for name in touched):
        world.seats.check()


def _settle(world: World) -> None:
    """Lets everything settle.

    Raises:
        Violation: a rule does not hold.
    """
    world.settle(lambda choice: _check_at_once(world, choice))
    if wrong := [*violations(world), *seat_violations(world)]:
        raise Violation(*wrong)


def replay(client: redis.Redis, scenario: Scenario, schedule: Sequence[str]) -> Counterexample | list[str]:
    """Carries out one schedule.

    Returns:
        the counterexample that the schedule is, or the history of one that breaks no rule.

    Raises:
        ValueError: a choice of the schedule is not offered where it stands.
    """
    with controlled() as log, listening(client, scenario) as listener:
        world = World(client, scenario, len(schedule), log, listener)
        try:
            for name in schedule:
                offered = {choice.name: choice for choice in world.choices()}
                if name not in offered:
                    raise ValueError(f"{name} is not offered, but {' '.join(offered)}")
                world.perform(name)
                _check_at_once(world, offered[name])
            _settle(world)
        except Violation as violation:
            return Counterexample(scenario, tuple(schedule), tuple(world.history), violation.args)
        finally:
            world.close()
        return world.history
