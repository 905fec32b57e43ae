"""Reconnects, and several connections of one person, against a real Valkey."""

import pytest
from presences import CLIENT, DAY, RECORDS, TEACHER, lesson_field, other, own_keys

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord

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
    await presence.claims.remove(CLIENT, presence.claims.incarnation.node_id, 1, undo=True)
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
            await presence.removals.settled()
            assert redis_client.hget("p1", "sid") == ("before" if known else None)
            assert lesson_field(redis_client, CLIENT) is None
        assert await presence.write(CLIENT) is known
        await presence.removals.settled()
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
    await presence.removals.settled()
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
    await presence.claims.remove(CLIENT, presence.claims.incarnation.node_id, 1, undo=False)
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
        await presence.removals.settled()
        await elsewhere.removals.settled()
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
