"""figures.py: what a node tells the others of itself, and when."""

import asyncio
import logging
from collections import Counter

import pytest
from buses import Bus
from clock import Clock
from fakes import World
from handshakes import GUEST, PARTICIPANT, TEACHER
from waiting import until

from lesson_server.http import figures as figures_module
from lesson_server.http.figures import FIGURES, WATCH, Figures
from lesson_server.metrics import EVENT_BUCKETS
from lesson_server.status import Status


class Node:
    """The figures of a node with a gateway in memory."""

    def __init__(self):
        self.world = World()
        self.bus = Bus()
        self.other = self.bus.node()
        self.figures = Figures(
            self.world.gateway,
            self.world.metrics,
            {"RDS": lambda: Status("down", 1_000.0, "timeout"), "Mixpanel": lambda: Status("off")},
            lambda: "node-1",
            self.bus.node(),
        )

    async def state(self, client, state):
        """Count and longest time of a state."""
        states = (await self.figures.read())["states"]
        ((count, longest),) = [row[3:] for row in states if row[:3] == ["join_lesson", client, state]]
        return count, longest


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(figures_module, "PUBLISH_INTERVAL", 0.01)
    monkeypatch.setattr(figures_module, "WATCH_LIFE", 0.2)


@pytest.fixture
def clock(monkeypatch):
    """A clock for the figures; the gateway asks the real one, so times in a state are not of it."""
    clock = Clock()
    monkeypatch.setattr(figures_module, "time", clock)
    return clock


# When it publishes


@pytest.mark.usefixtures("quick")
@pytest.mark.gen_test
async def test_it_publishes_only_while_it_is_watched():
    node = Node()
    node.figures.start()
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert node.bus.published == []
    await node.other.publish(WATCH)
    await until(lambda: node.bus.kinds().count(FIGURES) >= 3)
    await until(lambda: node.figures._publishing.done())  # nobody asks again
    published = len(node.bus.published)
    await node.other.publish(WATCH)
    await until(lambda: len(node.bus.published) > published + 1)
    await node.figures.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.usefixtures("quick")
@pytest.mark.gen_test
async def test_several_consoles_cost_one_publication():
    node = Node()
    for _ in range(5):
        await node.other.publish(WATCH)
    publishing = node.figures._publishing
    await until(lambda: FIGURES in node.bus.kinds())
    for _ in range(5):
        await node.other.publish(WATCH)
    assert node.figures._publishing is publishing
    assert len(asyncio.all_tasks()) == 2
    await node.figures.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.gen_test
async def test_an_outage_of_redis_does_not_end_the_publications():
    node = Node()
    await node.other.publish(WATCH)
    await until(lambda: FIGURES in node.bus.kinds())
    node.bus.is_down = True
    await until(lambda: node.bus.refused)
    node.bus.is_down = False
    published = node.bus.kinds().count(FIGURES)
    await node.other.publish(WATCH)
    await until(lambda: node.bus.kinds().count(FIGURES) > published)
    await node.figures.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.gen_test
async def test_a_publication_tells_of_the_process_and_its_services():
    node = Node()
    await node.other.publish(WATCH)
    await until(lambda: node.bus.kinds().count(FIGURES) >= 2)
    await node.figures.close()
    message = node.bus.published[-1]
    assert message["node"] == "node-1"
    assert message["cpu"] >= 0
    assert message["lag"] >= 0
    assert message["services"] == {
        "RDS": {"status": "down", "failed_at": 1_000.0, "cause": "timeout"},
        "Mixpanel": {"status": "off", "failed_at": None, "cause": None},
    }


# Connections


@pytest.mark.gen_test
async def test_a_connection_that_never_joins_has_been_in_its_state_since_it_connected(clock):
    node = Node()
    await node.world.connect("sid", PARTICIPANT)
    clock.now = node.world.gateway.connections["sid"].connected_at + 30.0
    assert await node.state("participant", "connected") == (1, 30.0)
    assert await node.state("teacher", "connected") == (0, None)


@pytest.mark.gen_test
async def test_guests_and_registered_ones_rest(clock):
    node = Node()
    for sid, auth in (("guest", GUEST), ("participant", PARTICIPANT), ("teacher", TEACHER)):
        await node.world.connect(sid, auth)
        await node.world.join(sid)
    clock.now = float("inf")
    assert await node.state("participant", "seated") == (1, None)
    assert await node.state("participant", "registered") == (1, None)
    assert await node.state("teacher", "registered") == (1, None)
    read = await node.figures.read()
    assert read["guests"] == {"1": 1}
    assert read["connections"] == 3


@pytest.mark.gen_test
async def test_the_longest_of_a_state_is_the_oldest_connection(clock, monkeypatch):
    monkeypatch.setattr(figures_module, "CONNECTIONS_AT_ONCE", 2)
    node = Node()
    for number in range(5):
        join = await node.world.connect(f"sid-{number}", PARTICIPANT)
        join.since = 100.0 + number
    clock.now = 110.0
    assert await node.state("participant", "connected") == (5, 10.0)


