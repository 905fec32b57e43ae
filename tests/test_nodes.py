"""nodes.py against a real Valkey: heartbeats are sent one by one, and a node is lost when its entry in Redis is old."""

import asyncio

import pytest
from test_end_to_end import SUCCESS, client, join, until

from lesson_server import nodes
from lesson_server.nodes import Node
from lesson_server.presence import ClientRecord, Presence, TeacherRecord
from lesson_server.redis_store import RedisStore

RETENTION = 7 * 86_400


class House:
    """A node with connections of its own, which are no more than their records."""

    def __init__(self, node_id, url):
        self.store = RedisStore(url, "", 2.0, 8)
        self.presence = Presence(self.store, RETENTION, node_id)
        self.node = Node(node_id, self.store, self.presence, self)
        self.records = {}
        self.idle = set()

    async def join(self, record):
        self.records[record.sid] = record
        write = self.presence.set_teacher if isinstance(record, TeacherRecord) else self.presence.set_client
        await write(record)

    async def beat(self, complete=True):
        """One heartbeat, with everything that it begins."""
        done = await self.node._beat(complete)
        await asyncio.gather(*self.node._sweeps.values())
        return done

    async def close(self):
        await self.node.close()
        await self.presence.close()
        await self.store.close()

    # The protocol nodes.Connections

    def holds(self, sid):
        return sid in self.records or sid in self.idle

    def may_be_present(self, sid):
        return sid in self.records

    async def restore(self, indexed):
        for sid, record in self.records.items():
            if sid not in indexed:
                await self.presence.restore(record)


@pytest.fixture
def open_house(io_loop, stores):
    houses = []

    def open_house(node_id):
        houses.append(House(node_id, stores.redis_url))
        io_loop.run_sync(houses[-1].beat)
        return houses[-1]

    yield open_house
    for house in houses:
        io_loop.run_sync(house.close)


@pytest.fixture
def a(open_house):
    return open_house("a")


@pytest.fixture
def b(open_house):
    return open_house("b")


@pytest.fixture
def c(open_house):
    return open_house("c")


def lose(redis_client, node_id):
    """The node was last heard of in 1970."""
    redis_client.hset("lesson_nodes", node_id, 1)


def own_keys(redis_client):
    return sorted(redis_client.keys("lesson_node*"))


@pytest.mark.gen_test
async def test_a_node_is_known_by_its_heartbeat_and_its_index_has_what_it_wrote(a, redis_client):
    await a.join(TeacherRecord("sid-t", "1", "ms-hill"))
    await a.join(ClientRecord("sid-p", "1", "p1", "student"))
    assert redis_client.hkeys("lesson_nodes") == ["a"]
    assert redis_client.hgetall("lesson_node_a") == {
        "sid-t": '["teacher","1","ms-hill"]',
        "sid-p": '["participant","1","p1","student"]',
    }
    await a.beat()
    assert 0 < redis_client.ttl("lesson_node_a") <= nodes.INDEX_LIFE
    for record in a.records.values():
        await a.presence.remove(record)
    assert own_keys(redis_client) == ["lesson_nodes"]


@pytest.mark.gen_test
async def test_a_lost_node_is_swept_of_exactly_what_still_holds_its_sids(a, b, redis_client):
    await a.join(TeacherRecord("a-t", "1", "ms-hill"))
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    await a.join(ClientRecord("a-q", "1", "p2", "student"))
    await b.join(ClientRecord("b-p", "1", "p1", "student"))  # came back by another node
    await b.join(ClientRecord("b-r", "1", "p3", "student"))
    lose(redis_client, "a")
    await b.beat()
    assert redis_client.hgetall("lesson_student_1") == {"p1": "b-p", "p3": "b-r"}
    assert not redis_client.exists("lesson_teacher_1", "ms-hill", "lesson_node_a")
    assert redis_client.hkeys("lesson_nodes") == ["b"]
    assert redis_client.hget("p2", "sid") == "a-q"  # for its 24 h: that is how a reconnect is known


