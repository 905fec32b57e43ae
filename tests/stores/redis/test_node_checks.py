"""nodes.py: what the checks of the records cost, and when they run; whole servers by their own heartbeats."""

import asyncio
from itertools import chain

import pytest
from clients import SUCCESS, client, join
from node_keys import CLIENT, RETENTION, commands_of, logged
from waiting import until

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.redis import nodes
from lesson_server.stores.redis.nodes import CHECK_PERIOD
from lesson_server.stores.redis.records import ClientRecord
from lesson_server.stores.redis.removals import BATCH_SIZE

# What it costs


@pytest.mark.without_coverage
@pytest.mark.gen_test(timeout=60)
async def test_a_heartbeat_costs_the_same_however_many_connections_there_are(a, redis_client):
    costs = []
    for start, end in ((0, 100), (100, 20_000)):
        for first in range(start, end, 200):
            records = [
                ClientRecord(f"sid-{n}", str(n // 30), f"p{n}", "student") for n in range(first, min(first + 200, end))
            ]
            await asyncio.gather(*map(a.join, records))
        before = commands_of(redis_client)
        await a.beat()
        costs.append(commands_of(redis_client) - before)
    assert costs[0] == costs[1]


# What is checked when


def hold_many(house, monkeypatch):
    """A house with more than fits into two batches, all of it in order.

    Returns:
        the batches that are checked from now on, of records, of seat maps, and of seats.
    """
    house.records = {f"sid-{number}": CLIENT for number in range(2 * BATCH_SIZE + 1)}
    house.seat_of = dict.fromkeys(house.records, 1)
    house.lessons = {str(number): "sid-1" for number in range(2 * BATCH_SIZE + 1)}
    batches = []

    async def check(names):
        batches.append(names)
        return []

    monkeypatch.setattr(house.presence, "check", check)
    monkeypatch.setattr(house.seats, "missing", check)
    monkeypatch.setattr(house.seats, "lost", check)
    return batches


@pytest.mark.parametrize("paced", [True, False])
def test_a_round_checks_each_record_seat_map_and_seat_once_and_not_all_at_the_same_time(io_loop, a, monkeypatch, paced):
    monkeypatch.setattr(nodes, "CHECK_PERIOD", 0.1)
    batches = hold_many(a, monkeypatch)
    begun = io_loop.time()
    io_loop.run_sync(lambda: a.node.check_records(paced=paced), timeout=5)
    assert list(chain(*batches)) == [*a.records, *a.lessons, *a.records]
    assert max(map(len, batches)) == BATCH_SIZE
    assert not paced or io_loop.time() > begun + 0.09


@pytest.mark.parametrize(("retention", "period"), [(RETENTION, CHECK_PERIOD), (3, 1)])
@pytest.mark.parametrize("connections", [0, 1, 250])
def test_a_paced_check_takes_its_time_in_equal_parts_and_less_than_half_of_a_ttl(
    io_loop, open_house, monkeypatch, retention, period, connections
):
    a = open_house(retention)
    hold_many(a, monkeypatch)
    a.records = dict.fromkeys(map(str, range(connections)))
    pauses = []

    async def wait(pause):
        pauses.append(pause)

    monkeypatch.setattr(a.node, "_is_interrupted", wait)
    io_loop.run_sync(lambda: a.node.check_records(paced=True))
    assert len(pauses) == -(-connections // BATCH_SIZE) + 1
    assert sum(pauses) == pytest.approx(period)
    assert max(pauses) == min(pauses)
    assert 2 * sum(pauses) < retention


@pytest.mark.gen_test
async def test_a_paced_check_ends_where_a_check_of_all_records_becomes_wanted(a, monkeypatch):
    batches = hold_many(a, monkeypatch)
    check = asyncio.create_task(a.node.check_records(paced=True))
    await asyncio.sleep(0)
    a.node.check_all()
    await check
    assert len(batches) == 1


@pytest.mark.gen_test
async def test_all_records_are_checked_when_that_is_wanted_and_then_at_their_pace_again(a, monkeypatch):
    rounds = []

    async def check(*, paced):
        rounds.append(paced)
        if len(rounds) == 2:
            a.node.check_all()
        if len(rounds) == 4:
            await asyncio.Event().wait()

    monkeypatch.setattr(a.node, "check_records", check)
    a.node.check_all()
    await a.node.start()
    await until(lambda: len(rounds) == 4)
    assert rounds == [False, True, False, True]


@pytest.mark.gen_test
async def test_a_node_that_has_lost_something_does_not_wait_for_its_next_round(a, redis_client, monkeypatch):
    monkeypatch.setattr(nodes, "HEARTBEAT_INTERVAL", 0.02)
    monkeypatch.setattr(nodes, "CHECK_PERIOD", 3600.0)
    check, checked = a.presence.check, []

    async def watch(sids):
        checked.append(await check(sids))
        return checked[-1]

    monkeypatch.setattr(a.presence, "check", watch)
    await a.join(CLIENT)
    await a.node.start()
    await until(lambda: checked)
    redis_client.flushall()
    await until(lambda: redis_client.hget("lesson_student_1", "p1") == "a-p")


# Whole servers, by their own heartbeats


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(nodes, "HEARTBEAT_INTERVAL", 0.02)
    monkeypatch.setattr(nodes, "CHECK_RETRY_INTERVAL", 0.02)
    monkeypatch.setattr(nodes, "CHECK_PERIOD", 0.1)


@pytest.mark.parametrize("part", ["beat", "check_records"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StoreUnavailable("Redis", "down"), []),
        (StoreRefused("Redis", "of another type"), ["{} refused: Redis: of another type"]),
        (RuntimeError("a defect"), ["{} failed"]),
    ],
    ids=["redis is away", "refused", "a defect"],
)
def test_a_round_that_failed_is_followed_by_the_next_and_told_unless_redis_is_away(
    io_loop, quick, a, monkeypatch, caplog, part, error, told
):
    """The log knows of an outage."""
    rounds = []

    async def fails_once(**kwargs):
        rounds.append(kwargs)
        if len(rounds) == 1:
            raise error
        await asyncio.Event().wait()

    async def scenario():
        await a.node.start()
        monkeypatch.setattr(a.node, part, fails_once)
        await until(lambda: len(rounds) == 2)
        name = {"beat": "heartbeat", "check_records": "check of the records"}[part]
        assert logged(caplog) == [line.format(name) for line in told]
        if part == "check_records":
            assert rounds[1] == {"paced": False}

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_after_a_flush_everything_is_there_again_and_nothing_is_reported(quick, server, redis_client, mint):
    async with (
        client(server, client="teacher", lesson_id="1", access_token=mint("t1", "teacher")) as teacher,
        client(server, client="participant", lesson_id="1", access_token=mint()) as participant,
        client(server, client="participant", lesson_id="1") as guest,
    ):
        for sio in (teacher, participant, guest):
            assert await join(sio) == SUCCESS
        before = {key: redis_client.hgetall(key) for key in redis_client.keys("*")}
        assert len(before) == 5
        redis_client.flushall()
        await until(lambda: {key: redis_client.hgetall(key) for key in redis_client.keys("*")} == before)
        await until(
            lambda: (
                redis_client.hlen(server._presence.claims.index_key(server._presence.claims.incarnation.node_id)) == 2
            )
        )
        assert server._metrics.registry.get_sample_value("lesson_reconnects_total") == 0
    await until(lambda: sorted(redis_client.keys()) == ["lesson_seat_1", "p1"])


@pytest.mark.gen_test
async def test_a_seat_map_that_is_lost_alone_gets_the_seats_of_each_node_again(a, b, redis_client):
    """The node that checks first writes the map, so the others don't miss it any more."""
    for house, who in ((a, "anna"), (b, "ben")):
        record = ClientRecord(f"sid-{who}", "1", who, "student")
        await house.join(record)
        house.lessons["1"] = [record.sid]
        _, house.seat_of[record.sid] = await house.seats.take("1", who, None, 3)
    seats = redis_client.hgetall("lesson_seat_1")
    assert seats == {"1": "anna", "2": "ben", "3": ""}
    redis_client.delete(*redis_client.keys("*lesson_seat_1*"))
    for house in (a, b):
        await house.node.check_records()
    assert redis_client.hgetall("lesson_seat_1") == seats


@pytest.mark.gen_test
async def test_a_heartbeat_that_redis_refuses_is_logged(quick, server, redis_client, caplog):
    redis_client.delete("lesson_node_counts")
    redis_client.set("lesson_node_counts", "of another type")
    await until(lambda: "heartbeat refused" in caplog.text)
    redis_client.delete("lesson_node_counts")
    await until(lambda: redis_client.hlen("lesson_node_counts") == 1)


@pytest.mark.gen_test
async def test_a_lost_record_is_found_without_any_failure(quick, server, redis_client, mint):
    async with client(server, client="participant", lesson_id="1", access_token=mint()) as participant:
        assert await join(participant) == SUCCESS
        redis_client.delete("lesson_student_1", "lesson_seat_1")
        await until(lambda: redis_client.hget("lesson_student_1", "p1") == participant.get_sid())
        await until(lambda: redis_client.exists("lesson_seat_1"))


def test_a_lost_record_is_back_within_60_seconds():
    """It may be lost just after its check: then the rest of that round goes by, and nearly all of the next one."""
    assert 2 * nodes.CHECK_PERIOD <= 60


@pytest.mark.parametrize("part", ["beat", "check_records"])
def test_a_defect_in_one_round_is_not_the_end_of_them(io_loop, quick, server, redis_client, monkeypatch, caplog, part):
    async def defect(**kwargs):
        raise RuntimeError("a defect")

    async def scenario():
        with monkeypatch.context() as patch:
            patch.setattr(server._node, part, defect)
            await until(lambda: "a defect" in caplog.text)
        redis_client.flushall()
        await until(lambda: redis_client.hlen("lesson_node_counts") == 1)

    io_loop.run_sync(scenario)