@pytest.mark.gen_test
async def test_connections_may_come_and_go_while_they_are_looked_at(monkeypatch):
    monkeypatch.setattr(figures_module, "CONNECTIONS_AT_ONCE", 2)
    node = Node()
    for number in range(6):
        await node.world.connect(f"sid-{number}", PARTICIPANT)
    reading = asyncio.create_task(node.figures.read())
    await asyncio.sleep(0)
    await node.world.disconnect("sid-4")
    await node.world.connect("new", PARTICIPANT)
    assert not reading.done()  # so it has happened in the middle
    assert (await reading)["connections"] == 6


# The last ten minutes


@pytest.mark.gen_test
async def test_the_joins_of_each_interval(clock):
    node = Node()
    clock.now = 1_000.0
    node.figures.take_sample()
    for number, joins in enumerate((2, 0, 3)):
        for join in range(joins):
            sid = f"{number}-{join}"
            await node.world.connect(sid, PARTICIPANT)
            await node.world.join(sid)
        clock.now += 5.0
        node.figures.take_sample()
    read = await node.figures.read()
    assert read["numbers"] == [201, 202, 203]
    assert read["joins"] == [2, 0, 3]
    assert [counts[-1] for counts in read["latencies"]] == [2, 0, 3]
    assert {len(counts) for counts in read["latencies"]} == {len(EVENT_BUCKETS) + 1}


@pytest.mark.gen_test
async def test_no_more_than_ten_minutes_are_kept(clock):
    node = Node()
    await node.world.connect("sid", TEACHER | {"access_token": "invalid"})
    await node.world.join("sid")
    for _ in range(figures_module.SAMPLES + 10):
        node.figures.take_sample()
        clock.now += 5.0
    read = await node.figures.read()
    assert len(read["numbers"]) == len(read["joins"]) == figures_module.SAMPLES
    assert read["outcomes"] == []  # it was before


@pytest.mark.gen_test
async def test_refusals_and_reconnects_are_told_at_once(clock):
    """Not only after the next sample: what the console shows is 2 s old at most."""
    node = Node()
    node.figures.take_sample()
    await node.world.connect("sid", TEACHER | {"access_token": "invalid"})
    await node.world.join("sid")
    node.world.metrics.reconnects.inc()
    read = await node.figures.read()
    assert read["outcomes"] == [["join_lesson", "teacher", "token_invalid", 1]]
    assert read["reconnects"] == 1


@pytest.mark.gen_test
async def test_what_was_before_the_first_sample_is_not_of_the_last_ten_minutes(clock):
    node = Node()
    node.world.metrics.reconnects.inc()
    node.world.metrics.events_of("join_lesson", "participant", "success").inc()
    node.figures.take_sample()
    read = await node.figures.read()
    assert (read["outcomes"], read["reconnects"], read["joins"]) == ([], 0, [])


@pytest.mark.gen_test
async def test_there_are_figures_before_the_first_sample():
    read = await Node().figures.read()
    assert (read["numbers"], read["joins"], read["outcomes"], read["reconnects"]) == ([], [], [], 0)


@pytest.mark.parametrize("early", [0.0, 0.0005, 0.004])
@pytest.mark.gen_test
async def test_a_timer_that_fires_early_takes_one_sample_an_interval(clock, monkeypatch, early):
    """uvloop rounds to milliseconds, up or down."""
    delays = []
    sleep = asyncio.sleep

    async def wake_early(delay, *args):
        delays.append(delay)
        clock.now += max(delay - early, 0.0001)
        await sleep(0)

    node = Node()
    clock.now = 1_003.0
    monkeypatch.setattr(asyncio, "sleep", wake_early)
    node.figures.start()
    while len(delays) < 10:
        await sleep(0)
    monkeypatch.undo()
    await node.figures.close()
    assert min(delays[1:]) > 4.9
    assert Counter(sample.number for sample in node.figures._samples).most_common(1)[0][1] == 1
    numbers = [sample.number for sample in node.figures._samples]
    assert numbers == list(range(200, 200 + len(numbers)))


@pytest.mark.gen_test
async def test_a_clock_that_is_set_does_no_harm(clock, monkeypatch):
    node = Node()
    for now in (1_000.0, 1_005.0, 500.0, 505.0, 9_000.0):
        clock.now = now
        node.figures.take_sample()
    read = await node.figures.read()
    assert len(read["numbers"]) == len(read["joins"]) == 4


def test_the_samples_are_of_ten_minutes_and_publications_of_each_second():
    assert figures_module.SAMPLE_INTERVAL * figures_module.SAMPLES == 600
    assert figures_module.PUBLISH_INTERVAL == 1.0
    assert figures_module.STUCK_AFTER == 10.0


@pytest.mark.usefixtures("quick")
@pytest.mark.gen_test
async def test_a_foreign_message_does_no_harm(caplog):
    caplog.set_level(logging.WARNING)
    node = Node()
    for text in ("", "[]", "7", '{"kind": "none"}', '{"kind": 7}', '{"kind": []}', "{}"):
        await node.bus.nodes[1]._receive(text)
    assert node.bus.published == []
    assert node.figures._publishing is None
