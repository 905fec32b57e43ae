"""take_seat.py: what each client is told, what Redis holds then, and a fault at each await."""

import asyncio
from dataclasses import replace

import pytest
from fakes import World, settle, store_down
from seat_events import ANNA, BEN, GUEST, TEACHER, error, joined, seat, send, taken

from lesson_server.events.connection import PACE_BURST
from lesson_server.events.registry import EVENTS
from lesson_server.events.take_seat import PACE, TAKE_SEAT
from lesson_server.protocol.transport import TooMuchData

UNAVAILABLE = error("the lesson service is unavailable, try again")
NOT_JOINED = error("join the lesson first")
NOT_A_SEAT = error("take_seat takes a seat number or nothing")


async def take_seat(world, sid, *data):
    return await send(world, "take_seat", sid, *data)


@pytest.mark.gen_test
async def test_a_participant_takes_the_lowest_free_seat_or_a_seat_by_its_number():
    world = World()
    await joined(world, "a", ANNA)
    await joined(world, "b", BEN)
    assert await take_seat(world, "a") == seat(1)
    assert await take_seat(world, "b", {"seat": 3}) == seat(3)
    assert taken(world) == {1: "anna", 3: "ben"}
    assert await take_seat(world, "a", None) == seat(1)
    assert await take_seat(world, "a", {"seat": 2}) == seat(2)
    assert taken(world) == {2: "anna", 3: "ben"}
    assert world.seats.changes == [("1", 1, "anna"), ("1", 3, "ben"), ("1", 1, None), ("1", 2, "anna")]


@pytest.mark.gen_test
async def test_the_steps_are_one_read_of_the_session_and_one_call_of_redis():
    world = World()
    await joined(world, "a", ANNA)
    world.faults.passed.clear()
    await take_seat(world, "a")
    assert world.faults.passed == ["sockets.get_session #2", "seats.take", "seats.take, done"]


@pytest.mark.parametrize(
    ("auth", "refusal"),
    [
        (GUEST, "access token is required"),
        (TEACHER, "only a participant takes a seat"),
    ],
    ids=["guest", "teacher"],
)
@pytest.mark.parametrize("data", [(), ({"seat": 1},), ("nonsense",)], ids=repr)
@pytest.mark.gen_test
async def test_only_a_participant_with_a_token_who_has_joined_takes_a_seat(auth, refusal, data):
    """The client is checked before the data, in the order of the contract."""
    world = World()
    for sid, who in (("other", auth), ("a", ANNA)):
        await world.connect(sid, who)
        assert await take_seat(world, sid, *data) == NOT_JOINED
    await world.join("other")
    assert await take_seat(world, "other", *data) == error(refusal)
    assert taken(world) == {}


@pytest.mark.gen_test
async def test_a_join_that_is_under_way_or_has_failed_is_none():
    world = World()
    await world.connect("a", ANNA)
    hold = world.faults.hold_at("presence.write")
    join = asyncio.create_task(world.join("a"))
    await hold.reached.wait()
    early = asyncio.create_task(take_seat(world, "a"))  # waits for the running step
    await settle()
    hold.release(store_down())
    assert (await join)["status"] == "ERROR"
    assert await early == NOT_JOINED
    assert await take_seat(world, "a") == NOT_JOINED
    assert taken(world) == {}


@pytest.mark.parametrize(
    "data",
    [
        ("x",), (1,), ([],), ({},), ({"seat": "1"},), ({"seat": None},), ({"seat": 1.5},), ({"seat": True},),
        ({"seat": 1, "row": 2},), ({"chair": 1},), (None, None), ({"seat": 1}, {"seat": 2}), (TooMuchData(),),
    ],
    ids=lambda data: repr(data).partition(" object at ")[0],  # the same in each process of pytest-xdist
)  # fmt: skip
@pytest.mark.gen_test
async def test_data_that_is_neither_nothing_nor_a_seat_number_is_refused(data):
    world = World()
    await joined(world, "a", ANNA)
    assert await take_seat(world, "a", *data) == NOT_A_SEAT
    assert taken(world) == {}


@pytest.mark.gen_test
async def test_a_seat_that_cannot_be_had_is_refused_by_its_reason():
    world = World()
    await joined(world, "a", ANNA)
    await joined(world, "b", BEN)
    await joined(world, "none", {**ANNA, "lesson_id": "0"})
    await joined(world, "full", {**ANNA, "lesson_id": "2"})
    world.redis.hset("lesson_seat_2", {"1": "cem", "2": "dora"})
    await take_seat(world, "a", {"seat": 2})
    assert await take_seat(world, "b", {"seat": 2}) == error("seat 2 is taken")
    for number in (4, 0, -1):
        assert await take_seat(world, "b", {"seat": number}) == error(f"seat {number} does not exist")
    assert await take_seat(world, "full") == error("the lesson is full")
    for data in ((), ({"seat": 1},)):
        assert await take_seat(world, "none", *data) == error("the lesson has no seats")
    assert taken(world) == {2: "anna"}
    assert counted(world) == {
        "success": 1, "seat_is_taken": 1, "no_such_seat": 3, "lesson_full": 1, "no_seats": 2,
    }  # fmt: skip


def counted(world):
    """The participants' takes by outcome."""
    outcomes = world.metrics.outcomes()
    return {
        outcome: count for (event, client, outcome), count in outcomes.items()
        if (event, client) == ("take_seat", "participant") and count
    }  # fmt: skip


# Faults


