"""connection.py: what waits for the lock of a connection when its client goes."""

import asyncio
from typing import Any

import pytest
from fakes import Faults, World, settle
from joins import join_of

ANNA = {"client": "participant", "lesson_id": "1", "access_token": "student:anna"}


async def gone(world: World, *events: "asyncio.Future[Any]") -> None:
    """The client goes while events are under way; all that is held up goes on, and everything ends."""
    connection = world.gateway.connections["sid"]
    ending = asyncio.ensure_future(world.disconnect("sid"))
    await settle()
    assert not ending.done()
    for hold in world.faults._holds.values():
        hold.release()
    await asyncio.gather(ending, *events)
    assert world.held_by("sid") in ([], ["redis anna"])  # {client_id} outlives the connection
    assert join_of(connection).state == "disconnected"


@pytest.mark.parametrize("running", ["leave_seat", "join_lesson"])
@pytest.mark.gen_test
async def test_an_event_that_waits_when_the_client_goes_comes_before_the_end(running, caplog):
    world = World(faults=Faults())
    await world.connect("sid", ANNA)
    if running == "leave_seat":
        await world.join("sid")
    hold = world.faults.hold_at("seats.leave" if running == "leave_seat" else "presence.write, done")
    first = asyncio.ensure_future(world.sockets.handlers[running]("sid"))
    await hold.reached.wait()
    taking = asyncio.ensure_future(world.sockets.handlers["take_seat"]("sid"))
    await settle()
    await gone(world, first, taking)
    assert world.seats.changes == [("1", 1, "anna")]  # free again after the grace, which begins with the end
    assert caplog.messages == []


@pytest.mark.gen_test
async def test_no_step_of_a_join_comes_between_the_ends_of_two_regions(caplog):
    world = World(faults=Faults())
    await world.connect("sid", ANNA)
    looking_up = world.faults.hold_at("lessons.get")
    ensuring = world.faults.hold_at("seats.ensure_map")
    joining = asyncio.ensure_future(world.join("sid"))
    await looking_up.reached.wait()
    taking = asyncio.ensure_future(world.sockets.handlers["take_seat"]("sid"))
    await settle()
    looking_up.release()
    await ensuring.reached.wait()
    await gone(world, joining, taking)
    assert world.presence.written == []
    assert caplog.messages == []
