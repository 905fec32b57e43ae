"""join_lesson.py: each story of a join, and what becomes of it when something happens at one of its awaits.

The awaits are not listed here: each story is first told without a fault, and the points that it passed are the table of
the tests below. They go through the gateway, for what counts is what the client is told and what is left afterwards.
"""

import asyncio

import pytest
from fakes import World, settle, store_down
from stories import PARTICIPANT, STORIES, SUCCESS, TEACHER, UNAVAILABLE

from lesson_server.errors import InvalidTransition
from lesson_server.events.connection import HISTORY_LENGTH

every_story = pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)


# Told without a fault


@every_story
@pytest.mark.gen_test
async def test_a_join_does_what_its_diagram_says(story):
    world = story.world()
    region = await world.connect("sid", story.auth)
    assert await world.join("sid") == SUCCESS
    assert region.state == story.state
    assert [point for point in world.faults.passed if ", done" not in point] == story.arrows
    assert world.snapshot() == (
        story.hashes,
        {"sid": story.session},
        {str(story.auth["lesson_id"]): {"sid"}},
        story.reconnects,
    )


@every_story
@pytest.mark.gen_test
async def test_joining_again_is_a_success_that_does_nothing(story):
    """Nothing is done twice, and it is no reconnect."""
    world = story.world()
    await world.connect("sid", story.auth)
    await world.join("sid")
    holdings, passed = world.snapshot(), list(world.faults.passed)
    assert await world.join("sid") == SUCCESS
    assert (world.snapshot(), world.faults.passed) == (holdings, passed)


@every_story
@pytest.mark.gen_test
async def test_the_end_gives_everything_back_but_the_memory_of_the_participant(story):
    """``{client_id}`` stays for its 24 h: that is how a reconnect is known. The seat map is the lesson's."""
    world = story.world()
    region = await world.connect("sid", story.auth)
    await world.join("sid")
    await world.disconnect("sid")
    assert region.state == "disconnected"
    assert world.redis.hashes == {key: story.hashes[key] for key in ("lesson_seat_1", "p-1") if key in story.hashes}
    assert world.sockets.rooms == {}


@pytest.mark.gen_test
async def test_a_reconnect_is_told_once_for_each_new_connection():
    world = PARTICIPANT.world()
    for sid in ("first", "second", "third"):
        await world.connect(sid, PARTICIPANT.auth)
        await world.join(sid)
        await world.join(sid)
        await world.disconnect(sid)
    assert world.analytics.reconnects == [("p-1", "second", "1", "student"), ("p-1", "third", "1", "student")]
    assert world.metrics.registry.get_sample_value("lesson_reconnects_total") == 2


@pytest.mark.gen_test
async def test_a_reconnect_tells_the_lesson_of_now_and_the_role_of_now():
    world = PARTICIPANT.world()
    await world.connect("first", PARTICIPANT.auth)
    await world.join("first")
    await world.connect("second", {"client": "participant", "lesson_id": "2", "access_token": "assistant:p-1"})
    await world.join("second")
    assert world.analytics.reconnects == [("p-1", "second", "2", "assistant")]


@pytest.mark.parametrize("story", [TEACHER, PARTICIPANT], ids=["teacher", "participant"])
@pytest.mark.gen_test
async def test_the_end_of_an_old_connection_takes_nothing_from_the_new_one(story):
    """A client comes back before the server has noticed that it was gone."""
    world = story.world()
    await world.connect("old", story.auth)
    await world.join("old")
    await world.connect("sid", story.auth)
    await world.join("sid")
    await world.disconnect("old")
    assert world.redis.hashes == story.hashes
    assert world.sockets.rooms == {"1": {"sid"}}


@pytest.mark.parametrize("point", ["lessons.get", "sockets.get_session", "seats.ensure_map", "presence.write"])
@pytest.mark.gen_test
async def test_a_failed_join_leaves_in_the_session_what_others_put_there(point):
    world = PARTICIPANT.world()
    await world.connect("sid", PARTICIPANT.auth)
    world.sockets.sessions["sid"]["theirs"] = 1
    world.faults.fail_at(point, store_down())
    assert await world.join("sid") == UNAVAILABLE
    assert world.sockets.sessions["sid"] == {"theirs": 1}
    await world.join("sid")
    assert world.sockets.sessions["sid"] == {"theirs": 1, **PARTICIPANT.session}


@pytest.mark.gen_test
async def test_a_failed_join_clears_the_session_also_when_the_library_hands_out_copies(monkeypatch):
    """It promises to keep what is saved, and not what is changed."""
    world = PARTICIPANT.world()
    get_session = world.sockets.get_session

    async def get_copy(sid):
        return dict(await get_session(sid))

    monkeypatch.setattr(world.sockets, "get_session", get_copy)
    await world.connect("sid", PARTICIPANT.auth)
    world.faults.fail_at("presence.write", store_down())
    assert await world.join("sid") == UNAVAILABLE
    assert world.sockets.sessions["sid"] == {}


