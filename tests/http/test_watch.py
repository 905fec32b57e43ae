"""watch.py: the figures of all nodes while somebody looks, and what the overview makes of them."""

import asyncio
import bisect
import math

import pytest
from buses import Bus
from fakes import World, settle
from handshakes import GUEST, PARTICIPANT
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.http import figures as figures_module
from lesson_server.http import watch as watch_module
from lesson_server.http.figures import FIGURES, SAMPLES, WATCH, Figures
from lesson_server.http.watch import Watch, percentile
from lesson_server.metrics import EVENT_BUCKETS
from lesson_server.status import Status
from lesson_server.stores.redis.roster import LessonCounts, Roster


class FakeRoster(Roster):
    """Yields the lessons that a test sets, or fails; counts how often it was read."""

    def __init__(self):
        self.found = [LessonCounts("1", 1, 2, 3, 1), LessonCounts("2", 0, 4, 5, 0)]
        self.error = None
        self.reads = 0
        self.failures = 0

    async def all_lessons(self, after=None, at_once=50):
        self.reads += 1
        if self.error is not None:
            self.failures += 1
            raise self.error
        for lesson in self.found:
            yield [lesson]


class Node:
    """A node on a bus, with a console."""

    def __init__(self, bus, node_id="node-1"):
        self.bus = bus
        self.world = World()
        self.roster = FakeRoster()
        self.redis = Status("up")
        self.own = Figures(
            self.world.gateway, self.world.metrics, {"Redis": lambda: self.redis}, lambda: node_id, bus.node()
        )
        self.watch = Watch(self.roster, self.own, bus.nodes[-1])

    async def close(self):
        await self.watch.close()
        await self.own.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(figures_module, "PUBLISH_INTERVAL", 0.01)
    monkeypatch.setattr(figures_module, "WATCH_LIFE", 0.3)
    monkeypatch.setattr(watch_module, "WATCH_INTERVAL", 0.1)
    monkeypatch.setattr(watch_module, "READ_INTERVAL", 0.01)
    monkeypatch.setattr(watch_module, "FIGURES_LIFE", 0.3)


def of_node(node, **more):
    """The figures of a node, as they arrive."""
    return {
        "node": node,
        "started": 0.0,
        "connections": 0,
        "states": [],
        "guests": {},
        "services": {},
        "numbers": [],
        "joins": [],
        "latencies": [],
        "outcomes": [],
        "reconnects": 0,
        "cpu": 0.0,
        "lag": 0.0,
        **more,
    }


async def overview(*figures):
    """The overview, of the figures of some nodes."""
    bus = Bus()
    node = Node(bus)
    sender = bus.node()
    with node.watch.looking():
        for one in figures:
            await sender.publish(FIGURES, **one)
        shown = node.watch.overview()
    await node.close()
    return shown


# While somebody looks


@pytest.mark.gen_test
async def test_nothing_is_published_or_read_while_nobody_looks():
    bus = Bus()
    here, there = Node(bus), Node(bus, "node-2")
    await settle()
    assert bus.published == []
    with here.watch.looking():
        await until(lambda: len(here.watch.overview()["nodes"]) == 2)
        await until(lambda: bus.kinds().count(WATCH) >= 2)  # it goes on asking
    await until(lambda: here.watch._task.done() and here.own._publishing.done() and there.own._publishing.done())
    assert asyncio.all_tasks() == {asyncio.current_task()}
    published, reads = len(bus.published), here.roster.reads
    await settle()
    assert (len(bus.published), here.roster.reads, there.roster.reads) == (published, reads, 0)
    assert here.watch._figures == {}
    assert there.watch._figures == {}  # nobody has looked there
    assert here.watch.lessons == []
    with here.watch.looking():
        await until(lambda: len(here.watch.overview()["nodes"]) == 2)
    await here.close()
    await there.close()


@pytest.mark.gen_test
async def test_several_viewers_cost_one_reading():
    node = Node(Bus())
    with node.watch.looking():
        task = node.watch._task
        with node.watch.looking(), node.watch.looking():
            assert node.watch._task is task
            await node.watch.is_current.wait()
            assert node.roster.reads == 1
        await until(lambda: node.roster.reads >= 3)  # one is left
        assert node.watch._task is task
    await until(task.done)
    await node.close()


@pytest.mark.gen_test
async def test_a_viewer_who_comes_while_the_last_one_goes_sees_all():
    node = Node(Bus())
    with node.watch.looking():
        await node.watch.is_current.wait()
    with node.watch.looking():
        reads = node.roster.reads
        await until(lambda: node.roster.reads > reads)
        assert node.watch.lessons
    await node.close()


@pytest.mark.gen_test
async def test_what_is_shown_first_has_at_least_this_node():
    bus = Bus()
    node = Node(bus)
    await node.world.connect("sid", PARTICIPANT)
    bus.nodes.clear()  # nothing arrives yet
    with node.watch.looking():
        await node.watch.is_current.wait()
        assert node.watch.overview()["connections"] == 1
    await node.close()


