"""Presence after Redis has lost something: checks, restores, strays and sweeps."""

import asyncio

import pytest
from presences import CLIENT, DAY, RECORDS, TEACHER, MasterDown, lesson_field, other, own_keys
from redis.crc import key_slot

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import removals
from lesson_server.stores.redis.presence_scripts import WRITE
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord, decode, encode


def snapshot(redis_client):
    return {key: redis_client.hgetall(key) for key in redis_client.keys("*")}


# What Redis has lost


@RECORDS
@pytest.mark.parametrize("restored_first", ["first", "second"])
def test_after_flushall_the_newest_stands_whoever_is_restored_first(
    io_loop, presence, elsewhere, redis_client, record, restored_first
):
    nodes = {"first": presence, "second": elsewhere}

    async def scenario():
        for sid, node in nodes.items():
            await node.write(other(record, sid))
        before = snapshot(redis_client)
        redis_client.flushall()
        for sid in (restored_first, *(nodes.keys() - {restored_first})):
            await nodes[sid].restore(other(record, sid))
        assert snapshot(redis_client) == before
        assert lesson_field(redis_client, record) == "second"
        await elsewhere.remove("second")
        assert lesson_field(redis_client, record) == "first"

    io_loop.run_sync(scenario)


@RECORDS
def test_who_joined_after_the_loss_stays_before_who_is_restored(io_loop, presence, elsewhere, redis_client, record):
    async def scenario():
        await presence.write(other(record, "first"))
        redis_client.flushall()
        await elsewhere.write(other(record, "second"))
        await presence.restore(other(record, "first"))
        assert lesson_field(redis_client, record) == "second"

    io_loop.run_sync(scenario)


@RECORDS
def test_under_a_new_incarnation_the_claim_is_replaced_and_the_sweep_of_the_former_one_takes_nothing(
    io_loop, presence, elsewhere, redis_client, record
):
    async def scenario():
        await presence.write(record)
        before = snapshot(redis_client)
        former = presence.claims.incarnation.node_id
        presence.claims.begin_incarnation()
        assert await presence.check([record.sid]) == [record.sid]
        await presence.restore(record)
        assert await presence.check([record.sid]) == []
        assert await elsewhere.removals.sweep(former) == 1
        assert snapshot(redis_client) == before
        assert await elsewhere.removals.sweep(former) == 0
        await presence.remove(record.sid)
        await presence.removals.settled()
        assert lesson_field(redis_client, record) is None
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@RECORDS
def test_a_claim_that_was_replaced_is_gone_with_the_one_in_its_place(io_loop, presence, redis_client, record):
    async def scenario():
        await presence.write(record)
        presence.claims.begin_incarnation()
        await presence.restore(record)
        await presence.remove(record.sid)
        assert lesson_field(redis_client, record) is None
        assert not [key for key in own_keys(redis_client) if "claims" in key]

    io_loop.run_sync(scenario)


@RECORDS
def test_a_claim_counts_as_missing_until_redis_has_answered_that_it_replaced_the_former_one(
    io_loop, presence, redis_client, record
):
    """What is not answered in a check counts as standing, and what is replaced is swept after the check."""

    async def scenario():
        await presence.write(record)
        presence.claims.begin_incarnation()
        presence._store.fault = "unanswered"
        with pytest.raises(StoreUnavailable):
            await presence.restore(record)
        presence._store.fault = None
        assert await presence.check([record.sid]) == [record.sid]
        await presence.restore(record)
        assert await presence.check([record.sid]) == []

    io_loop.run_sync(scenario)


