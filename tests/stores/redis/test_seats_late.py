"""seats.py against a real Valkey: what is left when nobody comes any more."""

import pytest
from seat_maps import FREED, GRACE, INDEX, MAP, make_due

from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.seats import Seats

RETENTION = 1000


@pytest.fixture
def store(io_loop, stores):
    store = RedisStore(stores.redis_url, "", 2.0, 4)
    yield store
    io_loop.run_sync(store.close)


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