@pytest.mark.gen_test
async def test_a_node_that_falls_silent_vanishes():
    bus = Bus()
    here, there = Node(bus), Node(bus, "node-2")
    with here.watch.looking():
        await until(lambda: len(here.watch.overview()["nodes"]) == 2)
        await there.own.close()
        bus.nodes.remove(there.own._messages)  # type: ignore[arg-type]
        await until(lambda: [node["node"] for node in here.watch.overview()["nodes"]] == ["node-1"])
    await here.close()


@pytest.mark.gen_test
async def test_without_redis_this_node_is_shown_and_redis_is_down():
    bus = Bus()
    here, there = Node(bus), Node(bus, "node-2")
    with here.watch.looking():
        await until(lambda: len(here.watch.overview()["nodes"]) == 2)
        bus.is_down = True
        here.redis = Status("down", 1_000.0, "timeout")
        here.roster.error = StoreUnavailable("Redis", "timeout")
        await until(lambda: len(here.watch.overview()["nodes"]) == 1)
        await until(lambda: here.watch.overview()["stores"][0]["status"] == "down")
        refused = bus.refused
        await until(lambda: bus.refused > refused + 20)  # and so it stays
        shown = here.watch.overview()
        assert [node["node"] for node in shown["nodes"]] == ["node-1"]
        assert shown["stores"] == [
            {"name": "Redis", "status": "down", "failed_at": "1970-01-01T00:16:40Z", "cause": "timeout"}
        ]
        bus.is_down = False
        here.redis = Status("up", 1_000.0, "timeout")
        here.roster.error = None
        await until(lambda: len(here.watch.overview()["nodes"]) == 2)
        await until(lambda: here.watch.overview()["stores"][0]["status"] == "up")
    await here.close()
    await there.close()


@pytest.mark.gen_test
async def test_a_defect_in_the_reading_is_logged_and_does_not_end_it(caplog, monkeypatch):
    node = Node(Bus())
    node.roster.error = LookupError("a defect")
    with node.watch.looking():
        await until(lambda: node.roster.failures > 2)
        assert "a defect" in caplog.text
        node.roster.error = StoreUnavailable("Redis", "timeout")
        read = node.own.read
        failed = []

        async def defect():
            failed.append(1)
            raise LookupError("another defect")

        monkeypatch.setattr(node.own, "read", defect)
        await until(lambda: failed)
        monkeypatch.setattr(node.own, "read", read)
        node.roster.error = None
        await until(lambda: node.watch.lessons)
    await node.close()


@pytest.mark.gen_test
async def test_its_close_ends_everything():
    node = Node(Bus())
    with node.watch.looking():
        await node.watch.is_current.wait()
        await node.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


# The sums over the nodes


@pytest.mark.gen_test
async def test_people_and_lessons_are_of_redis_and_guests_of_the_nodes():
    bus = Bus()
    here, there = Node(bus), Node(bus, "node-2")
    for node, sid in ((here, "g1"), (there, "g2"), (there, "g3")):
        await node.world.connect(sid, GUEST)
        await node.world.join(sid)
    with here.watch.looking():
        await until(lambda: here.watch.overview()["guests"] == 3)
        assert here.watch.guests() == {"1": 3}
        shown = here.watch.overview()
        assert [shown[name] for name in ("lessons", "teachers", "participants", "connections")] == [2, 1, 6, 3]
    await here.close()
    await there.close()


@pytest.mark.gen_test
async def test_states_are_summed_and_a_state_is_stuck_when_one_connection_is():
    one = [["join_lesson", "participant", "connected", 2, 10.04], ["join_lesson", "participant", "seated", 3, None]]
    other = [["join_lesson", "participant", "connected", 0, None], ["join_lesson", "participant", "seated", 1, None]]
    (chart,) = (await overview(of_node("a", states=one), of_node("b", states=other)))["charts"]
    assert (chart["event"], chart["client"]) == ("join_lesson", "participant")
    assert chart["states"] == [
        {"state": "connected", "count": 2, "longest": 10.0, "is_stuck": True},
        {"state": "seated", "count": 4, "longest": None, "is_stuck": False},
    ]
    one[0][4] = 10.0
    (chart,) = (await overview(of_node("a", states=one), of_node("b", states=other)))["charts"]
    assert not chart["states"][0]["is_stuck"]


@pytest.mark.gen_test
async def test_samples_of_nodes_are_aligned_by_their_numbers():
    counts = {"latencies": [[4] * 13, [0] * 13], "joins": [10, 0]}
    rates = (await overview(of_node("a", numbers=[7, 8], **counts), of_node("b", numbers=[8, 9], **counts)))["rates"]
    assert rates["seconds"] == 5
    assert rates["joins"] == [0.0] * 117 + [2.0, 2.0, 0.0]
    assert rates["p50"] == [None] * 117 + [0.5, 0.5, None]
    assert rates["p99"] == [None] * 117 + [0.99, 0.99, None]


