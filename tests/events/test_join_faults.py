"""join_lesson.py when something happens at one of its awaits: an error, a hang, a disconnect, on the way back too."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from fakes import World, run, settle, store_down
from stories import STORIES, SUCCESS, UNAVAILABLE, Story

from lesson_server.events.join_lesson import JOIN_LESSON, Join

INTERNAL_ERROR = {"status": "ERROR", "message": "internal error"}


def points_of(story: Story, tell: Callable[[World], Awaitable[object]] = lambda world: world.join("sid")) -> list[str]:
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


def failing_at(point: str) -> Callable[[World], Awaitable[object]]:
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
