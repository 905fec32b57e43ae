"""presence.py against a real Valkey. ``redis_client.keys()`` are those of the diagrams, without the server's own."""

import asyncio
import logging

import pytest
from fakes import BreakableStore, store_down
from redis.crc import key_slot

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.redis import presence as presence_module
from lesson_server.stores.redis.presence import Presence
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord, decode, encode

RETENTION = 7 * 86_400
DAY = 86_400
TEACHER = TeacherRecord("sid-t", "1", "ms-hill")
CLIENT = ClientRecord("sid-p", "1", "p1", "student")
RECORDS = pytest.mark.parametrize("record", [TEACHER, CLIENT], ids=["teacher", "participant"])


@pytest.fixture
def open_presence(io_loop, stores, monkeypatch):
    """The presence of one node, with a connection to Redis of its own."""
    monkeypatch.setattr(presence_module, "RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(presence_module, "UNINDEX_INTERVAL", 0.01)
    opened = []

    def open_presence(retention=RETENTION, key_prefix="", options=""):
        presence = Presence(BreakableStore(stores.redis_url + options, key_prefix, 2.0, 4), retention)
        opened.append(presence)
        return presence

    yield open_presence
    for presence in opened:
        io_loop.run_sync(presence.close)
        io_loop.run_sync(presence._store.close)


@pytest.fixture
def presence(open_presence):
    return open_presence()


@pytest.fixture
def elsewhere(open_presence):
    return open_presence()


def other(record, sid, **more):
    return type(record)(**{**{field: getattr(record, field) for field in record.__slots__}, "sid": sid, **more})


def lesson_field(redis_client, record):
    """The sid by which Redis tells that somebody is in the lesson."""
    if isinstance(record, TeacherRecord):
        return redis_client.hget(f"lesson_teacher_{record.lesson_id}", record.user_id)
    return redis_client.hget(f"lesson_student_{record.lesson_id}", record.client_id)


def own_keys(redis_client):
    """The keys of the server's own, but the counts by which nodes are known."""
    return [key for key in redis_client.keys("lesson_node*") if key != "lesson_node_counts"]


def snapshot(redis_client):
    return {key: redis_client.hgetall(key) for key in redis_client.keys("*")}


class MasterDown:
    """Of the masters of a cluster, the one that has a certain key fails, and with it each step that needs the key.

    Attributes:
        failed: how many steps have failed.
    """

    def __init__(self, monkeypatch, presence, key):
        self.failed = 0
        run = presence._store.run

        async def fails(*commands, bookkeeping=()):
            if any(key in command for command in commands):
                self.failed += 1
                raise store_down()
            return await run(*commands, bookkeeping=bookkeeping)

        monkeypatch.setattr(presence._store, "run", fails)

    async def until_failed(self, times):
        while self.failed < times:
            await asyncio.sleep(0.001)


# Writing


@pytest.mark.gen_test
async def test_a_teacher_stands_in_both_records_with_the_lives_of_the_contract(presence, redis_client):
    await presence.write(TEACHER)
    assert redis_client.hgetall("lesson_teacher_1") == {"ms-hill": "sid-t"}
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "1"}
    assert redis_client.ttl("lesson_teacher_1") == DAY
    assert redis_client.ttl("ms-hill") == RETENTION


@pytest.mark.gen_test
async def test_a_participant_stands_in_both_records_with_the_lives_of_the_contract(presence, redis_client):
    await presence.write(CLIENT)
    assert redis_client.hgetall("lesson_student_1") == {"p1": "sid-p"}
    assert redis_client.hgetall("p1") == {"sid": "sid-p", "client_id": "p1", "role": "student"}
    assert redis_client.ttl("lesson_student_1") == RETENTION
    assert redis_client.ttl("p1") == DAY


@RECORDS
def test_what_the_server_adds_of_its_own_lives_as_long_as_the_record(io_loop, presence, redis_client, record):
    io_loop.run_sync(lambda: presence.write(record))
    claims = [key for key in own_keys(redis_client) if "claims" in key]
    assert len(claims) == 2
    for key in claims:
        entry = key.partition("{")[2].removesuffix("}")
        assert redis_client.ttl(key) == redis_client.ttl(entry)