@RECORDS
@pytest.mark.parametrize("fault", ["unanswered", "unreachable"])
def test_an_end_in_the_middle_of_a_move_to_a_new_incarnation_leaves_nothing(
    io_loop, presence, redis_client, record, fault
):
    async def scenario():
        await presence.write(record)
        node_ids = [presence.claims.incarnation.node_id]
        for _ in range(2):
            node_ids.append(presence.claims.begin_incarnation().node_id)
            presence._store.fault = fault
            with pytest.raises(StoreUnavailable):
                await presence.restore(record)
        presence._store.fault = None
        await presence.remove(record.sid)
        await presence.removals.settled()
        assert presence._store.injected == 2
        assert lesson_field(redis_client, record) is None
        # Redis may still carry out what it did not answer: a check of the records removes it again.
        for node_id in node_ids:
            await presence.removals.sweep(node_id)
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


def lose_field(redis_client, record):
    key = "lesson_teacher_1" if record is TEACHER else "lesson_student_1"
    redis_client.hdel(key, *redis_client.hkeys(key))


def lose_person(redis_client, record):
    redis_client.delete("ms-hill" if record is TEACHER else "p1")


def lose_claims(redis_client, record):
    redis_client.delete(*(key for key in own_keys(redis_client) if "claims" in key))


def lose_all_but_the_index(redis_client, record):
    redis_client.delete(*redis_client.keys())
    lose_claims(redis_client, record)


def lose_index(redis_client, record):
    index_key, list_key = (key for key in sorted(own_keys(redis_client)) if "claims" not in key)
    assert list_key == "lesson_node_lessons"
    redis_client.delete(index_key)


def name_somebody_else(redis_client, record):
    key = "lesson_teacher_1" if record is TEACHER else "lesson_student_1"
    redis_client.hset(key, redis_client.hkeys(key)[0], "a dead sid")


@RECORDS
@pytest.mark.parametrize(
    "lose",
    [lose_field, lose_person, lose_claims, lose_all_but_the_index, lose_index, name_somebody_else],
    ids=lambda lose: lose.__name__,
)
def test_a_check_finds_whatever_of_a_record_is_lost_and_a_restore_mends_it(
    io_loop, presence, redis_client, record, lose
):
    async def scenario():
        await presence.write(record)
        before = snapshot(redis_client), len(own_keys(redis_client))
        assert await presence.check([record.sid]) == []
        lose(redis_client, record)
        assert await presence.check([record.sid]) == [record.sid]
        await presence.restore(record)
        assert await presence.check([record.sid]) == []
        assert (snapshot(redis_client), len(own_keys(redis_client))) == before

    io_loop.run_sync(scenario)


@RECORDS
def test_a_check_gives_a_claim_one_order_on_all_entries(io_loop, presence, redis_client, record):
    """Of two joins at the same moment each may have come first on one entry."""

    async def scenario():
        await presence.write(record)
        order = presence._held[record.sid].order
        claims = [key for key in own_keys(redis_client) if "claims" in key]
        assert len(claims) == 2
        for key in claims:
            (claim,) = redis_client.zrange(key, 0, -1)
            redis_client.zadd(key, {claim: 1})
        assert await presence.check([record.sid]) == []
        for key in claims:
            assert [score for _, score in redis_client.zrange(key, 0, -1, withscores=True)] == [float(order)]

    io_loop.run_sync(scenario)


@RECORDS
def test_what_is_checked_does_not_end_by_its_ttl(io_loop, presence, redis_client, record):
    async def scenario():
        await presence.write(record)
        keys = redis_client.keys("*") + [key for key in own_keys(redis_client) if "claims" in key]
        before = {key: redis_client.ttl(key) for key in keys}
        for key in keys:
            redis_client.expire(key, 100)
        await presence.check([record.sid])
        assert {key: redis_client.ttl(key) for key in keys} == before

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_check_of_a_key_of_another_type_does_not_fail_those_of_others(presence, redis_client):
    await presence.write(CLIENT)
    await presence.write(TEACHER)
    redis_client.delete("lesson_student_1", "ms-hill")
    redis_client.set("lesson_student_1", "of another type")
    assert await presence.check([CLIENT.sid, TEACHER.sid]) == [TEACHER.sid]


@pytest.mark.gen_test
async def test_a_connection_that_has_ended_since_does_not_fail_the_check_of_others(presence):
    await presence.write(CLIENT)
    assert await presence.check(["ended", CLIENT.sid]) == ["ended"]


