"""leave_seat.py: what each client is told, what Redis holds then, and a fault at each await."""

import pytest
from fakes import World, store_down
from seat_events import ANNA, BEN, GUEST, TEACHER, error, joined, seat, send, taken

SUCCESS = {"status": "SUCCESS", "data": {}}
UNAVAILABLE = error("the lesson service is unavailable, try again")
NOT_JOINED = error("join the lesson first")


async def leave_seat(world, sid, *data):
    return await send(world, "leave_seat", sid, *data)


@pytest.mark.gen_test
async def test_a_participant_leaves_the_seat_and_there_may_be_none_to_leave():
    world = World()
    await joined(world, "a", ANNA)
    await joined(world, "b", BEN)
    assert await leave_seat(world, "a") == SUCCESS
    for sid in ("a", "b"):
        await send(world, "take_seat", sid)
    assert await leave_seat(world, "a") == await leave_seat(world, "a", None) == SUCCESS
    assert taken(world) == {2: "ben"}
    assert world.seats.changes == [("1", 1, "anna"), ("1", 2, "ben"), ("1", 1, None)]
    assert await send(world, "take_seat", "a") == seat(1)


@pytest.mark.parametrize(
    ("auth", "refusal"),
    [(GUEST, "access token is required"), (TEACHER, "only a participant takes a seat")],
    ids=["guest", "teacher"],
)
@pytest.mark.parametrize("data", [(), ("nonsense",)], ids=repr)
@pytest.mark.gen_test
async def test_only_a_participant_with_a_token_who_has_joined_leaves_a_seat(auth, refusal, data):
    world = World()
    for sid, who in (("other", auth), ("a", ANNA)):
        await world.connect(sid, who)
        assert await leave_seat(world, sid, *data) == NOT_JOINED
    await world.join("other")
    assert await leave_seat(world, "other", *data) == error(refusal)


@pytest.mark.parametrize("data", [({},), ({"seat": 1},), (0,), (None, None)], ids=repr)
@pytest.mark.gen_test
async def test_data_is_refused(data):
    world = World()
    await joined(world, "a", ANNA)
    await send(world, "take_seat", "a")
    assert await leave_seat(world, "a", *data) == error("leave_seat takes no data")
    assert taken(world) == {1: "anna"}


@pytest.mark.parametrize("point", ["sockets.get_session #3", "seats.leave", "seats.leave, done"])
@pytest.mark.gen_test
async def test_an_error_at_any_await_is_answered_and_the_client_may_try_again(point):
    world = World()
    await joined(world, "a", ANNA)
    await send(world, "take_seat", "a")
    world.faults.fail_at(point, store_down())
    assert await leave_seat(world, "a") == UNAVAILABLE
    assert await leave_seat(world, "a") == SUCCESS
    assert taken(world) == {}


@pytest.mark.gen_test
async def test_a_seat_that_was_left_is_not_written_again_after_a_loss_of_data():
    world = World()
    await joined(world, "a", ANNA)
    await send(world, "take_seat", "a")
    await leave_seat(world, "a")
    world.redis.flushall()
    await world.gateway.restore(["a"])
    assert taken(world) == {}