# Who it is


@pytest.mark.parametrize(
    ("auth", "trust", "message"),
    [
        ({"client": "teacher"}, False, "access token is required"),
        ({"client": "teacher", "access_token": None}, False, "access token is required"),
        ({"client": "teacher", "access_token": ""}, False, "access token is invalid"),
        ({"client": "teacher", "access_token": "expired"}, False, "access token has expired"),
        ({"client": "teacher", "access_token": "forged"}, False, "access token is invalid"),
        ({"client": "teacher", "access_token": 0}, False, "access token is invalid"),
        ({"client": "teacher", "access_token": False}, False, "access token is invalid"),
        ({"client": "teacher", "access_token": ["teacher:t-1"]}, False, "access token is invalid"),
        ({"client": "teacher", "access_token": "student:t-1"}, False, "only a teacher can join as teacher"),
        ({"client": "teacher", "user_id": "t-1"}, False, "access token is required"),
        ({"client": "teacher"}, True, "access token is required"),
        ({"client": "teacher", "user_id": "lesson_seat_1"}, True, "access token is invalid"),
        ({"client": "teacher", "user_id": ""}, True, "access token is invalid"),
        ({"client": "teacher", "user_id": 7}, True, "access token is invalid"),
        ({"client": "participant", "access_token": "expired"}, False, "access token has expired"),
        ({"client": "participant", "access_token": "forged"}, False, "access token is invalid"),
        ({"client": "participant", "access_token": ""}, False, "access token is invalid"),
        ({"client": "participant", "access_token": {}}, False, "access token is invalid"),
    ],
)
@pytest.mark.gen_test
async def test_a_client_that_is_not_let_in_never_enters_the_room(auth, trust, message):
    world = World(trust_teacher_user_id=trust)
    region = await world.connect("sid", {"lesson_id": "1", **auth})
    assert await world.join("sid") == {"status": "ERROR", "message": message}
    assert region.state == "connected"
    assert "sockets.enter_room" not in world.faults.passed
    assert world.held_by("sid") == []


@pytest.mark.gen_test
async def test_an_unknown_lesson_is_reported_before_a_bad_token():
    world = World()
    await world.connect("sid", {"client": "teacher", "lesson_id": "nine", "access_token": "expired"})
    assert await world.join("sid") == {"status": "ERROR", "message": "lesson nine not found"}


@pytest.mark.parametrize("auth", [{"user_id": "p-9"}, {"user_id": "p-9", "access_token": "student:p-1"}])
@pytest.mark.gen_test
async def test_a_user_id_is_nothing_to_a_participant(auth):
    world = World(trust_teacher_user_id=True)
    await world.connect("sid", {"client": "participant", "lesson_id": "1", **auth})
    assert await world.join("sid") == SUCCESS
    assert "p-9" not in world.redis.hashes


@pytest.mark.gen_test
async def test_without_trust_the_token_counts_and_not_the_user_id():
    world = TEACHER.world()
    await world.connect("sid", {**TEACHER.auth, "user_id": "t-2"})
    assert await world.join("sid") == SUCCESS
    assert world.redis.hashes == TEACHER.hashes


# The one door


@pytest.mark.gen_test
async def test_a_second_trigger_waits_for_the_first():
    world = TEACHER.world()
    region = await world.connect("sid", TEACHER.auth)
    hold = world.faults.hold_at("lessons.get")
    first = asyncio.create_task(region.fire("validate_lesson"))
    second = asyncio.create_task(region.fire("seat"))
    await settle()
    assert world.faults.passed == ["lessons.get"]
    hold.release()
    assert [await first, await second] == [True, True]
    assert region.state == "seated"


@pytest.mark.gen_test
async def test_the_story_is_the_last_triggers_with_the_states_they_led_to():
    world = STORIES["guest"].world()
    region = await world.connect("sid", STORIES["guest"].auth)
    await world.join("sid")
    assert region.history == (
        "validate_lesson → lesson_validated",
        "seat → seated",
        "register → seated",
    )
    for _ in range(10):
        await region.fire("register")
    await region.fire("disconnect")
    assert len(region.history) == HISTORY_LENGTH
    assert region.history[-2:] == ("register → seated", "disconnect → disconnected")


@pytest.mark.gen_test
async def test_a_refused_trigger_tells_the_story():
    world = TEACHER.world()
    region = await world.connect("sid", TEACHER.auth)
    await region.fire("validate_lesson")
    with pytest.raises(InvalidTransition, match=r"can't register in state lesson_validated \(before: validate_lesson"):
        await region.fire("register")


@pytest.mark.gen_test
async def test_a_connection_is_shown_by_who_where_and_in_which_state_but_not_by_its_token():
    region = await TEACHER.world().connect("sid", TEACHER.auth)
    assert repr(region) == "<join_lesson of teacher sid lesson 1 connected>"