@pytest.mark.gen_test
async def test_a_defect_in_a_check_reaches_who_asked(presence, monkeypatch):
    await presence.write(CLIENT)
    monkeypatch.setattr(presence._store, "execute", lambda **_: asyncio.sleep(0, [RuntimeError("a defect")] * 3))
    with pytest.raises(RuntimeError):
        await presence.check([CLIENT.sid])


# Strays, and what a lost node has written


async def remove_strays(presence):
    return sum([count async for count in presence.removals.strays()])


@RECORDS
@pytest.mark.parametrize(("patience", "removed"), [(0.0, 1), (10.0, 0)], ids=["after LATE_WRITE", "before it"])
def test_a_write_that_was_not_answered_stays_in_the_index_until_it_can_not_be_carried_out_any_more(
    io_loop, presence, redis_client, monkeypatch, record, patience, removed
):
    monkeypatch.setattr(removals, "LATE_WRITE", patience)

    async def scenario():
        presence._store.fault = "unanswered"
        with pytest.raises(StoreUnavailable):
            await presence.write(record)
        presence._store.fault = None
        claim = presence._held[record.sid]
        await presence.remove(record.sid, undo=True)
        await presence.removals.settled()
        assert lesson_field(redis_client, record) is None
        for entry in record.entries():  # the rest of the step, after the removal
            await presence._store.execute(presence.claims._script(WRITE, claim, entry, int(entry.outlives)))
        assert await remove_strays(presence) == removed
        assert lesson_field(redis_client, record) is None
        assert redis_client.hlen(presence.claims.index_key(presence.claims.incarnation.node_id)) == 1 - removed
        assert presence.claims.incarnation.late.keys() == ({1} if not removed else set())

    io_loop.run_sync(scenario)


@RECORDS
def test_the_late_write_of_a_join_that_failed_is_removed_as_if_it_had_not_been_tried(
    io_loop, presence, redis_client, record
):
    async def scenario():
        await presence.write(record)
        claim = presence._held[record.sid]
        await presence.remove(record.sid, undo=True)
        await presence.removals.settled()
        presence._held[record.sid] = claim
        await presence.claims._write(  # Redis gets to it after the removal
            claim,
            [presence.claims._script(WRITE, claim, entry, int(entry.outlives)) for entry in record.entries()],
        )
        del presence._held[record.sid]
        assert lesson_field(redis_client, record) == record.sid
        assert await remove_strays(presence) == 1
        assert redis_client.keys() == []
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_strays_are_found_however_many_there_are(presence, redis_client):
    """Redis keeps a small hash as a list, and answers all of it at any position of a scan."""
    count = 10 * removals.BATCH_SIZE
    index_key = presence.claims.index_key(presence.claims.incarnation.node_id)
    redis_client.hset(index_key, mapping={number: encode(CLIENT) for number in range(count)})
    assert await remove_strays(presence) == count
    assert not redis_client.exists(index_key)


@pytest.mark.gen_test
async def test_those_who_are_there_or_join_or_are_being_removed_are_no_strays(presence, redis_client):
    await presence.write(CLIENT)
    presence._store.fault = "unanswered"
    with pytest.raises(StoreUnavailable):
        await presence.write(TEACHER)
    presence._store.fault = None
    assert await remove_strays(presence) == 0
    assert lesson_field(redis_client, TEACHER) == "sid-t"
    assert lesson_field(redis_client, CLIENT) == "sid-p"


