"""nodes.py against a real Valkey: heartbeats are sent one by one, and the checks of the records are called by hand."""

import asyncio
from itertools import chain

import pytest
import redis
from clients import SUCCESS, client, join, until

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.redis import nodes
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.nodes import CHECK_PERIOD, LOST, LOST_AFTER, Node
from lesson_server.stores.redis.presence import BATCH_SIZE, Presence
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord
from lesson_server.stores.redis.seats import Seats

RETENTION = 7 * 86_400
TEACHER = TeacherRecord("a-t", "1", "ms-hill")
CLIENT = ClientRecord("a-p", "1", "p1", "student")


class House:
    """A node with connections of its own, which are no more than their records."""

    def __init__(self, url, retention=RETENTION):
        self.store = RedisStore(url, "", 2.0, 8)
        self.presence = Presence(self.store, retention)
        self.seats = Seats(self.store, RETENTION)
        self.node = Node(self.store, self.presence, self.seats, self)
        self.records = {}
        self.lessons = {}

    @property
    def node_id(self):
        return self.presence.incarnation.node_id

    async def join(self, *records):
        for record in records:
            self.records[record.sid] = record
            await self.presence.write(record)

    async def leave(self, record):
        del self.records[record.sid]
        await self.presence.remove(record.sid)
        await self.presence.settled()

    async def beat(self, times=1):
        """Heartbeats, with the sweeps that they begin."""
        for _ in range(times):
            await self.node.beat()
            await asyncio.gather(*self.node._sweeps.values())

    async def close(self):
        await self.node.close()
        await self.presence.close()
        await self.store.close()

    # The protocol nodes.Connections

    def present(self):
        return list(self.records)

    def seated(self):
        return self.lessons

    async def restore(self, sids):
        for sid in sids:
            for lesson_id, seated in self.lessons.items():
                if seated == sid:
                    await self.seats.ensure_map(lesson_id, 3)
            if sid in self.records:
                await self.presence.restore(self.records[sid])
        return len(self.records.keys() & sids)


@pytest.fixture
def open_house(io_loop, stores):
    houses = []

    def open_house(*retention):
        houses.append(House(stores.redis_url, *retention))
        io_loop.run_sync(houses[-1].beat)
        return houses[-1]

    yield open_house
    for house in houses:
        io_loop.run_sync(house.close)


@pytest.fixture
def a(open_house):
    return open_house()


@pytest.fixture
def b(open_house):
    return open_house()


@pytest.fixture
def c(open_house):
    return open_house()


def own_keys(redis_client):
    """What the server keeps for itself, but the counts of the nodes."""
    return sorted(key for key in redis_client.keys("lesson_node*") if key != "lesson_node_counts")


def known(redis_client):
    return set(redis_client.hkeys("lesson_node_counts"))


def snapshot(redis_client):
    return {key: redis_client.hgetall(key) for key in redis_client.keys("*")}


def logged(caplog):
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


# Nodes that die


@pytest.mark.gen_test
async def test_a_node_is_known_by_its_count_which_its_heartbeats_and_its_writes_raise(a, redis_client):
    counts = [int(redis_client.hget("lesson_node_counts", a.node_id))]
    for step in (a.beat, lambda: a.join(CLIENT), lambda: a.leave(CLIENT)):
        await step()
        counts.append(int(redis_client.hget("lesson_node_counts", a.node_id)))
    assert counts == [1, 2, 3, 4]
    assert a.presence.incarnation.acknowledged == 4


@pytest.mark.gen_test
async def test_the_index_of_a_node_that_lives_does_not_end_by_its_ttl(a, redis_client):
    await a.join(CLIENT)
    await a.beat()
    assert 0 < redis_client.ttl(f"lesson_node_{a.node_id}") <= nodes.INDEX_LIFE