@pytest.mark.gen_test
async def test_a_teacher_who_moved_to_another_lesson_on_another_node_stays_in_it(a, b, redis_client):
    await a.join(TeacherRecord("a-t", "1", "ms-hill"))
    await b.join(TeacherRecord("b-t", "2", "ms-hill"))
    lose(redis_client, "a")
    await b.beat()
    assert not redis_client.exists("lesson_teacher_1")
    assert redis_client.hgetall("lesson_teacher_2") == {"ms-hill": "b-t"}
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "2"}


@pytest.mark.gen_test
async def test_a_teacher_who_comes_back_in_the_middle_of_a_removal_keeps_both_records(a, b, redis_client, monkeypatch):
    await a.join(TeacherRecord("old", "1", "ms-hill"))
    run = a.store.run

    async def comes_back_after(*commands):
        answers = await run(*commands)
        monkeypatch.undo()
        await b.join(TeacherRecord("new", "1", "ms-hill"))
        return answers

    monkeypatch.setattr(a.store, "run", comes_back_after)
    await a.presence.remove(TeacherRecord("old", "1", "ms-hill"))
    assert redis_client.hgetall("lesson_teacher_1") == {"ms-hill": "new"}
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "1"}
    assert redis_client.ttl("ms-hill") == RETENTION


@pytest.mark.gen_test
async def test_exactly_one_of_the_others_sweeps(a, b, c, redis_client, caplog):
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    lose(redis_client, "a")
    await asyncio.gather(b.beat(), c.beat(), b.beat(), c.beat())
    assert sum("node a is lost" in record.message for record in caplog.records) == 1
    assert not redis_client.exists("lesson_student_1")


@pytest.mark.gen_test
async def test_a_node_that_starts_sweeps_what_it_finds_lost(b, a, redis_client):
    """The only node of a set-up, started again after a crash."""
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    lose(redis_client, "a")
    await b.node.start()
    await until(lambda: own_keys(redis_client) == ["lesson_nodes"])
    assert not redis_client.exists("lesson_student_1")


@pytest.mark.gen_test
async def test_a_sweep_that_was_begun_and_not_ended_is_taken_over(a, b, c, redis_client, monkeypatch):
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    lose(redis_client, "a")
    with monkeypatch.context() as patch:
        patch.setattr(b.node, "_begin_sweeps", lambda lost: None)  # b dies at this moment
        await b.beat()
    await c.beat()
    assert redis_client.exists("lesson_student_1")  # b may still be at it
    redis_client.hset("lesson_nodes", "lost:a", 1)
    await c.beat()
    assert not redis_client.exists("lesson_student_1")
    assert "lost:a" not in redis_client.hkeys("lesson_nodes")


@pytest.mark.gen_test
async def test_a_long_sweep_does_not_hold_up_the_heartbeat(a, b, redis_client, monkeypatch):
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    lose(redis_client, "a")
    go_on = asyncio.Event()
    take_back = b.presence.take_back_of

    async def slowly(node_id, record):
        await go_on.wait()
        await take_back(node_id, record)

    monkeypatch.setattr(b.presence, "take_back_of", slowly)
    assert await b.node._beat(True)
    lose(redis_client, "b")
    assert await b.node._beat(True)
    assert int(redis_client.hget("lesson_nodes", "b")) > 1
    go_on.set()
    await asyncio.gather(*b.node._sweeps.values())
    assert not redis_client.exists("lesson_student_1")


@pytest.mark.gen_test
async def test_a_node_that_was_taken_for_lost_and_lives_writes_its_presence_again_after_the_sweep(a, b, redis_client):
    await a.join(TeacherRecord("a-t", "1", "ms-hill"))
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    before = {key: redis_client.hgetall(key) for key in redis_client.keys("*")}
    lose(redis_client, "a")
    known, swept, lost, _ = await b.node._send_heartbeat()
    assert (known, swept, lost) == (True, False, ["a"])
    assert not await a.beat()  # in the middle of the sweep: it waits
    await b.node._sweep("a")
    assert redis_client.keys() == ["p1"]
    assert await a.beat(complete=False)
    assert {key: redis_client.hgetall(key) for key in redis_client.keys("*")} == before
    assert redis_client.hlen("lesson_node_a") == 2