@RECORDS
def test_each_write_renews_the_ttl(io_loop, presence, elsewhere, redis_client, record):
    io_loop.run_sync(lambda: presence.write(record))
    before = {key: redis_client.ttl(key) for key in redis_client.keys("*")}
    for key in redis_client.keys("*") + own_keys(redis_client):
        redis_client.expire(key, 10)
    io_loop.run_sync(lambda: elsewhere.write(other(record, "new")))
    assert {key: redis_client.ttl(key) for key in redis_client.keys("*")} == before


@pytest.mark.gen_test
async def test_the_index_and_the_count_of_the_node_are_written_with_the_record(presence, redis_client):
    node_id = presence.incarnation.node_id
    await presence.write(TEACHER)
    await presence.write(CLIENT)
    assert list(map(decode, redis_client.hvals(f"lesson_node_{node_id}"))) == [TEACHER, CLIENT]
    assert redis_client.hgetall("lesson_node_counts") == {node_id: "2"}
    assert presence.incarnation.acknowledged == 2


@RECORDS
def test_a_record_is_the_same_when_it_has_been_in_the_index(record):
    assert decode(encode(record).decode()) == record


def test_nodes_of_another_version_find_what_they_know_in_the_index():
    assert encode(TEACHER) == b'["teacher","sid-t","1","ms-hill"]'
    assert encode(CLIENT) == b'["participant","sid-p","1","p1","student"]'


# Reconnects


@pytest.mark.gen_test
async def test_a_reconnect_is_a_client_who_was_known_by_another_sid(presence, elsewhere):
    assert await presence.write(CLIENT) is False
    assert await elsewhere.write(other(CLIENT, "sid-2")) is True
    await presence.remove("sid-p")
    await elsewhere.remove("sid-2")
    assert await presence.write(other(CLIENT, "sid-3")) is True


@pytest.mark.gen_test
async def test_a_join_that_failed_leaves_what_is_known_of_a_connection_that_ended_meanwhile(presence, redis_client):
    await presence.write(CLIENT)
    await presence.write(other(CLIENT, "sid-failed"))
    await presence.remove(CLIENT.sid)
    await presence.remove("sid-failed", undo=True)
    assert redis_client.hgetall("p1") == {"sid": "sid-p", "client_id": "p1", "role": "student"}
    assert redis_client.keys() == ["p1"]


@pytest.mark.gen_test
async def test_a_removal_that_is_repeated_takes_nothing_from_a_later_join_of_the_connection(presence, redis_client):
    await presence.write(CLIENT)
    await presence.remove(CLIENT.sid, undo=True)
    await presence.write(CLIENT)
    await presence.remove(CLIENT.sid)
    await presence._remove(CLIENT, presence.incarnation.node_id, 1, undo=True)
    assert redis_client.keys() == ["p1"]


@pytest.mark.gen_test
async def test_a_teacher_is_never_a_reconnect(presence, elsewhere):
    assert await presence.write(TEACHER) is False
    assert await elsewhere.write(other(TEACHER, "sid-2")) is False


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("fault", ["unanswered", "unreachable"])
@pytest.mark.parametrize("removed_first", [False, True], ids=["tries again at once", "tries again after the removal"])
def test_a_join_whose_answer_got_lost_is_a_reconnect_only_if_there_was_somebody_before(
    io_loop, presence, elsewhere, redis_client, known, fault, removed_first
):
    async def scenario():
        if known:
            await elsewhere.write(other(CLIENT, "before"))
            await elsewhere.remove("before")
        presence._store.fault = fault
        with pytest.raises(StoreUnavailable):
            await presence.write(CLIENT)
        await presence.remove(CLIENT.sid, undo=True)
        presence._store.fault = None
        if removed_first:
            await presence.settled()
            assert redis_client.hget("p1", "sid") == ("before" if known else None)
            assert lesson_field(redis_client, CLIENT) is None
        assert await presence.write(CLIENT) is known
        await presence.settled()
        assert redis_client.hget("p1", "sid") == "sid-p"
        assert lesson_field(redis_client, CLIENT) == "sid-p"
        await presence.remove("sid-p")
        assert redis_client.hget("p1", "sid") == "sid-p"
        assert presence._store.injected >= 2

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_join_that_failed_gives_back_what_was_known_of_the_client_with_its_role(presence, redis_client):
    await presence.write(CLIENT)
    await presence.remove("sid-p")
    before = redis_client.hgetall("p1")
    await presence.write(other(CLIENT, "sid-2", role="guest"))
    await presence.remove("sid-2", undo=True)
    assert redis_client.hgetall("p1") == before
    await presence.settled()
    assert own_keys(redis_client) == []
    assert 0 < redis_client.ttl("p1") <= DAY


