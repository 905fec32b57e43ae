"""seats.py: the grace of a seat, and the sweep, against a real Valkey."""

import asyncio

import pytest
from presences import CLIENT, TEACHER, new_presence
from seat_maps import DEADLINES, GRACE, INDEX, MAP, Onlooker, deadlines, known, make_due, taken

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import seat_deadlines
from lesson_server.stores.redis.seats import Seats, Taking

PRESENT = "lesson_student_1"


@pytest.fixture
def observed():
    return []


@pytest.fixture
def seats(store, observed):
    return Seats(store, 1000, GRACE, observed.append)


@pytest.fixture
def onlooker(redis_client):
    onlooker = Onlooker(redis_client)
    yield onlooker
    onlooker.close()


@pytest.mark.gen_test
async def test_a_due_seat_of_somebody_who_is_not_there_is_freed_and_told(seats, redis_client, onlooker, observed):
    await seats.take("1", "anna", None, 3)
    make_due(redis_client, "anna")
    assert await seats.sweep() == 1
    assert taken(redis_client) == {}
    assert redis_client.hgetall(INDEX).keys() == {""}
    assert redis_client.exists(DEADLINES) == 0
    assert onlooker.changes(2) == [(1, "anna"), (1, None)]
    assert observed == ["taken", "freed"]
    assert await seats.take("1", "ben", None, 3) == (Taking.TAKEN, 1)


@pytest.mark.gen_test
async def test_before_its_time_nothing_is_swept(seats, redis_client):
    await seats.take("1", "anna", None, 3)
    assert await seats.sweep() == 0
    assert taken(redis_client) == {1: "anna"}


@pytest.mark.gen_test
async def test_a_deadline_that_comes_before_the_seat_is_due_is_put_off(seats, redis_client):
    """The clocks of two masters differ, or the person has asked for a seat and was refused."""
    await seats.take("1", "anna", None, 3)
    redis_client.zadd(DEADLINES, {'["1","anna"]': 1})
    assert await seats.sweep() == 1
    assert taken(redis_client) == {1: "anna"}
    assert deadlines(redis_client)["anna"] > 0.9 * GRACE * 1000


@pytest.mark.gen_test
async def test_who_is_there_keeps_the_seat_and_the_grace_begins_with_the_departure(seats, store, redis_client):
    presence = new_presence(store)
    await presence.write(CLIENT)
    await seats.take("1", "p1", None, 3)
    make_due(redis_client, "p1")
    assert await seats.sweep() == 1
    assert taken(redis_client) == {1: "p1"}
    assert deadlines(redis_client) == {}  # looked at again only after the departure
    await presence.remove(CLIENT.sid)
    assert known(redis_client, "p1")[1] > 0.9 * GRACE * 1000
    assert deadlines(redis_client)["p1"] > 0.9 * GRACE * 1000
    make_due(redis_client, "p1")
    await seats.sweep()
    assert taken(redis_client) == {}
    await presence.removals.close()


@pytest.mark.gen_test
async def test_a_departure_of_somebody_without_a_seat_leaves_nothing(seats, store, redis_client):
    presence = new_presence(store)
    for record in (CLIENT, TEACHER):
        await presence.write(record)
        await presence.remove(record.sid)
    assert redis_client.exists(DEADLINES, INDEX) == 0
    await presence.removals.close()


@pytest.mark.gen_test
async def test_a_teacher_of_the_same_id_does_not_depart_for_a_participant(seats, store, redis_client):
    presence = new_presence(store)
    await seats.take("1", TEACHER.user_id, None, 3)
    make_due(redis_client, TEACHER.user_id)
    await presence.write(TEACHER)
    await presence.remove(TEACHER.sid)
    assert known(redis_client, TEACHER.user_id)[1] < 0
    await presence.removals.close()


@pytest.mark.gen_test
async def test_who_has_left_a_seat_is_forgotten_after_the_departure(seats, store, redis_client):
    presence = new_presence(store)
    await presence.write(CLIENT)
    await seats.take("1", "p1", None, 3)
    await seats.leave("1", "p1")
    assert known(redis_client, "p1")[0] == 0
    await presence.remove(CLIENT.sid)
    make_due(redis_client, "p1")
    await seats.sweep()
    assert redis_client.hgetall(INDEX).keys() == {""}
    await presence.removals.close()


