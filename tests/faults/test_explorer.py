"""The smallest scenarios of the explorer, and that it finds defects which are planted: the rest is `make explore`."""

from dataclasses import replace

import explorer_nodes
import pytest
from explorer import Counterexample, explore, replay
from explorer_checks import LIMIT, all_of, found_and_replayed
from explorer_choices import touches_of
from explorer_loop import NodeLoop
from explorer_scenarios import FAULTS, Scenario, participant
from explorer_scenarios import PRESENCE_SCENARIOS as SCENARIOS
from planted import plant

from lesson_server.stores.redis.claims import Claims
from lesson_server.stores.redis.presence import Presence
from lesson_server.stores.redis.removals import Removals

pytestmark = pytest.mark.without_coverage

HANDOVER = Scenario(
    "handover",
    "one tab ends while another one joins",
    tabs=(participant("1", "a"), participant("2", "b")),
    before=(("join", "1"),),
    actors=((("leave", "1"),), (("join", "2"),)),
)


@pytest.mark.parametrize(("name", "faults"), [("join", FAULTS), ("move", ("unanswered", "crash", "flush"))])
def test_presence_tells_the_truth_after_every_order_with_a_fault_at_every_point(client, name, faults):
    report = all_of(client, replace(SCENARIOS[name], faults=faults))
    assert report.schedules[1] > 50


@pytest.mark.parametrize("name", ["again", "twice", "teacher", "tabs"])
def test_presence_tells_the_truth_after_every_order(client, name):
    all_of(client, replace(SCENARIOS[name], max_faults=0))


# The explorer finds what is wrong


class ChecksThenActs(Claims):
    """Looks whose sid the entry shows, and removes the entry in a second round trip."""

    @plant(Claims.remove)
    async def remove(self, record, node_id, number, *, undo):
        entry = record.entries()[0]
        (sid,) = await self._store.execute(("HGET", entry.name, entry.fields[0]))
        if sid == record.sid:
            await self._store.execute(("HDEL", entry.name, entry.fields[0]))


class IsNotIndexed(Claims):
    """Writes records that nobody finds when the node dies."""

    @plant(Claims._write)
    async def _write(self, claim, commands):
        return await self._store.execute(*commands)


class ReusesClaims(Claims):
    """All attempts to join are one and the same claim."""

    @plant(Claims.new)
    def new(self, record):
        claim = super().new(record)
        claim.number = 1
        return claim


class ForgetsToRetry(Removals):
    """A removal that Redis did not answer is never tried again."""

    @plant(Removals._clean)
    async def _clean(self):
        self._pending.clear()
        await super()._clean()


@pytest.mark.parametrize(
    ("defect", "scenario", "needs"),
    [
        (ChecksThenActs, HANDOVER, ()),
        (IsNotIndexed, SCENARIOS["join"], ("crash",)),
        (ReusesClaims, SCENARIOS["again"], ("late",)),
        (ForgetsToRetry, SCENARIOS["join"], ("lost",)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_defect_is_found_and_its_schedule_can_be_replayed(client, defect, scenario, needs):
    part = "claims" if issubclass(defect, Claims) else "removals"
    planted = replace(scenario, **{part: defect}, faults=needs, max_faults=len(needs))
    again = found_and_replayed(client, planted)
    assert f'--replay "{scenario.name} {" ".join(again.schedule)}"' in str(again)
    assert not isinstance(replay(client, replace(planted, claims=Claims, removals=Removals), []), Counterexample)


# The search leaves nothing out


@pytest.mark.parametrize("name", ["join", "twice"])
def test_the_schedules_that_are_left_out_are_those_that_come_to_the_same(client, name):
    """Trying every choice at every point finds not one schedule more."""
    scenario = replace(SCENARIOS[name], max_faults=1 if name == "join" else 0, faults=("lost", "unanswered", "crash"))
    reduced, full = (explore(client, scenario, LIMIT, every_choice=every) for every in (False, True))
    assert reduced.counterexample is None
    assert reduced.schedules == full.schedules
    assert reduced.injected == full.injected
    assert reduced.pruned < full.pruned


@pytest.mark.parametrize(
    ("one", "two", "swappable"),
    [
        (("HSET", "k", "f", "v"), ("HSET", "k", "g", "v"), True),
        (("HSET", "k", "f", "v"), ("HSET", "k", "e", "v", "f", "w"), False),
        (("HINCRBY", "k", "f", 1), ("HGETALL", "k"), False),
        (("HGETALL", "k"), ("HLEN", "k"), True),
        (("HDEL", "k", "f"), ("HSET", "k", "g", "v"), False),  # the last field takes the TTL of the key with it
        (("EVAL", "…", 2, "k", "l", "argument"), ("HGET", "l", "f"), False),
        (("EVAL", "…", 1, "k", "argument"), ("EVAL", "…", 1, "l", "k"), True),
        (("PUBLISH", "k", "…"), ("DEL", "k"), True),
    ],
)
def test_commands_may_be_swapped_when_neither_reads_what_the_other_writes(one, two, swappable):
    conflict = any(mine.conflicts(other) for mine in touches_of(one) for other in touches_of(two))
    assert conflict is not swappable


def test_a_kind_of_fault_that_never_happened_is_told(client):
    report = explore(client, SCENARIOS["join"], 1)
    assert report.cut == {0, 1}
    assert set(report.missing) < set(FAULTS)
    assert len(report.missing) == len(FAULTS) - 1
    assert "the first 1 with 0 faults" in str(report)


def test_a_schedule_that_can_not_be_is_refused(client):
    with pytest.raises(ValueError, match="a3 is not offered, but join:1"):
        replay(client, SCENARIOS["join"], ["a3"])


def test_a_store_that_has_changed_is_not_replaced_silently():
    with pytest.raises(TypeError, match="has changed"):
        explorer_nodes._same_signature(explorer_nodes.ExploredStore.key, Presence.write)


# The loop


def test_a_node_runs_only_when_told_to_and_its_clock_stands_still():
    loop, seen = NodeLoop("a"), []
    loop.call_later(2, seen.append, "timer")
    loop.call_later(1, seen.append, "cancelled").cancel()
    loop.call_soon(seen.append, "soon")
    assert seen == []
    loop.run_ready()
    assert (seen, loop.time(), loop.next_timer()) == (["soon"], 0, 2)
    loop.pass_time(1.5)
    assert seen == ["soon"]
    loop.pass_time(2)
    assert (seen, loop.time()) == (["soon", "timer"], 2)