@pytest.mark.gen_test
async def test_a_node_that_has_just_started_and_one_of_long_ago_fit_in():
    old = of_node("a", numbers=list(range(1, 121)), joins=[5] * 120, latencies=[[0] * 13] * 120)
    new = of_node("b", numbers=[125], joins=[10], latencies=[[0] * 13])
    rates = (await overview(old, new, of_node("c")))["rates"]
    assert {len(rates[name]) for name in ("joins", "p50", "p99")} == {SAMPLES}
    assert rates["joins"] == [1.0] * 115 + [0.0] * 4 + [2.0]


@pytest.mark.gen_test
async def test_refusals_are_summed_without_successes_the_most_frequent_first():
    one = [["join_lesson", "participant", "success", 9], ["join_lesson", "participant", "disconnected", 9]]
    two = [["join_lesson", "teacher", "token_expired", 2], ["join_lesson", "participant", "lesson_not_found", 1]]
    three = [["join_lesson", "participant", "lesson_not_found", 4]]
    shown = await overview(of_node("a", outcomes=one + two, reconnects=3), of_node("b", outcomes=three, reconnects=1))
    assert shown["refusals"] == [
        {"event": "join_lesson", "client": "participant", "outcome": "lesson_not_found", "count": 5},
        {"event": "join_lesson", "client": "teacher", "outcome": "token_expired", "count": 2},
    ]
    assert shown["reconnects"] == 4


@pytest.mark.gen_test
async def test_a_store_is_down_when_it_is_for_one_node_and_the_last_failure_is_told():
    one = {
        "RDS": {"status": "up", "failed_at": 20.0, "cause": "later"},
        "Mixpanel": {"status": "off", "failed_at": None, "cause": None},
    }
    other = {"RDS": {"status": "down", "failed_at": 10.0, "cause": "earlier"}, "Mixpanel": one["Mixpanel"]}
    for nodes in ((one, other), (other, one)):
        shown = await overview(*(of_node(str(number), services=each) for number, each in enumerate(nodes)))
        assert shown["stores"] == [
            {"name": "RDS", "status": "down", "failed_at": "1970-01-01T00:00:20Z", "cause": "later"},
            {"name": "Mixpanel", "status": "off", "failed_at": None, "cause": None},
        ]


@pytest.mark.gen_test
async def test_a_node_is_shown_with_its_times():
    (node,) = (await overview(of_node("a", connections=3, cpu=0.12345, lag=0.00312, started=60.0)))["nodes"]
    assert node.pop("heard_of") > "2020"
    assert node == {"node": "a", "connections": 3, "started": "1970-01-01T00:01:00Z", "cpu": 0.123, "lag": 0.0031}


# Percentiles


def histogram(latencies):
    """The cumulative counts of a histogram, as Prometheus has them."""
    counts = [sum(1 for latency in latencies if latency <= bound) for bound in EVENT_BUCKETS]
    return [*counts, len(latencies)]


@given(
    st.lists(st.floats(min_value=0.0, max_value=10.0), min_size=1, max_size=200),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_a_percentile_is_in_the_bucket_of_the_latency_of_that_rank(latencies, share):
    shown = percentile(histogram(latencies), share)
    exact = sorted(latencies)[math.ceil(share * len(latencies)) - 1]
    position = bisect.bisect_left(EVENT_BUCKETS, exact)
    if position == len(EVENT_BUCKETS):
        assert shown == 1_000 * EVENT_BUCKETS[-1]
    else:
        lower = EVENT_BUCKETS[position - 1] if position else 0.0
        assert 1_000 * lower - 0.006 <= shown <= 1_000 * EVENT_BUCKETS[position] + 0.006  # rounded to 0.01


@given(st.lists(st.floats(min_value=0.0, max_value=10.0), min_size=1, max_size=50))
def test_percentiles_grow_with_the_share(latencies):
    shown = [percentile(histogram(latencies), share / 20) for share in range(1, 21)]
    assert shown == sorted(shown)


def test_there_is_no_percentile_of_nothing():
    assert percentile([0] * (len(EVENT_BUCKETS) + 1), 0.5) is None


def test_what_is_shown_is_two_seconds_old_at_most(monkeypatch):
    """The nodes publish each second, and are asked to go on well before they stop."""
    monkeypatch.undo()
    assert watch_module.READ_INTERVAL + figures_module.PUBLISH_INTERVAL <= 2.0
    # one of these messages may be lost
    assert 2 * (watch_module.WATCH_INTERVAL + watch_module.READ_INTERVAL) < figures_module.WATCH_LIFE
    assert watch_module.FIGURES_LIFE > 2 * figures_module.PUBLISH_INTERVAL