@pytest.mark.parametrize("point", ["sockets.get_session #2", "seats.take", "seats.take, done"])
@pytest.mark.gen_test
async def test_an_error_at_any_await_is_answered_and_the_client_may_try_again(point):
    world = World()
    await joined(world, "a", ANNA)
    world.faults.fail_at(point, store_down())
    assert await take_seat(world, "a") == UNAVAILABLE
    assert await take_seat(world, "a") == seat(1)
    assert taken(world) == {1: "anna"}


@pytest.mark.parametrize("point", ["sockets.get_session #2", "seats.take", "seats.take, done"])
@pytest.mark.gen_test
async def test_a_hang_at_any_await_is_answered(point):
    world = World(events=[*EVENTS[:1], replace(TAKE_SEAT, deadline=0.005)])
    await joined(world, "a", ANNA)
    world.faults.hang_at(point)
    assert await take_seat(world, "a") == UNAVAILABLE
    assert await take_seat(world, "a") == seat(1)


@pytest.mark.parametrize("point", ["seats.take", "seats.take, done"])
@pytest.mark.gen_test
async def test_a_disconnect_at_any_await_waits_for_the_take(point):
    """So what the take has written is there when the grace of the seat begins."""
    world = World()
    await joined(world, "a", ANNA)
    hold = world.faults.hold_at(point)
    taking = asyncio.create_task(take_seat(world, "a"))
    await hold.reached.wait()
    end = asyncio.create_task(world.disconnect("a"))
    await settle()
    assert not end.done()
    assert "presence.remove" not in world.faults.passed
    hold.release()
    await end
    await taking
    assert taken(world) == {1: "anna"}
    assert world.gateway.connections == {}


@pytest.mark.gen_test
async def test_two_takes_of_the_same_seat_at_once_are_one():
    world = World()
    await joined(world, "a", ANNA)
    hold = world.faults.hold_at("seats.take")
    first, same, other = (asyncio.create_task(take_seat(world, "a", {"seat": number})) for number in (2, 2, 3))
    await hold.reached.wait()
    await settle()
    hold.release()
    assert [await task for task in (first, same, other)] == [seat(2), seat(2), seat(3)]
    assert world.faults.passed.count("seats.take #2") == 1
    assert "seats.take #3" not in world.faults.passed


# A reconnect, and a loss of data


@pytest.mark.gen_test
async def test_a_reconnect_finds_the_seat():
    world = World()
    await joined(world, "a", ANNA)
    await take_seat(world, "a", {"seat": 2})
    await world.disconnect("a")
    await joined(world, "b", ANNA)
    assert world.gateway.connections["b"].seat == 2
    assert await take_seat(world, "b") == seat(2)


@pytest.mark.parametrize("reconnects", [False, True])
@pytest.mark.gen_test
async def test_a_seat_that_redis_has_lost_is_written_again(reconnects):
    world = World()
    await joined(world, "a", ANNA)
    await joined(world, "b", BEN)
    await take_seat(world, "a", {"seat": 3})
    if reconnects:
        await world.disconnect("a")
        await joined(world, "a", ANNA)
    world.redis.flushall()
    assert await world.gateway.restore(["a", "b"]) == 2
    assert taken(world) == {3: "anna"}
    assert [connection.seat for connection in world.gateway.connections.values()].count(3) == 1


@pytest.mark.gen_test
async def test_a_seat_that_somebody_else_has_meanwhile_is_lost():
    world = World()
    await joined(world, "a", ANNA)
    await joined(world, "b", BEN)
    await take_seat(world, "a", {"seat": 3})
    world.redis.flushall()
    assert await take_seat(world, "b", {"seat": 3}) == seat(3)
    await world.gateway.restore(["a"])
    assert taken(world) == {3: "ben"}
    assert world.gateway.connections["a"].seat == 0


@pytest.mark.gen_test
async def test_what_another_connection_of_the_person_did_counts():
    world = World()
    await joined(world, "tab 1", ANNA)
    await take_seat(world, "tab 1", {"seat": 1})
    await joined(world, "tab 2", ANNA)
    await take_seat(world, "tab 2", {"seat": 2})
    assert await take_seat(world, "tab 1") == seat(2)
    await send(world, "leave_seat", "tab 2")
    await world.gateway.restore(["tab 1", "tab 2"])
    assert taken(world) == {}


@pytest.mark.gen_test
async def test_a_restore_that_fails_is_tried_again_with_the_same_seat():
    world = World()
    await joined(world, "a", ANNA)
    await take_seat(world, "a", {"seat": 3})
    world.redis.flushall()
    world.faults.fail_at("seats.restore", store_down())
    with pytest.raises(type(store_down())):
        await world.gateway.restore(["a"])
    await world.gateway.restore(["a"])
    assert taken(world) == {3: "anna"}


# The pace


@pytest.mark.gen_test
async def test_a_client_that_sends_without_end_is_slowed_down_after_a_burst(monkeypatch):
    """Each change is told to everybody in the room."""
    waits, sleep = [], asyncio.sleep

    async def note(seconds):
        if seconds:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("lesson_server.events.connection.asyncio.sleep", note)
    world = World()
    await joined(world, "a", ANNA)
    for number in range(PACE_BURST + 3):
        assert await take_seat(world, "a", {"seat": 1 + number % 2}) == seat(1 + number % 2)
    assert 1 <= len(waits) <= 3
    assert max(waits) <= 3 * PACE


@pytest.mark.gen_test
async def test_the_wait_for_a_turn_counts_towards_the_deadline():
    world = World(events=[*EVENTS[:1], replace(TAKE_SEAT, deadline=0.02, pace=1_000.0)])
    await joined(world, "a", ANNA)
    answers = [await take_seat(world, "a") for _ in range(PACE_BURST + 1)]
    assert answers == [seat(1)] * PACE_BURST + [UNAVAILABLE]
