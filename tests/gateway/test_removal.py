"""handlers.py: the removal of a person from a lesson closes all of the person's connections in this lesson."""

import asyncio

import pytest
from fakes import World, settle, store_down
from handshakes import GUEST, PARTICIPANT, TEACHER


async def in_lesson(world: World, sid: str, auth: dict[str, str]):
    join = await world.connect(sid, auth)
    assert (await world.join(sid))["status"] == "SUCCESS"
    return join


@pytest.mark.gen_test
async def test_every_connection_of_the_person_in_the_lesson_is_closed_and_no_other():
    world = World()
    removed = [await in_lesson(world, sid, PARTICIPANT) for sid in ("tab-1", "tab-2")]
    kept = [
        await in_lesson(world, "other-lesson", {**PARTICIPANT, "lesson_id": "2"}),
        await in_lesson(world, "other-person", {**PARTICIPANT, "access_token": "student:p-2"}),
        await in_lesson(world, "teacher", {**TEACHER, "access_token": "teacher:p-1"}),
        await in_lesson(world, "guest", GUEST),
    ]
    await world.gateway.remove("1", "participant", "p-1")
    assert sorted(world.sockets.closed) == ["tab-1", "tab-2"]
    assert all(join.has_ended for join in removed)
    assert not any(join.has_ended for join in kept)
    assert world.redis.hashes["lesson_student_1"] == {"p-2": "other-person"}
    assert not {"tab-1", "tab-2"} & world.sockets.rooms["1"]
    for sid in ("tab-1", "tab-2"):
        await world.disconnect(sid)  # the transport ends later
        assert set(world.held_by(sid)) <= {"redis p-1"}  # known for 24 h, as after any end
    assert world.gateway.connections.keys() == {"other-lesson", "other-person", "teacher", "guest"}


@pytest.mark.gen_test
async def test_a_teacher_is_removed_by_the_user_id():
    world = World()
    await in_lesson(world, "sid", TEACHER)
    await world.gateway.remove("1", "participant", "t-1")
    assert world.sockets.closed == []
    await world.gateway.remove("1", "teacher", "t-1")
    assert world.sockets.closed == ["sid"]
    assert "lesson_teacher_1" not in world.redis.hashes


@pytest.mark.gen_test
async def test_a_join_under_way_ends_without_an_answer():
    world = World()
    hold = world.faults.hold_at("seats.ensure_map")
    await world.connect("sid", PARTICIPANT)
    join = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    removal = asyncio.create_task(world.gateway.remove("1", "participant", "p-1"))
    await settle()
    assert not removal.done()  # it waits for the transition that runs
    hold.release()
    await removal
    assert await join is None
    assert world.sockets.closed == ["sid"]
    assert world.presence.written == []
    assert "1" not in world.sockets.rooms


@pytest.mark.gen_test
async def test_a_connection_whose_join_has_failed_is_closed_too():
    world = World()
    world.faults.fail_at("seats.ensure_map", store_down())
    await world.connect("sid", PARTICIPANT)
    assert (await world.join("sid"))["status"] == "ERROR"
    await world.gateway.remove("1", "participant", "p-1")
    assert world.sockets.closed == ["sid"]


@pytest.mark.gen_test
async def test_while_redis_is_down_the_connection_is_closed_and_the_removal_of_its_presence_is_pending():
    world = World()
    await in_lesson(world, "sid", PARTICIPANT)
    world.faults.fail_at("presence.remove", store_down())
    await world.gateway.remove("1", "participant", "p-1")
    assert world.sockets.closed == ["sid"]
    world.presence.retry()
    assert "lesson_student_1" not in world.redis.hashes