@pytest.mark.gen_test
async def test_a_node_that_is_silent_for_long_enough_is_swept_of_exactly_what_it_wrote(a, b, redis_client, caplog):
    await a.join(TEACHER, CLIENT, ClientRecord("a-q", "1", "p2", "student"))
    await b.join(ClientRecord("b-p", "1", "p1", "student"))  # came back by another node
    await b.join(ClientRecord("b-r", "1", "p3", "student"))
    before = snapshot(redis_client)
    await b.beat(LOST_AFTER)
    assert snapshot(redis_client) == before
    await b.beat()
    assert redis_client.hgetall("lesson_student_1") == {"p1": "b-p", "p3": "b-r"}
    assert not redis_client.exists("lesson_teacher_1", "ms-hill", f"lesson_node_{a.node_id}")
    assert known(redis_client) == {b.node_id}
    assert redis_client.hget("p2", "sid") == "a-q"  # for its 24 h: that is how a reconnect is known
    assert logged(caplog) == [f"node {a.node_id} is lost; the presence of 3 connections was removed"]


@pytest.mark.gen_test
async def test_a_node_whose_count_redis_has_lost_is_swept_all_the_same(a, b, redis_client):
    """One master of a cluster came back empty: the index is on another."""
    await a.join(CLIENT)
    await b.beat()
    redis_client.hdel("lesson_node_counts", a.node_id)
    await b.beat(LOST_AFTER + 1)
    assert redis_client.keys() == ["p1"]


@pytest.mark.gen_test
async def test_a_node_that_has_left_is_forgotten(a, b, redis_client, caplog):
    async def costs():
        before = commands_of(redis_client)
        await b.beat()
        return commands_of(redis_client) - before

    usual = await costs()
    redis_client.hdel("lesson_node_counts", a.node_id)
    await b.beat(LOST_AFTER + 2)
    assert await costs() == usual
    assert logged(caplog) == []


@pytest.mark.parametrize("sign_of_life", ["heartbeat", "join"])
def test_a_node_that_gives_a_sign_of_life_is_not_lost(io_loop, a, b, redis_client, sign_of_life):
    async def scenario():
        await a.join(CLIENT)
        await b.beat(LOST_AFTER)
        await (a.beat() if sign_of_life == "heartbeat" else a.join(TEACHER))
        await b.beat(LOST_AFTER)
        assert known(redis_client) == {a.node_id, b.node_id}
        assert redis_client.hget("lesson_student_1", "p1") == "a-p"

    io_loop.run_sync(scenario)


def test_a_node_that_stands_still_for_five_seconds_is_not_lost():
    """Its last heartbeat may be that long before, and the one that was due stands still too."""
    assert LOST_AFTER * nodes.HEARTBEAT_INTERVAL >= 5 + 2 * nodes.HEARTBEAT_INTERVAL


@pytest.mark.gen_test
async def test_while_redis_does_not_answer_nobody_comes_nearer_to_being_lost(a, b, redis_client, monkeypatch):
    await a.join(CLIENT)
    await b.beat(LOST_AFTER)
    refused = 0

    async def refuse(*commands, bookkeeping=()):
        nonlocal refused
        refused += 1
        raise StoreUnavailable("Redis", "down")

    with monkeypatch.context() as outage:
        outage.setattr(b.store, "run", refuse)
        for _ in range(3 * LOST_AFTER):
            with pytest.raises(StoreUnavailable):
                await b.beat()
    assert refused == 3 * LOST_AFTER
    await a.beat()
    await b.beat()
    assert redis_client.hget("lesson_student_1", "p1") == "a-p"


@pytest.mark.gen_test
async def test_a_clock_of_redis_that_jumps_neither_sweeps_the_living_nor_keeps_the_dead(a, b, c, redis_client):
    """Nothing that decides who is lost is a time. The order of joining begins with one: see test_presence.py."""
    await a.join(CLIENT)
    await c.join(TEACHER)
    for key in redis_client.keys("lesson_node_claims*"):
        for claim in redis_client.zrange(key, 0, -1):
            redis_client.zincrby(key, -3600e6, claim)
    for _ in range(LOST_AFTER + 1):
        await a.beat()
        await b.beat()
    assert redis_client.hgetall("lesson_student_1") == {"p1": "a-p"}
    assert not redis_client.exists("lesson_teacher_1")
    assert known(redis_client) == {a.node_id, b.node_id}


