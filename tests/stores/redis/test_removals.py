"""Removals of presence that Redis answers, does not answer, or refuses."""

import asyncio
import logging

import pytest
from fakes import store_down
from presences import CLIENT, RECORDS, TEACHER, MasterDown, lesson_field, other, own_keys
from waiting import until

from lesson_server.errors import StoreRefused
from lesson_server.stores.redis import removals
from lesson_server.stores.redis.records import ClientRecord


@RECORDS
def test_an_end_leaves_only_what_a_reconnect_is_known_by(io_loop, presence, redis_client, record):
    async def scenario():
        await presence.write(record)
        await presence.remove(record.sid)
        await presence.removals.settled()
        assert redis_client.keys() == (["p1"] if record is CLIENT else [])
        assert own_keys(redis_client) == []
        assert presence.claims.incarnation.claims == set()
        # The removal from the index was counted too.
        assert redis_client.hvals("lesson_node_counts") == [str(presence.claims.incarnation.acknowledged)] == ["2"]

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_claims_that_end_one_after_the_other_are_taken_from_the_index_together(
    presence, redis_client, monkeypatch
):
    commands = []
    execute = presence._store.execute

    async def listen(*step, **more):
        commands.extend(step)
        return await execute(*step, **more)

    monkeypatch.setattr(presence._store, "execute", listen)
    monkeypatch.setattr(removals, "UNINDEX_INTERVAL", 0.2)
    sids = [f"sid-{number}" for number in range(5)]
    for sid in sids:
        await presence.write(other(CLIENT, sid))
    for sid in sids:
        await presence.remove(sid)
    await presence.removals.settled()
    assert [len(command) - 2 for command in commands if command[0] == "HDEL"] == [len(sids)]
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_of_a_connection_that_wrote_nothing_there_is_nothing_to_remove(presence, redis_client):
    presence._store.fault = "unreachable"
    await presence.remove("a guest")
    await presence.removals.settled()
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
        await presence.removals.settled()
        assert lesson_field(redis_client, record) is None
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_removal_that_hangs_holds_up_an_answer_for_a_moment_and_is_retried(presence, redis_client, monkeypatch):
    monkeypatch.setattr(removals, "REMOVAL_PATIENCE", 0.01)
    await presence.write(CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(presence._store, "execute", lambda *_, **__: asyncio.Event().wait())
        async with asyncio.timeout(5):
            await presence.remove(CLIENT.sid)
    assert lesson_field(redis_client, CLIENT) == CLIENT.sid
    await presence.removals.settled()
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
    await presence.removals.settled()
    assert lesson_field(redis_client, CLIENT) is None
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_while_the_index_does_not_answer_no_removal_is_repeated(presence, redis_client, monkeypatch):
    await presence.write(CLIENT)
    removals = []
    remove = presence.claims.remove

    async def note(*args, **kwargs):
        removals.append(args)
        await remove(*args, **kwargs)

    monkeypatch.setattr(presence.claims, "remove", note)
    with monkeypatch.context() as patch:
        index = MasterDown(patch, presence, presence.claims.index_key(presence.claims.incarnation.node_id))
        await presence.remove(CLIENT.sid)
        await index.until_failed(4)
        assert len(removals) == 1
    await presence.removals.settled()
    assert own_keys(redis_client) == []


@pytest.mark.parametrize(("key", "tries"), [("lesson_node_counts", 1), ("lesson_student_1", 2)])
def test_what_redis_does_not_answer_is_tried_again_only_after_a_pause(io_loop, presence, monkeypatch, key, tries):
    monkeypatch.setattr(removals, "RETRY_INTERVAL", 60)

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
    monkeypatch.setattr(removals, "RETRY_INTERVAL", 60)
    await presence.write(CLIENT)
    presence._store.fault = "unreachable"
    await presence.remove(CLIENT.sid)
    presence._store.fault = None
    async with asyncio.timeout(5):
        await presence.removals.settled()
    assert own_keys(redis_client) == []


@pytest.mark.gen_test
async def test_what_is_pending_at_the_close_is_left_for_other_nodes_to_sweep(presence, elsewhere, redis_client):
    await presence.write(CLIENT)
    presence._store.fault = "unreachable"
    await presence.remove(CLIENT.sid)
    await presence.removals.close()
    presence._store.fault = None
    with pytest.raises(asyncio.CancelledError):
        await presence.removals.settled()
    assert lesson_field(redis_client, CLIENT) == CLIENT.sid
    assert await elsewhere.removals.sweep(presence.claims.incarnation.node_id) == 1
    assert lesson_field(redis_client, CLIENT) is None


@RECORDS
def test_a_removal_that_was_carried_out_unseen_harms_nobody(io_loop, presence, elsewhere, redis_client, record):
    async def scenario():
        await presence.write(record)
        presence._store.fault = "unanswered"
        await presence.remove(record.sid)
        await elsewhere.write(other(record, "new"))
        presence._store.fault = None
        await presence.removals.settled()
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
            patch.setattr(presence._store, "execute", defect)
            presence.removals._removed.append((presence._held.pop(record.sid), False))
            presence.removals._cleaner = asyncio.create_task(presence.removals._clean())
            await asyncio.sleep(0.05)
        await presence.removals.settled()
        assert "a defect" in caplog.text
        assert lesson_field(redis_client, record) is None
        assert own_keys(redis_client) == []

    io_loop.run_sync(scenario)


@pytest.mark.gen_test
async def test_a_defect_in_a_retry_of_a_removal_is_logged_and_the_removal_retried(
    presence, redis_client, monkeypatch, caplog
):
    remove = presence.claims.remove
    await presence.write(CLIENT)

    async def defect(*arguments, undo):
        raise RuntimeError("a defect")

    presence._store.fault = "unreachable"
    await presence.remove(CLIENT.sid)
    monkeypatch.setattr(presence.claims, "remove", defect)
    presence._store.fault = None
    await until(lambda: "a defect" in caplog.text)
    monkeypatch.setattr(presence.claims, "remove", remove)
    await presence.removals.settled()
    assert lesson_field(redis_client, CLIENT) is None


@pytest.mark.parametrize("defect_comes_first", [True, False])
def test_of_the_failures_of_several_retries_a_defect_is_the_one_that_is_raised(
    io_loop, presence, monkeypatch, defect_comes_first
):
    async def scenario():
        sids = ["defect", "down"] if defect_comes_first else ["down", "defect"]
        for sid in sids:
            await presence.write(other(CLIENT, sid))
        presence._store.fault = "unreachable"
        monkeypatch.setattr(removals, "RETRY_INTERVAL", 60)
        for sid in sids:
            await presence.remove(sid)

        async def fails(record, *_, undo):
            raise RuntimeError if record.sid == "defect" else store_down()

        monkeypatch.setattr(presence.claims, "remove", fails)
        with pytest.raises(RuntimeError):
            await presence.removals._retry_removals()
        assert len(presence.removals._pending) == 2

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
    await presence.removals.settled()
    assert not redis_client.exists("lesson_student_2")
    assert not redis_client.keys(f"lesson_node_{presence.claims.incarnation.node_id}")
    refusals = [record for record in caplog.records if "can't be removed" in record.getMessage()]
    assert len(refusals) == 3
    assert all(record.levelno == logging.WARNING for record in refusals)


@pytest.mark.gen_test
async def test_a_join_of_a_key_of_another_type_is_refused_and_redis_counts_as_available(presence, redis_client):
    redis_client.set("p1", "of another type")
    with pytest.raises(StoreRefused):
        await presence.write(CLIENT)
    assert presence._store.failures == 0
