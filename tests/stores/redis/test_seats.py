"""seats.py against a real Valkey."""

import asyncio

import pytest

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.seats import Seats

RETENTION = 1000
GRACE = 60.0


@pytest.fixture
def store(io_loop, stores):
    store = RedisStore(stores.redis_url, "school:", 2.0, 4)
    yield store
    io_loop.run_sync(store.close)


@pytest.fixture
def seats(store):
    return Seats(store, RETENTION, GRACE)


@pytest.mark.gen_test
async def test_the_first_join_makes_a_map_of_empty_seats(seats, redis_client):
    await seats.ensure_map("1", 30)
    assert redis_client.hgetall("school:lesson_seat_1") == {str(seat): "" for seat in range(1, 31)}
    assert redis_client.ttl("school:lesson_seat_1") == RETENTION


@pytest.mark.gen_test
async def test_no_occupant_is_overwritten_and_a_grown_lesson_gets_its_seats(seats, redis_client):
    redis_client.hset("school:lesson_seat_1", mapping={"1": "ann", "2": "", "5": "eve"})
    await seats.ensure_map("1", 6)
    assert redis_client.hgetall("school:lesson_seat_1") == {"1": "ann", "2": "", "3": "", "4": "", "5": "eve", "6": ""}


@pytest.mark.gen_test
async def test_of_a_map_that_is_whole_no_seat_is_written_again(seats, redis_client):
    await seats.ensure_map("1", 30)
    before = redis_client.info("commandstats")["cmdstat_hsetnx"]["calls"]
    await seats.ensure_map("1", 30)
    assert redis_client.info("commandstats")["cmdstat_hsetnx"]["calls"] == before


@pytest.mark.gen_test
async def test_other_fields_do_not_pass_for_seats(seats, redis_client):
    redis_client.hset("school:lesson_seat_1", mapping={"7": "eve", "9": ""})
    await seats.ensure_map("1", 2)
    assert redis_client.hgetall("school:lesson_seat_1") == {"1": "", "2": "", "7": "eve", "9": ""}


@pytest.mark.gen_test
async def test_a_lesson_that_has_shrunk_loses_nobody(seats, redis_client):
    redis_client.hset("school:lesson_seat_1", mapping={str(seat): f"p{seat}" for seat in range(1, 9)})
    await seats.ensure_map("1", 4)
    assert len(redis_client.hgetall("school:lesson_seat_1")) == 8


@pytest.mark.gen_test
async def test_each_join_renews_the_life_of_the_map(seats, redis_client):
    await seats.ensure_map("1", 3)
    redis_client.expire("school:lesson_seat_1", 5)
    await seats.ensure_map("1", 3)
    assert redis_client.ttl("school:lesson_seat_1") == RETENTION


@pytest.mark.gen_test
async def test_a_lesson_without_seats_has_no_map_and_costs_no_round_trip(seats, redis_client):
    before = redis_client.info("commandstats").get("cmdstat_eval", {}).get("calls", 0)
    await seats.ensure_map("1", 0)
    assert redis_client.keys() == []
    assert redis_client.info("commandstats").get("cmdstat_eval", {}).get("calls", 0) == before


@pytest.mark.gen_test
async def test_first_joins_at_once_make_one_whole_map(seats, redis_client):
    await asyncio.gather(*(seats.ensure_map("1", 100) for _ in range(50)))
    assert len(redis_client.hgetall("school:lesson_seat_1")) == 100


@pytest.mark.gen_test
async def test_a_key_of_another_kind_is_a_store_that_fails(seats, redis_client):
    redis_client.set("school:lesson_seat_1", "text")
    with pytest.raises(StoreUnavailable):
        await seats.ensure_map("1", 3)