@pytest.mark.gen_test
async def test_all_who_notice_sweep_together_and_nothing_is_left(a, b, c, redis_client):
    for number in range(3 * BATCH_SIZE):
        await a.join(ClientRecord(f"a-{number}", str(number % 3), f"p{number}", "student"))
    await b.beat(LOST_AFTER)
    await c.beat(LOST_AFTER)
    await asyncio.gather(b.beat(), c.beat())
    assert not redis_client.keys("lesson_student_*")
    assert own_keys(redis_client) == []
    assert known(redis_client) == {b.node_id, c.node_id}


@pytest.mark.gen_test
async def test_a_sweeper_that_dies_in_mid_sweep_is_followed_at_once(a, b, c, redis_client, monkeypatch):
    await a.join(CLIENT, TEACHER)
    begun = asyncio.Event()

    async def dies(node_id):
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(b.presence, "sweep", dies)
    for _ in range(LOST_AFTER + 1):
        await b.node.beat()
    await begun.wait()
    await c.beat()  # the first heartbeat of this node that sees the lost one
    assert not redis_client.exists("lesson_student_1", "lesson_teacher_1", "ms-hill")
    assert a.node_id not in known(redis_client)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StoreUnavailable("Redis", "down"), 0),
        (StoreRefused("Redis", "of another type"), 1),
        (RuntimeError("a defect"), 1),
    ],
    ids=["redis is away", "refused", "a defect"],
)
@pytest.mark.parametrize("step", ["run", "sweep"])
def test_a_sweep_that_failed_is_begun_again(io_loop, a, b, redis_client, monkeypatch, caplog, error, told, step):
    """The log knows of an outage."""
    sweeper = b.store if step == "run" else b.presence
    do, failed = getattr(sweeper, step), []

    async def fails_once(*arguments):
        if not failed and (step == "sweep" or arguments[0][0] == "HSET"):
            failed.append(arguments)
            raise error
        return await do(*arguments)

    async def scenario():
        await a.join(CLIENT)
        monkeypatch.setattr(sweeper, step, fails_once)
        for _ in range(LOST_AFTER + 1):
            await b.node.beat()
            await asyncio.gather(*b.node._sweeps.values(), return_exceptions=True)
        assert failed
        assert redis_client.exists("lesson_student_1")
        assert caplog.text.count(f"sweep of node {a.node_id} failed") == told
        await b.beat()
        assert not redis_client.exists("lesson_student_1")

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_long_sweep_does_not_hold_up_the_heartbeat(a, b, redis_client, monkeypatch):
    await a.join(CLIENT)
    go_on = asyncio.Event()
    sweep = b.presence.sweep

    async def slowly(node_id):
        await go_on.wait()
        return await sweep(node_id)

    monkeypatch.setattr(b.presence, "sweep", slowly)
    for _ in range(LOST_AFTER + 5):
        await b.node.beat()
    assert int(redis_client.hget("lesson_node_counts", b.node_id)) == LOST_AFTER + 6
    go_on.set()
    await asyncio.gather(*b.node._sweeps.values())
    assert not redis_client.exists("lesson_student_1")


@pytest.mark.gen_test
async def test_a_join_after_flushall_makes_its_node_known_so_that_it_can_be_swept(a, b, redis_client):
    """FLUSHALL, a join, and kill -9 before the next heartbeat."""
    redis_client.flushall()
    await a.join(CLIENT, TEACHER)
    await b.beat(LOST_AFTER + 2)
    assert redis_client.keys() == ["p1"]
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_a_node_that_starts_sweeps_what_it_finds_lost(a, b, redis_client, monkeypatch):
    """The only node of a set-up, started again after a crash."""
    monkeypatch.setattr(nodes, "HEARTBEAT_INTERVAL", 0.01)
    await a.join(CLIENT)
    await b.node.start()
    await until(lambda: known(redis_client) == {b.node_id})
    assert not redis_client.exists("lesson_student_1")


@pytest.mark.gen_test
async def test_a_node_that_leaves_in_order_leaves_no_key(a, redis_client):
    await a.node.start()
    await a.join(CLIENT)
    await a.leave(CLIENT)
    await a.node.close()
    assert redis_client.keys("lesson_node*") == []


