"""tracing.py: what happens on a connection, told to whoever asks for it on any node, and to nobody else."""

import asyncio
import contextlib
from functools import partial
from typing import Any

import pytest
from buses import Bus
from clock import Clock
from fakes import World, settle, store_down
from handshakes import GUEST, PARTICIPANT, TEACHER
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.events.machine import ChartMachine
from lesson_server.gateway import tracing as tracing_module
from lesson_server.gateway.tracing import CONTINUES, Tracing
from statecharts.join_lesson import participant as chart

STEPS: Any = {row["trigger"]: row["before"] for row in chart.TRANSITIONS if row["trigger"] in chart.PATH}


class Node:
    def __init__(self, bus):
        self.world = World()
        self.tracing = Tracing(self.world.gateway, bus.node())


class Viewer:
    """Reads a trace."""

    def __init__(self, tracing, sid):
        self.events = []
        self.task = asyncio.create_task(self._read(tracing, sid))

    async def _read(self, tracing, sid):
        async with contextlib.aclosing(tracing.events(sid)) as events:
            async for event in events:
                self.events.append(event)

    async def ready(self):
        await until(lambda: ("ready", {}) in self.events)
        self.events.clear()

    async def leave(self):
        self.task.cancel()
        await asyncio.wait([self.task])

    def told(self):
        """Steps and states in order, without their times."""
        return [
            event[1]["step"] if event[0] == "step" else event[1]["state"] for event in self.events if event is not None
        ]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """What is left of intervals is short; how old a request is, the test decides."""
    clock = Clock()
    monkeypatch.setattr(tracing_module, "LIFE_INTERVAL", 0.01)
    monkeypatch.setattr(tracing_module, "time", clock)
    return clock


@pytest.fixture
def bus():
    return Bus()


async def nothing_is_left(*nodes):
    """Neither a task, nor a queue, nor a machine."""
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    await asyncio.sleep(0)  # for the callbacks of the tasks that have ended
    for node in nodes:
        assert not node.tracing._traces
        assert not node.tracing._tasks
        assert not node.tracing._taps
        for connection in node.world.gateway.connections.values():
            assert connection.machines is node.world.gateway._machines
            for region in connection:
                assert type(region.machine) is ChartMachine


# What is told


@pytest.mark.parametrize("asked", ["here", "there"])
@pytest.mark.gen_test
async def test_a_join_is_told_step_by_step_whichever_node_is_asked(bus, asked):
    nodes = {"here": Node(bus), "there": Node(bus)}
    world = nodes["here"].world
    await world.connect("sid", PARTICIPANT)
    viewer = Viewer(nodes[asked].tracing, "sid")
    await viewer.ready()
    assert (await world.join("sid"))["status"] == "SUCCESS"
    expected = [
        told for trigger, state in zip(chart.PATH, [*STATES_OF_JOIN], strict=True) for told in (*STEPS[trigger], state)
    ]
    await until(lambda: len(viewer.told()) >= len(expected))
    assert viewer.told() == expected
    events = [event for event in viewer.events if event is not None]
    for name, data in events:
        assert (data["event"], data["client"]) == ("join_lesson", "participant")
        if name == "step":
            assert data.keys() == {"event", "client", "trigger", "step", "seconds", "error"}
            assert data["error"] is None
            assert 0 <= data["seconds"] < 1
        else:
            assert data.keys() == {"event", "client", "trigger", "state"}
    await viewer.leave()
    await nothing_is_left(*nodes.values())


STATES_OF_JOIN = ("lesson_validated", "seated", "registered")


@pytest.mark.gen_test
async def test_a_guest_stays_seated(bus):
    node = Node(bus)
    await node.world.connect("sid", GUEST)
    viewer = Viewer(node.tracing, "sid")
    await viewer.ready()
    await node.world.join("sid")
    await until(lambda: viewer.told().count("seated") == 2)
    assert viewer.events[-1] is None or viewer.told()[-1] == "seated"
    await viewer.leave()
    await nothing_is_left(node)


@pytest.mark.gen_test
async def test_a_refused_step_is_told_with_its_sentence_and_what_cleans_up_has_not_failed(bus):
    node = Node(bus)
    await node.world.connect("sid", {**PARTICIPANT, "lesson_id": "404"})
    viewer = Viewer(node.tracing, "sid")
    await viewer.ready()
    answer = await node.world.join("sid")
    assert answer["status"] == "ERROR"
    await until(lambda: viewer.told() == ["check_lesson_exists", "leave_room", "connected"])
    steps = [data for name, data in filter(None, viewer.events) if name == "step"]
    assert steps[0]["error"] == answer["message"]
    assert steps[1]["error"] is None
    await viewer.leave()
    await nothing_is_left(node)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LookupError("SELECT secret"), "internal error"),
        (store_down(), "the lesson service is unavailable, try again"),
    ],
    ids=["defect", "outage"],
)
@pytest.mark.gen_test
async def test_internals_are_not_told(bus, error, sentence):
    node = Node(bus)
    node.world.faults.fail_at("lessons.get", error)
    await node.world.connect("sid", PARTICIPANT)
    viewer = Viewer(node.tracing, "sid")
    await viewer.ready()
    await node.world.join("sid")
    await until(lambda: "connected" in viewer.told())
    (name, step) = next(filter(None, viewer.events))
    assert (name, step["step"], step["error"]) == ("step", "check_lesson_exists", sentence)
    await viewer.leave()
    await nothing_is_left(node)