@pytest.mark.gen_test
async def test_a_second_join_of_one_connection_that_failed_leaves_what_was_known_of_the_first(presence, redis_client):
    """A participant who moves to another lesson ends one record and writes the next by the same sid."""
    await presence.write(CLIENT)
    await presence.remove("sid-p")
    await presence.write(other(CLIENT, "sid-p", lesson_id="2"))
    await presence.remove("sid-p", undo=True)
    assert redis_client.hgetall("p1") == {"sid": "sid-p", "client_id": "p1", "role": "student"}


@pytest.mark.parametrize("ended", [("sid-1", "sid-2"), ("sid-2", "sid-1")], ids="/".join)
def test_a_join_that_failed_leaves_what_is_known_of_the_last_connection_that_ended(
    io_loop, presence, redis_client, ended
):
    async def scenario():
        for sid in (*ended, "sid-failed"):
            await presence.write(other(CLIENT, sid))
        for sid in ended:
            await presence.remove(sid)
        await presence.remove("sid-failed", undo=True)
        assert redis_client.hget("p1", "sid") == ended[1]

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_what_is_known_of_a_connection_that_ended_outlives_a_repeated_removal(presence, elsewhere, redis_client):
    await presence.write(CLIENT)
    await elsewhere.write(other(CLIENT, "sid-failed"))
    await presence.remove("sid-p")
    await presence._remove(CLIENT, presence.incarnation.node_id, 1, undo=False)
    await elsewhere.remove("sid-failed", undo=True)
    assert redis_client.hget("p1", "sid") == "sid-p"


# Several connections of one person


@RECORDS
def test_the_newest_connection_stands_and_then_the_one_before_it_on_whatever_node(
    io_loop, presence, elsewhere, redis_client, record
):
    async def scenario():
        await presence.write(other(record, "first"))
        await elsewhere.write(other(record, "second"))
        await presence.write(other(record, "third"))
        told = [lesson_field(redis_client, record)]
        await elsewhere.remove("second")
        told.append(lesson_field(redis_client, record))
        await presence.remove("third")
        told.append(lesson_field(redis_client, record))
        await presence.remove("first")
        told.append(lesson_field(redis_client, record))
        assert told == ["third", "third", "first", None]
        await presence.settled()
        await elsewhere.settled()
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_the_record_of_a_client_is_that_of_its_newest_connection_with_its_role(presence, elsewhere, redis_client):
    await presence.write(CLIENT)
    await elsewhere.write(ClientRecord("sid-2", "2", "p1", "helper"))
    assert redis_client.hgetall("p1") == {"sid": "sid-2", "client_id": "p1", "role": "helper"}
    await elsewhere.remove("sid-2")
    assert redis_client.hgetall("p1") == {"sid": "sid-p", "client_id": "p1", "role": "student"}
    await presence.remove("sid-p")
    assert redis_client.hgetall("p1") == {"sid": "sid-p", "client_id": "p1", "role": "student"}
    assert redis_client.keys() == ["p1"]