@pytest.mark.gen_test
async def test_a_node_that_has_left_sends_no_heartbeat_and_sweeps_nobody(a, b, monkeypatch):
    await a.node.start()
    monkeypatch.setattr(a.presence, "sweep", lambda node_id: asyncio.Event().wait())
    a.node._begin_sweep(b.node_id)
    tasks = [*a.node._tasks, *a.node._sweeps.values()]
    await a.node.close()
    assert len(tasks) == 3
    assert all(task.done() for task in tasks)


@pytest.mark.gen_test
async def test_a_node_that_could_not_start_is_not_held_up_by_redis_once_more(a, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(a.store, "run", None)
        await a.node.close()


@pytest.mark.parametrize("hangs", [False, True])
def test_a_node_leaves_soon_though_redis_does_not_answer(io_loop, a, monkeypatch, hangs):
    asked = []

    async def silent(*commands):
        asked.append(commands)
        if hangs:
            await asyncio.Event().wait()
        raise StoreUnavailable("Redis", "down")

    async def scenario():
        await a.node.start()
        with monkeypatch.context() as outage:
            outage.setattr(a.store, "run", silent)
            outage.setattr(nodes, "REMOVAL_PATIENCE", 0.05)
            await a.node.close()
        assert asked[-1] == (("HLEN", f"lesson_node_{a.node_id}"),)

    io_loop.run_sync(scenario, timeout=5)


@pytest.mark.gen_test
async def test_what_a_node_leaves_behind_is_swept_by_the_others(a, b, redis_client):
    """Its connections' ends were cut off by a Redis that hung."""
    await a.node.start()
    await a.join(CLIENT)
    await a.node.close()
    assert a.node_id in known(redis_client)
    await b.beat(LOST_AFTER + 1)
    assert redis_client.keys() == ["p1"]
    assert own_keys(redis_client) == []


# A Redis that forgets


@pytest.mark.gen_test
async def test_a_node_that_was_taken_for_lost_and_lives_writes_its_presence_again(a, b, redis_client, caplog):
    await a.join(TEACHER, CLIENT)
    before, former = snapshot(redis_client), a.node_id
    await b.beat(LOST_AFTER + 1)
    assert redis_client.keys() == ["p1"]
    await a.beat()
    assert a.node_id != former
    assert "Redis has lost what this node wrote" in caplog.text
    await a.node.check_records()
    assert snapshot(redis_client) == before
    assert known(redis_client) == {a.node_id, b.node_id}
    assert own_keys(redis_client) == sorted([f"lesson_node_{a.node_id}", *redis_client.keys("lesson_node_claims*")])


@pytest.mark.gen_test
async def test_a_node_does_not_sweep_its_former_id_before_its_records_stand_under_the_new_one(a, redis_client):
    await a.join(TEACHER, CLIENT)
    before = snapshot(redis_client)
    redis_client.hset("lesson_node_counts", a.node_id, LOST)  # by another node, which died then
    await a.beat(2)
    assert snapshot(redis_client) == before
    await a.node.check_records()
    assert snapshot(redis_client) == before
    assert known(redis_client) == {a.node_id}


@pytest.mark.gen_test
async def test_a_node_that_revives_in_the_middle_of_its_sweep_loses_nothing_in_the_end(a, b, redis_client, monkeypatch):
    await a.join(TEACHER, CLIENT)
    before = snapshot(redis_client)
    sweep, swept = b.presence.sweep, []

    async def revives_meanwhile(node_id):
        if not swept:
            await a.beat()
            await a.node.check_records()
        swept.append(await sweep(node_id))
        return swept[-1]

    monkeypatch.setattr(b.presence, "sweep", revives_meanwhile)
    await b.beat(LOST_AFTER + 1)
    assert swept
    assert snapshot(redis_client) == before
    await a.leave(TEACHER)
    await a.leave(CLIENT)
    assert redis_client.keys() == ["p1"]


@pytest.mark.gen_test
async def test_what_redis_has_lost_is_written_again_but_not_over_one_who_came_back_since(a, b, redis_client):
    await a.join(CLIENT, ClientRecord("a-q", "1", "p2", "student"))
    redis_client.flushall()
    await b.join(ClientRecord("b-p", "1", "p1", "student"))
    await a.beat()
    await a.node.check_records()
    assert redis_client.hgetall("lesson_student_1") == {"p1": "b-p", "p2": "a-q"}
    assert redis_client.hget("p1", "sid") == "b-p"
    assert redis_client.ttl("lesson_student_1") == RETENTION


def dump(redis_client):
    return {key: redis_client.dump(key) for key in redis_client.scan_iter()}


def load(redis_client, dumped):
    """Redis has been restarted from an older snapshot, or a replica that was behind has taken over."""
    redis_client.flushall()
    for key, value in dumped.items():
        redis_client.restore(key, 0, value)


@pytest.mark.gen_test
async def test_after_an_older_snapshot_of_the_same_size_the_dead_sid_is_gone_and_the_live_one_stands(
    a, redis_client, stores
):
    """As many connections as before: counting them would show nothing."""
    with stores_client(stores) as raw:
        await a.join(ClientRecord("old", "1", "p1", "student"))
        older = dump(raw)
        await a.leave(a.records["old"])
        await a.join(ClientRecord("new", "1", "p1", "student"))
        load(raw, older)
    assert redis_client.hget("lesson_student_1", "p1") == "old"
    await a.beat()
    await a.node.check_records()
    assert redis_client.hgetall("lesson_student_1") == {"p1": "new"}
    assert redis_client.hget("p1", "sid") == "new"
    await a.leave(a.records["new"])
    assert redis_client.keys() == ["p1"]
    assert own_keys(redis_client) == []


def stores_client(stores):
    return redis.Redis.from_url(stores.redis_url)


@pytest.mark.gen_test
async def test_each_heartbeat_proves_that_redis_has_the_last_write_of_the_node(a, redis_client, stores):
    await a.join(CLIENT)
    for last_write in (lambda: a.join(TEACHER), lambda: a.leave(CLIENT)):
        with stores_client(stores) as raw:
            await a.beat()
            before = dump(raw)
            former = a.node_id
            await last_write()
            load(raw, before)
        await a.beat()
        assert a.node_id != former
        await a.node.check_records()
    assert snapshot(redis_client) == {
        "lesson_teacher_1": {"ms-hill": "a-t"},
        "ms-hill": {"lesson_id": "1"},
        "p1": {"sid": "a-p", "client_id": "p1", "role": "student"},
    }


@pytest.mark.gen_test
async def test_records_lost_while_the_index_is_kept_are_written_again(a, redis_client):
    """One master of a cluster came back empty: the count and the index are on another."""
    await a.join(CLIENT, TEACHER)
    before = snapshot(redis_client)
    for key in redis_client.keys("*"):
        redis_client.delete(key)
    await a.node.check_records()
    assert snapshot(redis_client) == before


@pytest.mark.gen_test
async def test_a_lost_seat_map_is_made_again_and_one_in_use_does_not_end_by_its_ttl(a, redis_client):
    a.lessons = {"1": "a guest", "2": "another"}
    await a.seats.ensure_map("2", 3)
    redis_client.expire("lesson_seat_2", 10)
    await a.node.check_records()
    assert redis_client.hgetall("lesson_seat_1") == {"1": "", "2": "", "3": ""}
    assert redis_client.ttl("lesson_seat_2") == RETENTION


@pytest.mark.gen_test
async def test_a_join_that_was_written_under_the_former_id_meanwhile_is_not_lost_with_it(
    a, b, redis_client, monkeypatch
):
    """Its answer comes when the check has begun, and its claim is swept with the former id."""
    redis_client.flushall()
    restore = a.restore

    async def joins_meanwhile(sids):
        monkeypatch.undo()
        former, a.presence.incarnation = a.presence.incarnation, incarnation
        await a.join(TEACHER)
        a.presence.incarnation = former
        return await restore(sids)

    incarnation = a.presence.incarnation
    await a.join(CLIENT)
    redis_client.flushall()
    await a.beat()
    assert a.presence.incarnation is not incarnation
    a.node._wanted.clear()
    monkeypatch.setattr(a, "restore", joins_meanwhile)
    await a.node.check_records()
    assert a.node._wanted.is_set()
    await a.node.check_records()
    assert snapshot(redis_client).keys() == {"lesson_student_1", "lesson_teacher_1", "p1", "ms-hill"}
    assert known(redis_client) == {a.node_id}


@pytest.mark.gen_test
async def test_a_client_that_joins_again_while_strays_are_removed_stands(a, redis_client, monkeypatch):
    """A check once chose the strays and then removed them one by one, and with them who had joined meanwhile."""
    failed = [ClientRecord(f"sid-{number}", "1", f"p{number}", "student") for number in range(5)]
    for record in failed:  # Redis carries the joins out; the removals come too late to find anything
        await a.presence.write(record)
        claim = a.presence._held.pop(record.sid)
        claim.incarnation.claims.discard(claim.number)
    remove, retried = a.presence._remove, []

    async def retries_first(record, node_id, number, *, undo):
        if not retried:
            retried.extend(failed)
            await a.join(*failed)
        await remove(record, node_id, number, undo=undo)

    monkeypatch.setattr(a.presence, "_remove", retries_first)
    await a.node.check_records()
    assert retried
    assert redis_client.hgetall("lesson_student_1") == {record.client_id: record.sid for record in failed}
    assert await a.presence.check([record.sid for record in failed]) == []


@pytest.mark.gen_test
async def test_the_log_is_told_how_much_redis_and_the_node_differed(a, redis_client, caplog):
    await a.join(CLIENT, TEACHER)
    await a.node.check_records()
    assert logged(caplog) == []
    redis_client.delete("lesson_student_1", "lesson_teacher_1")
    await a.node.check_records()
    assert logged(caplog) == ["Redis and this node differed: 2 records written again, 0 removed"]
    for sid in ("b-p", "c-p", "d-p"):  # joins that failed, and were written late
        await a.presence.write(ClientRecord(sid, "1", sid, "student"))
        a.presence.incarnation.claims.discard(a.presence._held.pop(sid).number)
    await a.node.check_records()
    assert logged(caplog) == ["Redis and this node differed: 0 records written again, 3 removed"]
    redis_client.hset("lesson_node_counts", a.node_id, LOST)
    await a.beat()
    caplog.clear()
    await a.node.check_records()
    assert logged(caplog) == ["Redis and this node differed: 2 records written again, 2 removed"]
    await a.node.check_records()
    assert logged(caplog) == []


@pytest.mark.gen_test
async def test_after_a_failure_of_redis_all_records_are_checked(a):
    a.node._wanted.clear()
    await a.beat()
    assert not a.node._wanted.is_set()
    a.store.failures += 1
    await a.beat()
    assert a.node._wanted.is_set()
    a.node._wanted.clear()
    await a.beat()
    assert not a.node._wanted.is_set()


# What it costs


def commands_of(redis_client):
    return sum(stat["calls"] for stat in redis_client.info("commandstats").values())


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
        the batches that are checked from now on, of records and of seat maps.
    """
    house.records = {f"sid-{number}": None for number in range(2 * BATCH_SIZE + 1)}
    house.lessons = {str(number): "sid-1" for number in range(2 * BATCH_SIZE + 1)}
    batches = []

    async def check(names):
        batches.append(names)
        return []

    monkeypatch.setattr(house.presence, "check", check)
    monkeypatch.setattr(house.seats, "missing", check)
    return batches


@pytest.mark.parametrize("paced", [True, False])
def test_a_round_checks_each_record_and_seat_map_once_and_not_all_at_the_same_time(io_loop, a, monkeypatch, paced):
    monkeypatch.setattr(nodes, "CHECK_PERIOD", 0.1)
    batches = hold_many(a, monkeypatch)
    begun = io_loop.time()
    io_loop.run_sync(lambda: a.node.check_records(paced=paced), timeout=5)
    assert list(chain(*batches)) == [*a.records, *a.lessons]
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
    monkeypatch.setattr(nodes, "RETRY_INTERVAL", 0.02)
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
        await until(lambda: redis_client.hlen(server._presence.index_key(server._presence.incarnation.node_id)) == 2)
        assert server._metrics.registry.get_sample_value("lesson_reconnects_total") == 0
    await until(lambda: sorted(redis_client.keys()) == ["lesson_seat_1", "p1"])


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
