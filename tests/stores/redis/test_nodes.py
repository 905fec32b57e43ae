"""nodes.py against a real Valkey: heartbeats are sent one by one, and the checks of the records are called by hand."""

import asyncio

import pytest
from node_keys import CLIENT, TEACHER, commands_of, known, logged, own_keys, snapshot
from waiting import until

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.redis import nodes
from lesson_server.stores.redis.nodes import LOST_AFTER
from lesson_server.stores.redis.records import ClientRecord
from lesson_server.stores.redis.removals import BATCH_SIZE


@pytest.fixture
def c(open_house):
    return open_house()


@pytest.mark.gen_test
async def test_a_node_is_known_by_its_count_which_its_heartbeats_and_its_writes_raise(a, redis_client):
    counts = [int(redis_client.hget("lesson_node_counts", a.node_id))]
    for step in (a.beat, lambda: a.join(CLIENT), lambda: a.leave(CLIENT)):
        await step()
        counts.append(int(redis_client.hget("lesson_node_counts", a.node_id)))
    assert counts == [1, 2, 3, 4]
    assert a.presence.claims.incarnation.acknowledged == 4


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
        outage.setattr(b.store, "execute", refuse)
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

    monkeypatch.setattr(b.presence.removals, "sweep", dies)
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
@pytest.mark.parametrize("step", ["execute", "sweep"])
def test_a_sweep_that_failed_is_begun_again(io_loop, a, b, redis_client, monkeypatch, caplog, error, told, step):
    """The log knows of an outage."""
    sweeper = b.store if step == "execute" else b.presence.removals
    do, failed = getattr(sweeper, step), []

    async def fails_once(*arguments, **more):
        if not failed and (step == "sweep" or arguments[0][0] == "HSET"):
            failed.append(arguments)
            raise error
        return await do(*arguments, **more)

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
    sweep = b.presence.removals.sweep

    async def slowly(node_id):
        await go_on.wait()
        return await sweep(node_id)

    monkeypatch.setattr(b.presence.removals, "sweep", slowly)
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
    monkeypatch.setattr(a.presence.removals, "sweep", lambda node_id: asyncio.Event().wait())
    a.node._begin_sweep(b.node_id)
    tasks = [*a.node._tasks, *a.node._sweeps.values()]
    await a.node.close()
    assert len(tasks) == 3
    assert all(task.done() for task in tasks)


@pytest.mark.gen_test
async def test_a_node_that_could_not_start_is_not_held_up_by_redis_once_more(a, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(a.store, "execute", None)
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
            outage.setattr(a.store, "execute", silent)
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
