"""nodes.py: what a node tells the metrics of other nodes, and of Redis and itself differing."""

import asyncio

import pytest
from node_keys import CLIENT, TEACHER

from lesson_server.stores.redis.nodes import LOST_AFTER
from lesson_server.stores.redis.records import ClientRecord
from lesson_server.stores.redis.removals import BATCH_SIZE


@pytest.fixture
def c(open_house):
    return open_house()


async def all_beat(*houses, times=1):
    for _ in range(times):
        for house in houses:
            await house.beat()


# Nodes


@pytest.mark.gen_test
async def test_a_lost_node_is_counted_once_by_all_nodes_together(a, b, c):
    await a.join(CLIENT)
    await all_beat(b, c, times=3 * LOST_AFTER)
    assert len(b.lost) + len(c.lost) == 1


@pytest.mark.gen_test
async def test_a_lost_node_is_counted_once_though_its_sweep_takes_long(a, b, monkeypatch):
    await a.join(CLIENT)
    monkeypatch.setattr(b.presence.removals, "sweep", lambda node_id: asyncio.Event().wait())
    for _ in range(2 * LOST_AFTER):
        await b.node.beat()
    assert len(b.lost) == 1


@pytest.mark.gen_test
async def test_a_node_that_has_left_in_order_is_not_lost(a, b, c):
    await a.node.start()
    await all_beat(b, c)
    await a.node.close()
    await all_beat(b, c, times=3 * LOST_AFTER)
    assert b.lost == c.lost == []


@pytest.mark.gen_test
async def test_a_flush_of_redis_loses_no_node(a, b, redis_client):
    await a.join(CLIENT)
    await all_beat(a, b)
    redis_client.flushall()
    for _ in range(3 * LOST_AFTER):
        await all_beat(a, b)
        await asyncio.gather(a.node.check_records(), b.node.check_records())
    assert a.lost == b.lost == []
    assert (a.node.alive, b.node.alive) == (2, 2)


@pytest.mark.gen_test
async def test_the_nodes_that_are_alive_are_those_whose_heartbeats_are_seen(a, b, c):
    await all_beat(a, b, c, times=2)
    assert [house.node.alive for house in (a, b, c)] == [3, 3, 3]
    await all_beat(b, c, times=LOST_AFTER - 1)
    assert [house.node.alive for house in (b, c)] == [3, 3]
    await all_beat(b, c)
    assert [house.node.alive for house in (b, c)] == [2, 2]
    await all_beat(b, c)
    assert [house.node.alive for house in (b, c)] == [2, 2]


# Presence records


@pytest.mark.gen_test
async def test_ghosts_are_counted_once_whoever_sweeps_them(a, b, c):
    count = 2 * BATCH_SIZE
    for number in range(count):
        await a.join(ClientRecord(f"a-{number}", "1", f"p{number}", "student"))
    await b.beat(LOST_AFTER)
    await c.beat(LOST_AFTER)
    await asyncio.gather(b.beat(), c.beat())
    assert b.corrected["swept"] + c.corrected["swept"] == count
    assert b.corrected.keys() | c.corrected.keys() == {"swept"}


@pytest.mark.gen_test
async def test_records_that_redis_has_lost_are_counted_as_restored(a, redis_client):
    await a.join(CLIENT, TEACHER)
    await a.node.check_records()
    assert a.corrected.total() == 0
    redis_client.delete("lesson_student_1")
    await a.node.check_records()
    await a.node.check_records()
    assert a.corrected == {"restored": 1}


@pytest.mark.gen_test
async def test_records_without_a_connection_are_counted_as_removed(a):
    await a.join(CLIENT, TEACHER)
    a.presence.claims.incarnation.claims.clear()  # as if these were late writes of failed joins
    del a.records[CLIENT.sid], a.records[TEACHER.sid]
    await a.node.check_records()
    assert a.corrected["removed"] == 2
    assert a.corrected["swept"] == 0


@pytest.mark.gen_test
async def test_what_a_node_wrote_under_a_former_id_is_no_ghost(a, b):
    await a.join(CLIENT, TEACHER)
    a.presence.claims.incarnation.acknowledged += 1_000  # Redis came back with older data
    await a.beat()
    await a.node.check_records()
    assert a.corrected["restored"] == 2
    assert a.corrected["swept"] == a.corrected["removed"] == 0
