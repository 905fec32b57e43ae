"""nodes.py when Redis comes back empty or older."""

import pytest
import redis
from node_keys import CLIENT, RETENTION, TEACHER, known, logged, own_keys, snapshot

from lesson_server.stores.redis.nodes import LOST, LOST_AFTER
from lesson_server.stores.redis.records import ClientRecord


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
    claims = redis_client.keys("lesson_node_claims*")
    assert own_keys(redis_client) == sorted([f"lesson_node_{a.node_id}", "lesson_node_lessons", *claims])


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
    sweep, swept = b.presence.removals.sweep, []

    async def revives_meanwhile(node_id):
        if not swept:
            await a.beat()
            await a.node.check_records()
        swept.append(await sweep(node_id))
        return swept[-1]

    monkeypatch.setattr(b.presence.removals, "sweep", revives_meanwhile)
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
    a.lessons = {"1": ["a guest", "a friend"], "2": ["another"]}
    await a.seats.ensure_map("2", 3)
    seat_keys = ["lesson_seat_2", "lesson_node_seats:{lesson_seat_2}"]
    for key in seat_keys:
        assert redis_client.expire(key, 10)
    restored = []
    restore = a.restore

    async def restore_and_note(sids):
        restored.extend(sids)
        return await restore(sids)

    a.restore = restore_and_note
    await a.node.check_records()
    assert redis_client.hgetall("lesson_seat_1") == {"1": "", "2": "", "3": ""}
    assert [redis_client.ttl(key) for key in seat_keys] == [RETENTION, RETENTION]
    assert restored == ["a guest", "a friend"]  # each may have had a seat


@pytest.mark.gen_test
async def test_a_join_that_was_written_under_the_former_id_meanwhile_is_not_lost_with_it(
    a, b, redis_client, monkeypatch
):
    """Its answer comes when the check has begun, and its claim is swept with the former id."""
    redis_client.flushall()
    restore = a.restore

    async def joins_meanwhile(sids):
        monkeypatch.undo()
        former, a.presence.claims.incarnation = a.presence.claims.incarnation, incarnation
        await a.join(TEACHER)
        a.presence.claims.incarnation = former
        return await restore(sids)

    incarnation = a.presence.claims.incarnation
    await a.join(CLIENT)
    redis_client.flushall()
    await a.beat()
    assert a.presence.claims.incarnation is not incarnation
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
    remove, retried = a.presence.claims.remove, []

    async def retries_first(record, node_id, number, *, undo):
        if not retried:
            retried.extend(failed)
            await a.join(*failed)
        await remove(record, node_id, number, undo=undo)

    monkeypatch.setattr(a.presence.claims, "remove", retries_first)
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
        a.presence.claims.incarnation.claims.discard(a.presence._held.pop(sid).number)
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