@pytest.mark.gen_test
async def test_a_trace_that_begins_in_the_middle_of_a_join_tells_the_rest(bus):
    node = Node(bus)
    hold = node.world.faults.hold_at("seats.ensure_map")
    await node.world.connect("sid", PARTICIPANT)
    join = asyncio.create_task(node.world.join("sid"))
    await hold.reached.wait()
    viewer = Viewer(node.tracing, "sid")
    await viewer.ready()
    hold.release()
    assert (await join)["status"] == "SUCCESS"
    await until(lambda: "registered" in viewer.told())
    assert viewer.told()[-len(STEPS["register"]) - 1 :] == [*STEPS["register"], "registered"]
    await viewer.leave()
    await nothing_is_left(node)


@pytest.mark.gen_test
async def test_another_connection_is_not_told(bus):
    node = Node(bus)
    await node.world.connect("sid", PARTICIPANT)
    await node.world.connect("other", TEACHER)
    viewer = Viewer(node.tracing, "sid")
    await viewer.ready()
    await node.world.join("other")
    await settle()
    assert viewer.told() == []
    await viewer.leave()
    await nothing_is_left(node)


@pytest.mark.gen_test
async def test_the_counts_and_the_step_metrics_stay_right(bus):
    traced, plain = Node(bus), Node(bus)
    for world in (traced.world, plain.world):
        await world.connect("sid", PARTICIPANT)
    viewer = Viewer(traced.tracing, "sid")
    other = Viewer(traced.tracing, "sid")
    await viewer.ready()
    await other.ready()

    def alike():
        assert list(traced.world.gateway.count_states()) == list(plain.world.gateway.count_states())
        counts = []
        for world in (traced.world, plain.world):
            (family,) = world.metrics.step_seconds.collect()
            counts.append({tuple(s.labels.values()): s.value for s in family.samples if s.name.endswith("_count")})
        assert counts[0] == counts[1]

    alike()
    for world in (traced.world, plain.world):
        await world.join("sid")
    alike()
    await viewer.leave()
    await other.leave()
    await nothing_is_left(traced)
    alike()
    for world in (traced.world, plain.world):
        await world.disconnect("sid")
    alike()
    assert sum(count for _, count in traced.world.gateway.count_states()) == 0


@pytest.mark.gen_test
async def test_two_viewers_of_a_connection_are_told_the_same(bus):
    node = Node(bus)
    await node.world.connect("sid", PARTICIPANT)
    viewers = [Viewer(node.tracing, "sid") for _ in range(3)]
    for viewer in viewers:
        await viewer.ready()
    await viewers[0].leave()
    await node.world.join("sid")
    for viewer in viewers[1:]:
        await until(partial(lambda viewer: "registered" in viewer.told(), viewer))
        assert len(viewer.told()) == sum(map(len, STEPS.values())) + 3
        await viewer.leave()
    await nothing_is_left(node)


# The end


@pytest.mark.gen_test
async def test_it_ends_with_the_connection_and_tells_of_the_end_before(bus):
    here, there = Node(bus), Node(bus)
    await here.world.connect("sid", PARTICIPANT)
    await here.world.join("sid")
    viewer = Viewer(there.tracing, "sid")
    await viewer.ready()
    hold = here.world.faults.hold_at("presence.remove")
    end = asyncio.create_task(here.world.disconnect("sid"))
    await hold.reached.wait()
    await asyncio.sleep(5 * tracing_module.LIFE_INTERVAL)  # the trace sees that the connection is gone
    hold.release()
    await end
    await asyncio.wait([viewer.task])
    assert viewer.told() == ["leave_room", "remove_presence", "disconnected"]
    await nothing_is_left(here, there)


@pytest.mark.gen_test
async def test_what_happened_while_the_wait_for_the_next_event_ended_is_told_before_the_end(bus, monkeypatch):
    """The wait may end in the same turn of the loop in which the last events come."""
    here, there = Node(bus), Node(bus)
    await here.world.connect("sid", PARTICIPANT)
    await here.world.join("sid")
    viewer = Viewer(there.tracing, "sid")
    await viewer.ready()
    following, late = tracing_module._next, []

    async def too_late(queue):
        if queue not in late and "sid" not in here.world.gateway.connections and not queue.empty():
            late.append(queue)
            return None
        return await following(queue)

    monkeypatch.setattr(tracing_module, "_next", too_late)
    await here.world.disconnect("sid")
    await asyncio.wait([viewer.task])
    assert late
    assert viewer.told() == ["leave_room", "remove_presence", "disconnected"]
    await nothing_is_left(here, there)


