"""seats.py against a real Valkey: what comes late, and what is left when nobody comes any more."""

import pytest
from seat_maps import DEADLINES, FREED, GRACE, INDEX, MAP, deadlines, known, make_due, taken

from lesson_server.stores.redis.seats import Seats
from lesson_server.stores.redis.store import LATE_WRITE

RETENTION = 1000


@pytest.fixture
def seats(store):
    return Seats(store, RETENTION, GRACE)


async def make_map(seats, redis_client):
    await seats.ensure_map("1", 3, "anna")


async def sweep(seats, redis_client):
    await seats.take("1", "anna", None, 3)
    make_due(redis_client, "anna")
    await seats.sweep()
    assert redis_client.exists(FREED)


async def free(seats, redis_client):
    await seats.take("1", "anna", None, 3)
    await seats.free("1", "anna")
    assert redis_client.exists(FREED)


async def leave_what_is_lost(seats, redis_client):
    await seats.take("1", "anna", None, 3)
    redis_client.flushall()
    await seats.leave("1", "anna")


@pytest.mark.parametrize("change", [make_map, sweep, free, leave_what_is_lost])
@pytest.mark.gen_test
async def test_whoever_writes_last_the_keys_of_a_lesson_have_a_ttl(seats, redis_client, change):
    await change(seats, redis_client)
    ttls = {key: redis_client.ttl(key) for key in (MAP, INDEX, FREED) if redis_client.exists(key)}
    assert ttls
    assert set(ttls.values()) == {RETENTION}


@pytest.mark.gen_test
async def test_a_departure_that_comes_late_while_the_sweep_looks_does_not_keep_the_seat(
    seats, store, redis_client, monkeypatch
):
    """The departure of a retry has been listed; the one before it has no answer, and comes to Redis now."""
    await seats.take("1", "anna", None, 3)
    make_due(redis_client, "anna")
    execute, late = store.execute, []

    async def meanwhile(*commands, bookkeeping=()):
        answers = await execute(*commands, bookkeeping=bookkeeping)
        if commands[0][0] == "HEXISTS" and not late:
            late.append(await execute(seats.departure("1", "anna")))
        return answers

    monkeypatch.setattr(store, "execute", meanwhile)
    await seats.sweep()
    assert late
    assert known(redis_client, "anna")[1] > 0.9 * GRACE * 1000
    make_due(redis_client, "anna")
    await seats.sweep()
    assert taken(redis_client) == {}
    assert redis_client.exists(DEADLINES) == 0


@pytest.mark.gen_test
async def test_however_short_the_grace_a_take_that_comes_late_is_looked_at_afterwards(store, redis_client):
    seats = Seats(store, RETENTION, 0.0)
    await store.execute(seats.deadlines.addition("1", "anna", 0))
    await seats.take("1", "anna", None, 3)
    assert deadlines(redis_client)["anna"] > 0.9 * LATE_WRITE * 1000
    make_due(redis_client, "anna")
    await seats.sweep()
    assert taken(redis_client) == {}
