"""join_lesson.py: each story of a join, and what becomes of it when something happens at one of its awaits.

The awaits are not listed here: each story is first told without a fault, and the points that it passed are the table of
the tests below. They go through the gateway, for what counts is what the client is told and what is left afterwards.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from fakes import World, run, settle, store_down

from lesson_server.errors import InvalidTransition
from lesson_server.events.connection import HISTORY_LENGTH
from lesson_server.events.event import Event
from lesson_server.events.join_lesson import JOIN_LESSON, Join
from lesson_server.events.registry import EVENTS

SUCCESS = {"status": "SUCCESS", "data": {}}
UNAVAILABLE = {"status": "ERROR", "message": "the lesson service is unavailable, try again"}
INTERNAL_ERROR = {"status": "ERROR", "message": "internal error"}

SEATS = {"1": "", "2": "", "3": ""}
TO_SEATED = [
    "lessons.get",
    "sockets.enter_room",
    "sockets.get_session",
    "sockets.save_session",
    "seats.ensure_map",
]


@dataclass(frozen=True)
class Story:
    """Who joins, and what a join that meets no fault does.

    ``arrows`` are the calls to the services, in order; ``session`` and ``hashes`` what they leave behind.
    """

    auth: dict[str, object]
    arrows: list[str]
    state: str
    session: dict[str, object]
    hashes: dict[str, dict[str, str]]
    before: dict[str, dict[str, str]] = field(default_factory=dict)
    reconnects: list[tuple[str, str, str, str]] = field(default_factory=list)
    trust_teacher_user_id: bool = False

    def world(self, events: Sequence[Event] = EVENTS) -> World:
        world = World(trust_teacher_user_id=self.trust_teacher_user_id, events=events)
        for key, fields in self.before.items():
            world.redis.hset(key, fields)
        return world


PARTICIPANT = Story(
    auth={"client": "participant", "lesson_id": "1", "access_token": "student:p-1"},
    arrows=[*TO_SEATED, "sockets.save_session #2", "presence.write"],
    state="registered",
    session={"seat": 3, "client_id": "p-1", "role": "student"},
    hashes={
        "lesson_seat_1": SEATS,
        "p-1": {"sid": "sid", "client_id": "p-1", "role": "student"},
        "lesson_student_1": {"p-1": "sid"},
    },
)
TEACHER = Story(
    auth={"client": "teacher", "lesson_id": "1", "access_token": "teacher:t-1"},
    arrows=[*TO_SEATED, "presence.write"],
    state="registered",
    session={"seat": 3},
    hashes={"lesson_seat_1": SEATS, "lesson_teacher_1": {"t-1": "sid"}, "t-1": {"lesson_id": "1"}},
)
STORIES = {
    "teacher": TEACHER,
    "trusted-teacher": Story(
        auth={"client": "teacher", "lesson_id": 1, "user_id": "t-1", "access_token": "expired"},
        arrows=TEACHER.arrows,
        state=TEACHER.state,
        session=TEACHER.session,
        hashes=TEACHER.hashes,
        trust_teacher_user_id=True,
    ),
    "participant": PARTICIPANT,
    "returning-participant": Story(
        auth=PARTICIPANT.auth,
        arrows=PARTICIPANT.arrows,
        state=PARTICIPANT.state,
        session=PARTICIPANT.session,
        hashes=PARTICIPANT.hashes,
        before={"p-1": {"sid": "sid-of-yesterday", "client_id": "p-1", "role": "student"}},
        reconnects=[("p-1", "sid", "1", "student")],
    ),
    "guest": Story(
        auth={"client": "participant", "lesson_id": "1"},
        arrows=TO_SEATED,
        state="seated",
        session={"seat": 3},
        hashes={"lesson_seat_1": SEATS},
    ),
    "guest-of-a-lesson-without-seats": Story(
        auth={"client": "participant", "lesson_id": "0", "access_token": None},
        arrows=TO_SEATED[:-1],
        state="seated",
        session={},
        hashes={},
    ),
}

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
    second = asyncio.create_task(region.fire("take_seat"))
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
        "take_seat → seated",
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


# At every await


def points_of(story: Story, tell: Callable[[World], object] = lambda world: world.join("sid")) -> list[str]:
    """The points that a story passes when it is told after the handshake."""

    async def tell_it() -> list[str]:
        world = story.world()
        await world.connect("sid", story.auth)
        await tell(world)
        return world.faults.passed

    return run(tell_it())


async def join_and_end(world: World) -> None:
    await world.join("sid")
    world.faults.passed.clear()
    await world.disconnect("sid")


def failing_at(point: str) -> Callable[[World], object]:
    async def join(world: World) -> None:
        world.faults.fail_at(point, store_down())
        await world.join("sid")
        del world.faults.passed[: world.faults.passed.index(point) + 1]

    return join


def cases(*rows: tuple[str, Story, tuple[str, ...]]) -> list[object]:
    return [pytest.param(story, *points, id="-".join((name, *points))) for name, story, points in rows]


EVERY_AWAIT = cases(*((name, story, (point,)) for name, story in STORIES.items() for point in points_of(story)))
EVERY_AWAIT_OF_THE_END = cases(
    *((name, story, (point,)) for name, story in STORIES.items() for point in points_of(story, join_and_end))
)
EVERY_AWAIT_OF_THE_WAY_BACK = cases(
    *(
        (name, story, (failed, point))
        for name, story in STORIES.items()
        for failed in points_of(story)
        for point in points_of(story, failing_at(failed))
    )
)

at_every_await = pytest.mark.parametrize(("story", "point"), EVERY_AWAIT)


def was_registered(region: Join) -> bool:
    return "register → registered" in region.history


def assert_connected_and_clean(world: World, region: Join) -> None:
    assert region.state == "connected"
    assert world.held_by("sid") == []


def assert_gone(world: World, region: Join) -> None:
    """Disconnected, holding nothing; only a connection that was registered is remembered by ``{client_id}``."""
    assert region.state == "disconnected"
    remembered = was_registered(region) and region.CHART.CLIENT == "participant"
    assert world.held_by("sid") == (["redis p-1"] if remembered else [])
    assert world.gateway.connections == {}


async def assert_joins_as_if_nothing_had_been(world: World, story: Story) -> None:
    assert await world.join("sid") == SUCCESS
    *holdings, reconnects = world.snapshot()
    assert holdings == [story.hashes, {"sid": story.session}, {str(story.auth["lesson_id"]): {"sid"}}]
    # A reconnect goes unreported when the answer to the write that found it was lost; one's own trace never is one.
    assert reconnects in ([], story.reconnects)


@at_every_await
@pytest.mark.parametrize(
    ("error", "answer"),
    [(store_down(), UNAVAILABLE), (RuntimeError("unforeseen"), INTERNAL_ERROR)],
    ids=["unavailable", "unforeseen"],
)
@pytest.mark.gen_test
async def test_an_error_at_any_await_leaves_nothing_and_the_client_may_try_again(story, point, error, answer):
    world = story.world()
    region = await world.connect("sid", story.auth)
    world.faults.fail_at(point, error)
    assert await world.join("sid") == answer
    assert_connected_and_clean(world, region)
    await assert_joins_as_if_nothing_had_been(world, story)


@at_every_await
@pytest.mark.gen_test
async def test_a_hang_at_any_await_is_answered_and_leaves_nothing(story, point):
    world = story.world(events=[replace(JOIN_LESSON, deadline=0.005)])
    region = await world.connect("sid", story.auth)
    world.faults.hang_at(point)
    assert await world.join("sid") == UNAVAILABLE
    assert_connected_and_clean(world, region)
    await assert_joins_as_if_nothing_had_been(world, story)


@at_every_await
@pytest.mark.gen_test
async def test_a_disconnect_at_any_await_waits_for_the_running_step_and_ends_the_join(story, point):
    world = story.world()
    region = await world.connect("sid", story.auth)
    hold = world.faults.hold_at(point)
    join = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    state = region.state
    end = asyncio.create_task(world.disconnect("sid"))
    await settle()
    assert (region.state, end.done(), join.done()) == (state, False, False)
    hold.release()
    await end
    # Of the join nothing but the running transition took place, and it only if its session outlived the transport.
    since = region.history[list(region.CHART.STATES).index(state) :]
    assert since[-1] == "disconnect → disconnected"
    assert len(since) <= 2
    assert await join == (SUCCESS if was_registered(region) else None)  # to nobody, but counted as what it was
    assert_gone(world, region)


@at_every_await
@pytest.mark.gen_test
async def test_a_disconnect_during_an_await_that_fails_gives_back_as_well(story, point):
    world = story.world()
    region = await world.connect("sid", story.auth)
    hold = world.faults.hold_at(point)
    join = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    end = asyncio.create_task(world.disconnect("sid"))
    await settle()
    hold.release(store_down())
    await end
    assert await join is None
    assert_gone(world, region)
    assert not was_registered(region)


@pytest.mark.parametrize(("story", "failed", "point"), EVERY_AWAIT_OF_THE_WAY_BACK)
@pytest.mark.gen_test
async def test_a_disconnect_on_the_way_back_ends_the_connection_and_nothing_is_left(story, failed, point):
    world = story.world()
    region = await world.connect("sid", story.auth)
    world.faults.fail_at(failed, store_down())
    hold = world.faults.hold_at(point)
    join = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    end = asyncio.create_task(world.disconnect("sid"))
    await settle()
    hold.release()
    await end
    assert await join == UNAVAILABLE  # it had failed before its client went
    assert_gone(world, region)


@pytest.mark.parametrize(("story", "failed", "point"), EVERY_AWAIT_OF_THE_WAY_BACK)
@pytest.mark.gen_test
async def test_an_error_on_the_way_back_is_logged_and_the_client_may_try_again(story, failed, point, caplog):
    """The answer is about what failed first, and the rest is given back."""
    world = story.world()
    region = await world.connect("sid", story.auth)
    world.faults.fail_at(failed, store_down())
    world.faults.fail_at(point, RuntimeError("unforeseen"))
    assert await world.join("sid") == UNAVAILABLE
    assert region.state == "connected"
    (record,) = caplog.records
    assert "sid" in record.getMessage()
    assert record.exc_info is not None
    await assert_joins_as_if_nothing_had_been(world, story)


@pytest.mark.parametrize(("story", "point"), EVERY_AWAIT_OF_THE_END)
@pytest.mark.gen_test
async def test_an_error_at_the_end_is_logged_and_the_connection_has_ended(story, point, caplog):
    """Whatever step of the end fails, the others are taken: one fault leaves one thing, not all."""
    world = story.world()
    region = await world.connect("sid", story.auth)
    await world.join("sid")
    world.faults.passed.clear()
    world.faults.fail_at(point, RuntimeError("unforeseen"))
    await world.disconnect("sid")
    assert region.state == "disconnected"
    assert world.gateway.connections == {}
    (record,) = caplog.records
    assert "sid" in record.getMessage()
    assert "sockets.leave_room" in world.faults.passed
    assert ("presence.remove" in world.faults.passed) == (story.state == "registered")