@pytest.mark.gen_test
async def test_nothing_is_left_on_either_node_when_the_viewer_has_gone(bus):
    """The connection is still there, and goes on."""
    here, there = Node(bus), Node(bus)
    await here.world.connect("sid", PARTICIPANT)
    viewer = Viewer(there.tracing, "sid")
    await viewer.ready()
    await viewer.leave()
    await nothing_is_left(here, there)
    published = len(bus.published)
    assert (await here.world.join("sid"))["status"] == "SUCCESS"
    await settle()
    assert len(bus.published) == published


@pytest.mark.gen_test
async def test_a_viewer_who_stays_is_told_also_after_a_while(bus, clock):
    here, there = Node(bus), Node(bus)
    await here.world.connect("sid", PARTICIPANT)
    viewer = Viewer(there.tracing, "sid")
    await viewer.ready()

    def answers():
        return [message.get("name") for message in bus.published].count(CONTINUES)

    for number in range(10):
        clock.now += tracing_module.TRACE_LIFE / 3
        await until(partial(lambda number: answers() > number, number))
        await settle()
    await here.world.join("sid")
    await until(lambda: "registered" in viewer.told())
    assert {event[0] for event in viewer.events if event is not None} == {"step", "state"}
    await viewer.leave()
    await nothing_is_left(here, there)


@pytest.mark.gen_test
async def test_a_trace_ends_when_the_node_of_its_viewer_has_died(bus, clock):
    here, there = Node(bus), Node(bus)
    await here.world.connect("sid", PARTICIPANT)
    viewer = Viewer(there.tracing, "sid")
    await viewer.ready()
    bus.nodes.clear()
    await viewer.leave()
    assert here.tracing._tasks
    clock.now += tracing_module.TRACE_LIFE
    await nothing_is_left(here, there)


@pytest.mark.gen_test
async def test_a_trace_of_nobody_ends(bus, clock):
    node = Node(bus)
    viewer = Viewer(node.tracing, "nobody")
    await until(lambda: None in viewer.events)  # the signs of life
    clock.now += tracing_module.TRACE_LIFE
    await asyncio.wait([viewer.task])
    assert set(viewer.events) == {None}
    await nothing_is_left(node)


@pytest.mark.gen_test
async def test_a_trace_ends_when_the_node_of_the_connection_has_died(bus, clock):
    here, there = Node(bus), Node(bus)
    await here.world.connect("sid", PARTICIPANT)
    viewer = Viewer(there.tracing, "sid")
    await viewer.ready()
    bus.nodes.remove(here.tracing._messages)
    await here.tracing.close()
    clock.now += tracing_module.TRACE_LIFE
    await asyncio.wait([viewer.task])
    await nothing_is_left(here, there)


@pytest.mark.gen_test
async def test_without_redis_there_is_no_trace(bus):
    node = Node(bus)
    await node.world.connect("sid", PARTICIPANT)
    bus.is_down = True
    with pytest.raises(StoreUnavailable):
        await anext(node.tracing.events("sid"))
    assert bus.refused
    await nothing_is_left(node)


@pytest.mark.gen_test
async def test_an_outage_ends_a_trace_and_the_connection_goes_on_without_a_queue(bus, clock):
    node = Node(bus)
    await node.world.connect("sid", PARTICIPANT)
    viewer = Viewer(node.tracing, "sid")
    await viewer.ready()
    bus.is_down = True
    assert (await node.world.join("sid"))["status"] == "SUCCESS"
    clock.now += tracing_module.REQUEST_INTERVAL
    await asyncio.wait([viewer.task])
    assert isinstance(viewer.task.exception(), StoreUnavailable)
    assert bus.refused
    await nothing_is_left(node)


@pytest.mark.gen_test
async def test_its_close_ends_all_traces(bus):
    here, there = Node(bus), Node(bus)
    await here.world.connect("sid", PARTICIPANT)
    viewer = Viewer(there.tracing, "sid")
    await viewer.ready()
    await here.tracing.close()
    assert not here.tracing._taps
    await viewer.leave()
    await there.tracing.close()
    await nothing_is_left(here, there)


def test_a_trace_outlives_two_lost_requests(monkeypatch):
    monkeypatch.undo()
    assert 3 * (tracing_module.REQUEST_INTERVAL + tracing_module.LIFE_INTERVAL) < tracing_module.TRACE_LIFE
    assert tracing_module.LIFE_INTERVAL == 1.0  # the page misses a sign of life after 4 s