@pytest.mark.gen_test
async def test_a_teacher_of_two_lessons_is_in_the_latest_and_then_in_the_other(presence, elsewhere, redis_client):
    await presence.write(TEACHER)
    await elsewhere.write(other(TEACHER, "sid-2", lesson_id="2"))
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "2"}
    await elsewhere.remove("sid-2")
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "1"}
    assert redis_client.keys("lesson_teacher_*") == ["lesson_teacher_1"]
    await presence.remove("sid-t")
    assert redis_client.keys() == []


@pytest.mark.gen_test
async def test_one_who_is_teacher_and_participant_is_both(presence, redis_client):
    await presence.write(TeacherRecord("sid-1", "1", "x"))
    await presence.write(ClientRecord("sid-2", "1", "x", "teacher"))
    assert redis_client.hgetall("x") == {"lesson_id": "1", "sid": "sid-2", "client_id": "x", "role": "teacher"}
    await presence.remove("sid-1")
    assert redis_client.hgetall("x") == {"sid": "sid-2", "client_id": "x", "role": "teacher"}


@RECORDS
def test_a_clock_of_redis_that_was_set_back_does_not_change_who_joined_last(
    io_loop, presence, elsewhere, redis_client, record
):
    io_loop.run_sync(lambda: presence.write(other(record, "first")))
    for key in own_keys(redis_client):
        if "claims" in key:
            (claim,) = redis_client.zrange(key, 0, -1)
            redis_client.zincrby(key, 3600e6, claim)  # it was an hour later then
    io_loop.run_sync(lambda: elsewhere.write(other(record, "second")))
    assert lesson_field(redis_client, record) == "second"
    io_loop.run_sync(lambda: elsewhere.remove("second"))
    assert lesson_field(redis_client, record) == "first"


# Removing


@RECORDS
def test_an_end_leaves_only_what_a_reconnect_is_known_by(io_loop, presence, redis_client, record):
    async def scenario():
        await presence.write(record)
        await presence.remove(record.sid)
        await presence.settled()
        assert redis_client.keys() == (["p1"] if record is CLIENT else [])
        assert own_keys(redis_client) == []
        assert presence.incarnation.claims == set()
        # The removal from the index was counted too.
        assert redis_client.hvals("lesson_node_counts") == [str(presence.incarnation.acknowledged)] == ["2"]

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_claims_that_end_one_after_the_other_are_taken_from_the_index_together(
    presence, redis_client, monkeypatch
):
    commands = []
    run = presence._store.run

    async def listen(*step, **more):
        commands.extend(step)
        return await run(*step, **more)

    monkeypatch.setattr(presence._store, "run", listen)
    monkeypatch.setattr(presence_module, "UNINDEX_INTERVAL", 0.2)
    sids = [f"sid-{number}" for number in range(5)]
    for sid in sids:
        await presence.write(other(CLIENT, sid))
    for sid in sids:
        await presence.remove(sid)
    await presence.settled()
    assert [len(command) - 2 for command in commands if command[0] == "HDEL"] == [len(sids)]
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_of_a_connection_that_wrote_nothing_there_is_nothing_to_remove(presence, redis_client):
    presence._store.fault = "unreachable"
    await presence.remove("a guest")
    await presence.settled()
    assert presence._store.injected == 0