@pytest.mark.gen_test
async def test_a_departure_that_redis_refuses_or_does_not_answer_is_repeated_with_the_removal(
    seats, store, redis_client, monkeypatch
):
    """On a cluster, the master of the seats may fail alone."""
    presence = new_presence(store)
    await presence.write(CLIENT)
    await seats.take("1", "p1", None, 3)
    execute, failed = store.execute, []

    async def fails_once(*commands, bookkeeping=()):
        answers = await execute(*commands, bookkeeping=bookkeeping)
        if bookkeeping and not failed:
            failed.append(bookkeeping)
            answers[0] = StoreUnavailable("Redis", "a master is down")
        return answers

    claim = presence._held[CLIENT.sid]
    remove = (CLIENT, claim.incarnation.node_id, claim.number)
    monkeypatch.setattr(store, "execute", fails_once)
    with pytest.raises(StoreUnavailable):
        await presence.claims.remove(*remove, undo=False)
    assert redis_client.exists(PRESENT) == 0  # the presence is gone nevertheless
    redis_client.delete(DEADLINES)
    await presence.claims.remove(*remove, undo=False)
    assert failed
    assert deadlines(redis_client).keys() == {"p1"}


@pytest.mark.gen_test
async def test_an_index_of_another_kind_does_not_hold_up_a_departure(store, redis_client):
    presence = new_presence(store)
    redis_client.set(INDEX, "text")
    await presence.write(CLIENT)
    await presence.remove(CLIENT.sid)
    await presence.removals.settled()
    assert redis_client.exists(PRESENT) == 0


@pytest.mark.parametrize("change", ["take", "leave", "depart"])
@pytest.mark.gen_test
async def test_who_does_something_while_the_sweep_looks_keeps_the_seat_or_what_was_done(
    seats, store, redis_client, monkeypatch, change
):
    await seats.take("1", "anna", None, 3)
    make_due(redis_client, "anna")
    execute, done = store.execute, []

    async def meanwhile(*commands, bookkeeping=()):
        answers = await execute(*commands, bookkeeping=bookkeeping)
        if commands[0][0] == "HEXISTS" and not done:
            done.append(change)
            if change == "take":
                await seats.take("1", "anna", None, 3)
            elif change == "leave":
                await seats.leave("1", "anna")
            else:
                await execute(seats.departure("1", "anna"))
                await seats.list_departure("1", "anna")
        return answers

    monkeypatch.setattr(store, "execute", meanwhile)
    await seats.sweep()
    assert done
    assert taken(redis_client) == ({} if change == "leave" else {1: "anna"})
    assert known(redis_client, "anna")[1] > 0.9 * GRACE * 1000
    if change != "leave":
        assert deadlines(redis_client)["anna"] > 0.9 * GRACE * 1000


@pytest.mark.gen_test
async def test_what_a_node_has_begun_another_repeats_after_a_while_only(seats, store, redis_client, monkeypatch):
    await seats.take("1", "anna", None, 3)
    make_due(redis_client, "anna")
    with monkeypatch.context() as patch:
        patch.setattr(seats, "_free_if_due", lambda *_: asyncio.Event().wait())
        dies = asyncio.ensure_future(seats.sweep())
        while deadlines(redis_client)["anna"] < 0:
            await asyncio.sleep(0)
        dies.cancel()
    assert 0 < deadlines(redis_client)["anna"] <= seat_deadlines.REPEAT_AFTER
    assert await Seats(store, 1000, GRACE).sweep() == 0
    make_due(redis_client, "anna")
    assert await seats.sweep() == 1
    assert taken(redis_client) == {}


@pytest.mark.gen_test
async def test_many_deadlines_are_swept_in_batches_and_one_that_fails_holds_up_no_other(
    seats, store, redis_client, monkeypatch
):
    monkeypatch.setattr(seat_deadlines, "BATCH_SIZE", 2)
    for person in ("anna", "ben", "cem"):
        await seats.take("1", person, None, 3)
        make_due(redis_client, person)
    assert await seats.sweep() == 2
    assert len(taken(redis_client)) == 1
    redis_client.hset(INDEX, "dora", "no number")
    redis_client.zadd(DEADLINES, {'["1","dora"]': 0})
    with pytest.raises(StoreUnavailable):
        await seats.sweep()
    assert taken(redis_client) == {}


@pytest.mark.gen_test
async def test_the_seat_of_a_removed_person_is_free_at_once_even_one_that_another_program_gave(
    seats, redis_client, onlooker, observed
):
    await seats.take("1", "anna", 2, 3)
    redis_client.hset(MAP, "3", "anna")
    await seats.free("1", "anna")
    await seats.free("1", "nobody")
    assert taken(redis_client) == {}
    assert redis_client.hgetall(INDEX).keys() == {""}
    assert sorted(onlooker.changes(3), key=str) == [(2, "anna"), (2, None), (3, None)]
    assert observed == ["taken", "freed", "freed"]


@pytest.mark.gen_test
async def test_without_a_grace_a_seat_goes_with_the_connection(store, redis_client):
    seats, presence = Seats(store, 1000, 0.0), new_presence(store, grace=0.0)
    await presence.write(CLIENT)
    await seats.take("1", "p1", None, 3)
    await seats.sweep()
    assert taken(redis_client) == {1: "p1"}
    await presence.remove(CLIENT.sid)
    await seats.sweep()
    assert taken(redis_client) == {}
    await presence.removals.close()
