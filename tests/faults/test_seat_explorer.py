"""The smallest scenarios of seats, and that the explorer finds defects that are planted: the rest is `make explore`."""

from dataclasses import replace

import explorer_scripts
import pytest
from explorer import Counterexample, explore, replay
from explorer_checks import LIMIT, all_of, found_and_replayed
from explorer_clock import CLOCK, RedisClock
from explorer_scenarios import FAULTS
from explorer_seat_scenarios import SEAT_SCENARIOS
from planted import altered, plant

from lesson_server.events.leave_seat import ParticipantLeaveSeat
from lesson_server.stores.redis import seat_scripts

pytestmark = pytest.mark.without_coverage


@pytest.mark.parametrize(
    ("name", "faults"), [("one-seat", FAULTS), ("seats-lost", ("flush",)), ("left-and-lost", ("flush",))]
)
def test_seats_are_right_after_every_order_with_a_fault_at_every_point(client, name, faults):
    all_of(client, replace(SEAT_SCENARIOS[name], faults=faults))


@pytest.mark.parametrize(
    "name",
    [
        "change-seats", "take-and-go", "move-and-go", "leave-and-take", "early-take", "reconnect", "swept-taker",
        "cluster-seats",
    ],
)  # fmt: skip
def test_seats_are_right_after_every_order(client, name):
    assert all_of(client, replace(SEAT_SCENARIOS[name], max_faults=0)).schedules[0] > 1


# The explorer finds what is wrong


async def clear_seat(self):
    """Leaves a seat, which the connection remembers."""
    await self.connection.services.seats.leave(self.connection.handshake.lesson_id, self._session["client_id"])


# A part of a script, and what comes in its place.
SCRIPT_DEFECTS = {
    "frees what has changed": ("FREE_IF_UNCHANGED", "if call('HGET', index, ARGV[5]) ~= ARGV[6] then", "if false then"),
    "takes the seat of another": ("TAKE", "if occupant ~= '' and occupant ~= person then", "if false then"),
    "keeps the seat that it moves from": ("TAKE", "if held and held ~= seat then vacate(held) end", ""),
    "does not begin the grace anew": ("TAKE", "keep(person, seat)\nexpire()", "expire()"),
    "overwrites whoever has the seat": ("RESTORE", "or (occupant ~= '' and occupant ~= person) then", "then"),
    "does not tell who has left": ("LEAVE", "    announce(seat, nil)\n", ""),
    "tells twice who has come": ("TAKE", "    announce(seat, person)\n", "    announce(seat, person)" * 2 + "\n"),
    "does not find a seat that is free again": ("LEAVE", "call('ZADD', freed, seat, seat)", ""),
    "leaves the freed seats behind": ("FREE_IF_UNCHANGED", "vacate(seat)\nexpire()\n", "vacate(seat)\n"),
}


@pytest.mark.parametrize(
    ("defect", "name", "needs"),
    [
        ("frees what has changed", "reconnect", ()),
        ("takes the seat of another", "one-seat", ()),
        ("keeps the seat that it moves from", "change-seats", ()),
        ("does not begin the grace anew", "reconnect", ()),
        ("overwrites whoever has the seat", "seats-lost", ("flush",)),
        ("does not tell who has left", "change-seats", ()),
        ("tells twice who has come", "one-seat", ()),
        ("does not find a seat that is free again", "leave-and-take", ()),
        ("leaves the freed seats behind", "take-and-go", ()),
        (clear_seat, "left-and-lost", ("flush",)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_defect_is_found_and_its_schedule_can_be_replayed(client, monkeypatch, defect, name, needs):
    scenario = replace(SEAT_SCENARIOS[name], faults=needs, max_faults=len(needs))
    with monkeypatch.context() as patch:
        if isinstance(defect, str):
            script, text, replacement = SCRIPT_DEFECTS[defect]
            patch.setattr(
                f"lesson_server.stores.redis.seats.{script}", altered(getattr(seat_scripts, script), text, replacement)
            )
        else:
            patch.setattr(ParticipantLeaveSeat, "clear_seat", plant(ParticipantLeaveSeat.clear_seat)(defect))
        found_and_replayed(client, scenario)
    assert not isinstance(replay(client, scenario, []), Counterexample)


# The search leaves nothing out


def test_the_passing_of_time_is_tried_wherever_it_can_happen(client):
    """Trying every choice at every point finds not one schedule more."""
    scenario = replace(SEAT_SCENARIOS["grace"], actors=((("leave", "1"),), (("pass", "time"), ("sweep", "c"))))
    reduced, full = (explore(client, scenario, LIMIT, every_choice=every) for every in (False, True))
    assert reduced.counterexample is None
    assert reduced.schedules == full.schedules
    assert reduced.schedules[0] > 1


# The clock


def test_a_script_finds_the_time_that_the_explorer_has_set(client):
    clock = RedisClock(client)
    script = "local time = redis.call('TIME') return time[1] * 1000000 + time[2]"
    times = [clock.execute(("EVAL", script, 0)) for _ in range(2)]
    assert times == [clock.now() - 1000, clock.now()]
    clock.set(5_000)
    assert clock.execute(("EVAL", script, 0)) == 6_000
    assert client.keys() == [CLOCK]


def test_a_script_that_asks_for_the_time_in_an_unknown_way_is_refused(client):
    with pytest.raises(TypeError, match="asks for the time"):
        RedisClock(client).execute(("EVAL", "return redis.call('time', 'TIME')", 0))


def test_every_script_has_a_name():
    assert {"presence.WRITE", "seats.TAKE", "seat_deadlines.ADD"} <= set(explorer_scripts.script_names().values())