@RECORDS
def test_a_removal_that_redis_did_not_answer_is_retried(io_loop, presence, redis_client, record):
    async def scenario():
        await presence.write(record)
        presence._store.fault = "unreachable"
        await presence.remove(record.sid)
        await asyncio.sleep(0.05)
        assert lesson_field(redis_client, record) == record.sid
        assert presence._store.injected >= 2
        presence._store.fault = None
        await presence.settled()
        assert lesson_field(redis_client, record) is None
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_removal_that_hangs_holds_up_an_answer_for_a_moment_and_is_retried(presence, redis_client, monkeypatch):
    monkeypatch.setattr(presence_module, "REMOVAL_PATIENCE", 0.01)
    await presence.write(CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(presence._store, "run", lambda *_: asyncio.Event().wait())
        async with asyncio.timeout(5):
            await presence.remove(CLIENT.sid)
    assert lesson_field(redis_client, CLIENT) == CLIENT.sid
    await presence.settled()
    assert lesson_field(redis_client, CLIENT) is None


@pytest.mark.gen_test
async def test_of_several_removals_only_those_that_redis_did_not_answer_stay_pending(
    presence, redis_client, monkeypatch
):
    for record in (CLIENT, TEACHER):
        await presence.write(record)
    with monkeypatch.context() as patch:
        presence._store.fault = "unreachable"
        for record in (CLIENT, TEACHER):
            await presence.remove(record.sid)
        presence._store.fault = None
        await MasterDown(patch, presence, "lesson_student_1").until_failed(3)
        assert lesson_field(redis_client, TEACHER) is None
        assert lesson_field(redis_client, CLIENT) == CLIENT.sid
    await presence.settled()
    assert lesson_field(redis_client, CLIENT) is None
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_while_the_index_does_not_answer_no_removal_is_repeated(presence, redis_client, monkeypatch):
    await presence.write(CLIENT)
    removals = []
    remove = presence._remove

    async def note(*args, **kwargs):
        removals.append(args)
        await remove(*args, **kwargs)

    monkeypatch.setattr(presence, "_remove", note)
    with monkeypatch.context() as patch:
        index = MasterDown(patch, presence, presence.index_key(presence.incarnation.node_id))
        await presence.remove(CLIENT.sid)
        await index.until_failed(4)
        assert len(removals) == 1
    await presence.settled()
    assert own_keys(redis_client) == []


@pytest.mark.parametrize(("key", "tries"), [("lesson_node_counts", 1), ("lesson_student_1", 2)])
def test_what_redis_does_not_answer_is_tried_again_only_after_a_pause(io_loop, presence, monkeypatch, key, tries):
    monkeypatch.setattr(presence_module, "RETRY_INTERVAL", 60)

    async def scenario():
        await presence.write(CLIENT)
        master = MasterDown(monkeypatch, presence, key)
        await presence.remove(CLIENT.sid)
        await master.until_failed(tries)
        await asyncio.sleep(0.05)
        assert master.failed == tries

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_removal_that_redis_answers_at_the_second_try_is_settled_without_a_pause(
    presence, redis_client, monkeypatch
):
    monkeypatch.setattr(presence_module, "RETRY_INTERVAL", 60)
    await presence.write(CLIENT)
    presence._store.fault = "unreachable"
    await presence.remove(CLIENT.sid)
    presence._store.fault = None
    async with asyncio.timeout(5):
        await presence.settled()
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_what_is_pending_at_the_close_is_left_for_other_nodes_to_sweep(presence, elsewhere, redis_client):
    await presence.write(CLIENT)
    presence._store.fault = "unreachable"
    await presence.remove(CLIENT.sid)
    await presence.close()
    presence._store.fault = None
    with pytest.raises(asyncio.CancelledError):
        await presence.settled()
    assert lesson_field(redis_client, CLIENT) == CLIENT.sid
    assert await elsewhere.sweep(presence.incarnation.node_id) == 1
    assert lesson_field(redis_client, CLIENT) is None


@RECORDS
def test_a_removal_that_was_carried_out_unseen_harms_nobody(io_loop, presence, elsewhere, redis_client, record):
    async def scenario():
        await presence.write(record)
        presence._store.fault = "unanswered"
        await presence.remove(record.sid)
        await elsewhere.write(other(record, "new"))
        presence._store.fault = None
        await presence.settled()
        assert presence._store.injected
        assert lesson_field(redis_client, record) == "new"

    io_loop.run_sync(scenario)


@RECORDS
def test_a_defect_in_a_removal_is_logged_and_is_not_the_end_of_removals(
    io_loop, presence, redis_client, record, monkeypatch, caplog
):
    async def scenario():
        await presence.write(record)

        async def defect(*commands, bookkeeping=()):
            raise RuntimeError("a defect")

        with monkeypatch.context() as patch:
            patch.setattr(presence._store, "run", defect)
            presence._removed.append((presence._held.pop(record.sid), False))
            presence._cleaner = asyncio.create_task(presence._clean())
            await asyncio.sleep(0.05)
        await presence.settled()
        assert "a defect" in caplog.text
        assert lesson_field(redis_client, record) is None
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_removal_that_redis_refuses_is_dropped_and_holds_up_nobody(presence, redis_client, caplog):
    for number in range(3):
        await presence.write(ClientRecord(f"refused-{number}", "1", f"refused{number}", "student"))
    await presence.write(ClientRecord("sid-q", "2", "p2", "student"))
    redis_client.delete("lesson_student_1")
    redis_client.set("lesson_student_1", "of another type")
    presence._store.fault = "unreachable"
    for sid in ("refused-0", "refused-1", "refused-2", "sid-q"):
        await presence.remove(sid)
    presence._store.fault = None
    await presence.settled()
    assert not redis_client.exists("lesson_student_2")
    assert not redis_client.keys(f"lesson_node_{presence.incarnation.node_id}")
    refusals = [record for record in caplog.records if "can't be removed" in record.getMessage()]
    assert len(refusals) == 3
    assert all(record.levelno == logging.WARNING for record in refusals)


@pytest.mark.gen_test
async def test_a_join_of_a_key_of_another_type_is_refused_and_redis_counts_as_available(presence, redis_client):
    redis_client.set("p1", "of another type")
    with pytest.raises(StoreRefused):
        await presence.write(CLIENT)
    assert presence._store.failures == 0


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
        former = presence.incarnation.node_id
        presence.begin_incarnation()
        assert await presence.check([record.sid]) == [record.sid]
        await presence.restore(record)
        assert await presence.check([record.sid]) == []
        assert await elsewhere.sweep(former) == 1
        assert snapshot(redis_client) == before
        assert await elsewhere.sweep(former) == 0
        await presence.remove(record.sid)
        await presence.settled()
        assert lesson_field(redis_client, record) is None
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@RECORDS
def test_a_claim_that_was_replaced_is_gone_with_the_one_in_its_place(io_loop, presence, redis_client, record):
    async def scenario():
        await presence.write(record)
        presence.begin_incarnation()
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
        presence.begin_incarnation()
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
        node_ids = [presence.incarnation.node_id]
        for _ in range(2):
            node_ids.append(presence.begin_incarnation().node_id)
            presence._store.fault = fault
            with pytest.raises(StoreUnavailable):
                await presence.restore(record)
        presence._store.fault = None
        await presence.remove(record.sid)
        await presence.settled()
        assert presence._store.injected == 2
        assert lesson_field(redis_client, record) is None
        # Redis may still carry out what it did not answer: a check of the records removes it again.
        for node_id in node_ids:
            await presence.sweep(node_id)
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
    (index_key,) = (key for key in own_keys(redis_client) if "claims" not in key)
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
    monkeypatch.setattr(presence._store, "run", lambda **_: asyncio.sleep(0, [RuntimeError("a defect")] * 3))
    with pytest.raises(RuntimeError):
        await presence.check([CLIENT.sid])


# Strays, and what a lost node has written


async def remove_strays(presence):
    return sum([count async for count in presence.strays()])


@RECORDS
@pytest.mark.parametrize(("patience", "removed"), [(0.0, 1), (10.0, 0)], ids=["after LATE_WRITE", "before it"])
def test_a_write_that_was_not_answered_stays_in_the_index_until_it_can_not_be_carried_out_any_more(
    io_loop, presence, redis_client, monkeypatch, record, patience, removed
):
    monkeypatch.setattr(presence_module, "LATE_WRITE", patience)

    async def scenario():
        presence._store.fault = "unanswered"
        with pytest.raises(StoreUnavailable):
            await presence.write(record)
        presence._store.fault = None
        claim = presence._held[record.sid]
        await presence.remove(record.sid, undo=True)
        await presence.settled()
        assert lesson_field(redis_client, record) is None
        for entry in record.entries():  # the rest of the step, after the removal
            await presence._store.run(presence._script(presence_module.WRITE, claim, entry, int(entry.outlives)))
        assert await remove_strays(presence) == removed
        assert lesson_field(redis_client, record) is None
        assert redis_client.hlen(presence.index_key(presence.incarnation.node_id)) == 1 - removed
        assert presence.incarnation.late.keys() == ({1} if not removed else set())

    io_loop.run_sync(scenario)


@RECORDS
def test_the_late_write_of_a_join_that_failed_is_removed_as_if_it_had_not_been_tried(
    io_loop, presence, redis_client, record
):
    async def scenario():
        await presence.write(record)
        claim = presence._held[record.sid]
        await presence.remove(record.sid, undo=True)
        await presence.settled()
        presence._held[record.sid] = claim
        await presence._run(  # Redis gets to it after the removal
            claim,
            [presence._script(presence_module.WRITE, claim, entry, int(entry.outlives)) for entry in record.entries()],
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
    count = 10 * presence_module.BATCH_SIZE
    index_key = presence.index_key(presence.incarnation.node_id)
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
    monkeypatch.setattr(presence_module, "BATCH_SIZE", 3)
    for number in range(5):
        await presence.write(ClientRecord(f"old-{number}", "1", f"p{number}", "student"))
    await presence.write(TEACHER)
    await elsewhere.write(ClientRecord("new", "1", "p1", "student"))
    await elsewhere.write(TeacherRecord("sid-2", "2", "ms-hill"))
    swept = [await elsewhere.sweep(presence.incarnation.node_id) for _ in range(3)]
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
    assert await elsewhere.sweep(presence.incarnation.node_id) == 2
    assert not redis_client.exists("lesson_student_1", "lesson_teacher_1", "ms-hill")


@pytest.mark.parametrize("options", ["?protocol=2", "?protocol=3", "?protocol=2&legacy_responses=false"])
def test_a_sweep_works_by_each_protocol_of_redis(io_loop, open_presence, presence, redis_client, options):
    async def scenario():
        await presence.write(CLIENT)
        await presence.write(TEACHER)
        assert await open_presence(options=options).sweep(presence.incarnation.node_id) == 2
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_what_a_sweep_could_not_remove_stays_in_the_index(presence, elsewhere, redis_client, monkeypatch):
    await presence.write(CLIENT)
    await presence.write(TEACHER)
    node_id = presence.incarnation.node_id
    with monkeypatch.context() as patch:
        MasterDown(patch, elsewhere, "lesson_student_1")
        assert await elsewhere.sweep(node_id) == 1
        assert list(map(decode, redis_client.hvals(f"lesson_node_{node_id}"))) == [CLIENT]
        with pytest.raises(StoreUnavailable):  # 0 would say that nothing is left
            await elsewhere.sweep(node_id)
    assert await elsewhere.sweep(node_id) == 1
    assert own_keys(redis_client) == []


@RECORDS
@pytest.mark.parametrize("prefix", ["", "school:", "{school}:", "one{two}three"])
def test_an_entry_and_its_claims_are_in_one_slot_of_a_cluster(io_loop, open_presence, monkeypatch, record, prefix):
    presence = open_presence(key_prefix=prefix)
    asked = []

    async def note(*commands, bookkeeping=()):
        asked.extend(commands)
        return [1, 1, *(("1", 0) for _ in commands)]

    monkeypatch.setattr(presence._store, "run", note)
    io_loop.run_sync(lambda: presence.write(record))
    assert len(asked) == 2
    for _, _, count, key, claims_key, *_ in asked:
        assert count == 2
        assert key_slot(key.encode()) == key_slot(claims_key.encode())


def test_the_shortest_ttl_is_that_of_the_records(open_presence):
    assert open_presence(5).shortest_ttl == 5
    assert open_presence(7 * DAY).shortest_ttl == DAY


@RECORDS
def test_a_key_prefix_stands_before_every_key(io_loop, open_presence, redis_client, record):
    presence = open_presence(key_prefix="school:")
    io_loop.run_sync(lambda: presence.write(record))
    assert io_loop.run_sync(lambda: presence.check([record.sid])) == []
    keys = list(redis_client.scan_iter())
    assert len(keys) == 6  # two entries, the claims on each, the index, the counts
    assert all(key.startswith("school:") for key in keys)