@pytest.mark.gen_test
async def test_a_sweep_takes_a_part_at_a_time_and_leaves_what_others_have_written(
    presence, elsewhere, redis_client, monkeypatch
):
    monkeypatch.setattr(removals, "BATCH_SIZE", 3)
    for number in range(5):
        await presence.write(ClientRecord(f"old-{number}", "1", f"p{number}", "student"))
    await presence.write(TEACHER)
    await elsewhere.write(ClientRecord("new", "1", "p1", "student"))
    await elsewhere.write(TeacherRecord("sid-2", "2", "ms-hill"))
    swept = [await elsewhere.removals.sweep(presence.claims.incarnation.node_id) for _ in range(3)]
    assert swept == [3, 3, 0]
    assert redis_client.hgetall("lesson_student_1") == {"p1": "new"}
    assert not redis_client.exists("lesson_teacher_1")
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "2"}
    assert redis_client.hget("p2", "sid") == "old-2"  # for its 24 h: that is how a reconnect is known


@pytest.mark.gen_test
async def test_a_sweep_is_not_held_up_by_a_record_that_redis_refuses(presence, elsewhere, redis_client):
    await presence.write(CLIENT)
    await presence.write(TEACHER)
    redis_client.delete("p1")
    redis_client.set("p1", "of another type")
    assert await elsewhere.removals.sweep(presence.claims.incarnation.node_id) == 2
    assert not redis_client.exists("lesson_student_1", "lesson_teacher_1", "ms-hill")


@pytest.mark.parametrize("options", ["?protocol=2", "?protocol=3", "?protocol=2&legacy_responses=false"])
def test_a_sweep_works_by_each_protocol_of_redis(io_loop, open_presence, presence, redis_client, options):
    async def scenario():
        await presence.write(CLIENT)
        await presence.write(TEACHER)
        assert await open_presence(options=options).removals.sweep(presence.claims.incarnation.node_id) == 2
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_what_a_sweep_could_not_remove_stays_in_the_index(presence, elsewhere, redis_client, monkeypatch):
    await presence.write(CLIENT)
    await presence.write(TEACHER)
    node_id = presence.claims.incarnation.node_id
    with monkeypatch.context() as patch:
        MasterDown(patch, elsewhere, "lesson_student_1")
        assert await elsewhere.removals.sweep(node_id) == 1
        assert list(map(decode, redis_client.hvals(f"lesson_node_{node_id}"))) == [CLIENT]
        with pytest.raises(StoreUnavailable):  # 0 would say that nothing is left
            await elsewhere.removals.sweep(node_id)
    assert await elsewhere.removals.sweep(node_id) == 1
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_a_check_lists_the_lesson_again(presence, redis_client):
    await presence.write(CLIENT)
    redis_client.delete("lesson_node_lessons")
    assert await presence.check([CLIENT.sid]) == []
    assert redis_client.zrange("lesson_node_lessons", 0, -1) == ["1"]


@RECORDS
@pytest.mark.parametrize("prefix", ["", "school:", "{school}:", "one{two}three"])
def test_an_entry_and_its_claims_are_in_one_slot_of_a_cluster(io_loop, open_presence, monkeypatch, record, prefix):
    presence = open_presence(key_prefix=prefix)
    asked = []

    async def note(*commands, bookkeeping=()):
        asked.extend(commands)
        return [1, 1, *(("1", 0) for _ in commands)]

    monkeypatch.setattr(presence._store, "execute", note)
    io_loop.run_sync(lambda: presence.write(record))
    assert len(asked) == 2
    for _, _, count, key, claims_key, *_ in asked:
        assert count == 2
        assert key_slot(key.encode()) == key_slot(claims_key.encode())


def test_the_shortest_ttl_is_that_of_the_records(open_presence):
    assert open_presence(5).claims.shortest_ttl == 5
    assert open_presence(7 * DAY).claims.shortest_ttl == DAY


@RECORDS
def test_a_key_prefix_stands_before_every_key(io_loop, open_presence, redis_client, record):
    presence = open_presence(key_prefix="school:")
    io_loop.run_sync(lambda: presence.write(record))
    assert io_loop.run_sync(lambda: presence.check([record.sid])) == []
    keys = list(redis_client.scan_iter())
    assert len(keys) == 7  # two entries, the claims on each, the index, the counts, the list of lessons
    assert all(key.startswith("school:") for key in keys)