@pytest.mark.gen_test
async def test_what_redis_has_lost_is_written_again_but_not_over_one_who_came_back_since(a, b, redis_client):
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    await a.join(ClientRecord("a-q", "1", "p2", "student"))
    redis_client.flushall()
    await b.join(ClientRecord("b-p", "1", "p1", "student"))
    await a.beat()
    assert redis_client.hgetall("lesson_student_1") == {"p1": "b-p", "p2": "a-q"}
    assert redis_client.hget("p1", "sid") == "b-p"
    assert redis_client.hget("p2", "sid") == "a-q"
    assert redis_client.ttl("lesson_student_1") == RETENTION


@pytest.mark.gen_test
async def test_an_older_state_of_redis_is_noticed_by_the_second_heartbeat(a, redis_client):
    """A failover to a replica that was behind: the node is known, its index is not what it was."""
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    redis_client.delete("lesson_node_a", "lesson_student_1")
    await a.beat()
    await a.beat()
    assert redis_client.hgetall("lesson_student_1") == {"p1": "a-p"}


@pytest.mark.parametrize("still_here", [True, False])
def test_the_late_write_of_a_join_that_was_given_up_is_removed(io_loop, a, redis_client, still_here):
    async def story():
        record = ClientRecord("a-p", "1", "p1", "student")
        await a.presence.remove(record, forget=True)
        await a.presence.set_client(record)  # Redis got to it after the removal
        a.presence.held.clear()
        if still_here:
            a.idle.add("a-p")
        await a.beat()
        assert redis_client.exists("lesson_student_1")  # a join that is under way looks like this too
        await a.beat()
        assert redis_client.keys() == ([] if still_here else ["p1"])

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_a_heartbeat_costs_the_same_however_many_connections_there_are(a, redis_client):
    def commands():
        return sum(stat["calls"] for stat in redis_client.info("commandstats").values())

    costs = []
    for start in (0, 10, 500):
        for number in range(start, start + 490 if start else 10):
            await a.join(ClientRecord(f"sid-{number}", "1", f"p{number}", "student"))
        before = commands()
        await a.beat()
        costs.append(commands() - before)
    assert len(set(costs)) == 1


@pytest.mark.gen_test
async def test_a_node_that_leaves_in_order_leaves_no_key(a, redis_client):
    await a.node.start()
    record = ClientRecord("a-p", "1", "p1", "student")
    await a.join(record)
    await a.presence.remove(record)
    await a.node.close()
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_what_a_node_leaves_behind_is_swept_by_the_others(a, b, redis_client):
    """Its connections' ends were cut off by a Redis that hung."""
    await a.node.start()
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    await a.node.close()
    assert "a" in redis_client.hkeys("lesson_nodes")
    lose(redis_client, "a")
    await b.beat()
    assert redis_client.keys() == ["p1"]
    assert own_keys(redis_client) == ["lesson_nodes"]


# Whole servers, by their own heartbeats


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(nodes, "HEARTBEAT_INTERVAL", 0.02)
    monkeypatch.setattr(nodes, "RETRY_INTERVAL", 0.02)


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
        await until(lambda: redis_client.hlen(server._presence.index_key(server._presence._node_id)) == 2)
        assert server._metrics.registry.get_sample_value("lesson_reconnects_total") == 0
    await until(lambda: sorted(redis_client.keys()) == ["lesson_seat_1", "p1"])


@pytest.mark.gen_test
async def test_a_heartbeat_that_fails_is_not_the_last(quick, server, redis_client, monkeypatch, caplog):
    async def defect():
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(server._node, "_send_heartbeat", defect)
        await until(lambda: "heartbeat failed" in caplog.text)
    redis_client.flushall()
    await until(lambda: redis_client.hlen("lesson_nodes") == 1)
