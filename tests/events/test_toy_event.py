"""An event that only the tests know is served, counted and drawn by what serves, counts and draws every event.

Its chart is in the generated tests too: ``tests/statecharts/test_charts.py``.
"""

import asyncio
from dataclasses import replace

import pytest
import toy_chart
from clients import SUCCESS, client, error, join
from fakes import World, settle
from toy_event import RAISE_HAND, REASONS, RaiseHand
from waiting import until

from lesson_server.events.registry import EVENTS
from statecharts import export

WITH_TOY = (*EVENTS, RAISE_HAND)
PARTICIPANT = {"client": "participant", "lesson_id": "1", "access_token": "student:p-1"}


def test_real_clients_are_served_and_counted(io_loop, start_server, mint):
    server = start_server(events=WITH_TOY)
    io_loop.run_sync(lambda: story(server, mint))


async def story(server, mint):
    async with (
        client(server, client="participant", lesson_id="1", access_token=mint()) as sio,
        client(server, client="teacher", lesson_id="1", access_token=mint("t1", "teacher")) as teacher,
    ):
        assert await sio.call("raise_hand", "a question") == error("join the lesson first")
        assert await join(sio) == SUCCESS
        assert await sio.call("raise_hand") == error("raise_hand takes a reason")
        assert await sio.call("raise_hand", "a question") == {"status": "SUCCESS", "data": {"reason": "a question"}}
        assert await sio.call("raise_hand", "another") == {"status": "SUCCESS", "data": {"reason": "another"}}
        assert await teacher.call("raise_hand", "mine") == error("a teacher can't send raise_hand")
        assert {sio.get_sid(): "another"} == REASONS
        seen = server._metrics_text().decode().splitlines()
        for line in (
            'lesson_connections{client="participant",event="raise_hand",state="hand_raised"} 1.0',
            'lesson_connections{client="participant",event="join_lesson",state="registered"} 1.0',
            'lesson_events_total{client="participant",event="raise_hand",outcome="success"} 2.0',
            'lesson_events_total{client="participant",event="raise_hand",outcome="not_joined"} 1.0',
            'lesson_events_total{client="teacher",event="raise_hand",outcome="not_allowed"} 1.0',
            'lesson_step_seconds_count{event="raise_hand",step="keep_reason"} 2.0',
        ):
            assert line in seen
    await until(lambda: not REASONS)  # the end of the connection is the end of its regions


def test_its_chart_is_drawn(tmp_path, capsys):
    pytest.importorskip("pygraphviz", exc_type=ImportError)
    export.write([toy_chart], tmp_path)
    assert export.check([toy_chart], tmp_path) == 0
    mermaid = (tmp_path / "raise_hand" / "participant.mmd").read_text()
    assert "    hand_down --> hand_raised : raise_hand<br/>check_joined<br/>keep_reason\n" in mermaid
    assert (tmp_path / "raise_hand" / "participant.svg").read_text().startswith("<?xml")


async def joined(world: World) -> RaiseHand:
    await world.connect("sid", PARTICIPANT)
    await world.join("sid")
    return world.gateway.connections["sid"].region(RaiseHand)


@pytest.mark.gen_test
async def test_a_second_event_with_other_data_waits_for_the_first():
    world = World(events=WITH_TOY)
    await joined(world)
    hold = world.faults.hold_at("sockets.get_session #2")
    first, second, same = (
        asyncio.ensure_future(world.sockets.handlers["raise_hand"]("sid", reason)) for reason in ("one", "two", "one")
    )
    await hold.reached.wait()
    await settle()
    assert world.faults.passed.count("sockets.get_session #3") == 0
    hold.release()
    answers = [(await task)["data"]["reason"] for task in (first, second, same)]
    assert answers == ["one", "two", "one"]
    assert REASONS.pop("sid") == "two"
    assert "sockets.get_session #4" not in world.faults.passed  # the first and the third were one


@pytest.mark.gen_test
async def test_the_time_that_an_event_waits_for_another_counts_towards_its_deadline():
    world = World(events=(*EVENTS, replace(RAISE_HAND, deadline=0.02)))
    await joined(world)
    for point in ("sockets.get_session #2", "sockets.get_session #3"):
        world.faults.hang_at(point)
    async with asyncio.timeout(5):
        answers = await asyncio.gather(
            *(world.sockets.handlers["raise_hand"]("sid", reason) for reason in ("one", "two"))
        )
    assert [answer["status"] for answer in answers] == ["ERROR", "ERROR"]


@pytest.mark.gen_test
async def test_an_event_that_nobody_sends_costs_a_connection_nothing():
    world = World(events=WITH_TOY)
    region = await world.connect("sid", PARTICIPANT)
    await world.join("sid")
    assert list(region.connection) == [region]
    assert dict(world.gateway.count_states())["raise_hand", "participant", "hand_down"] == 1


@pytest.mark.gen_test
async def test_the_end_of_a_connection_is_the_end_of_all_its_regions_and_redis_lost_only_what_was_there():
    world = World(events=WITH_TOY)
    region = await joined(world)
    await world.sockets.handlers["raise_hand"]("sid", "one")
    assert await world.gateway.restore(["sid"]) == 1  # the chart of the toy has nothing to restore
    await world.disconnect("sid")
    assert {other.state for other in region.connection} == {"disconnected"}
    assert REASONS == {}


def test_every_chart_is_that_of_an_event_of_the_registry():
    charts = {(chart.EVENT, chart.CLIENT) for chart in export.find_charts()}
    assert charts == {(event.name, client) for event in EVENTS for client in event.regions}
