"""redis_store.py: what a broken Redis looks like to the steps."""

import asyncio
import contextlib

import pytest

from lesson_server.errors import StoreUnavailable
from lesson_server.redis_store import RedisStore


@pytest.fixture
def open_store(io_loop):
    opened = []

    def open_store(url, timeout=2.0, pool_size=2):
        opened.append(RedisStore(url, "", timeout, pool_size))
        return opened[-1]

    yield open_store
    for store in opened:
        io_loop.run_sync(store.close)


@pytest.mark.gen_test
async def test_round_trips_beyond_the_pool_wait_for_their_turn(open_store, stores):
    store = open_store(stores.redis_url, pool_size=2)
    await asyncio.gather(*(store.ping() for _ in range(200)))


@pytest.mark.gen_test
async def test_connections_that_redis_has_closed_are_replaced_unnoticed(open_store, stores, redis_client):
    """As after a restart of Redis: each idle connection is dead, and only found so when it is used."""
    store = open_store(stores.redis_url)
    await asyncio.gather(store.ping(), store.ping())
    redis_client.client_kill_filter(_type="normal", skipme=True)
    await asyncio.gather(*(store.ping() for _ in range(10)))


@pytest.mark.gen_test
async def test_no_redis_is_unavailable(open_store, tmp_path):
    with pytest.raises(StoreUnavailable) as caught:
        await open_store(f"unix://{tmp_path}/none.sock").ping()
    assert "none.sock" in caught.value.cause


@pytest.mark.gen_test
async def test_a_redis_that_does_not_answer_is_unavailable_and_is_not_asked_twice(open_store):
    asked = []

    async def silent(reader, writer):
        with contextlib.suppress(ConnectionError):
            while command := await reader.read(4096):
                asked.append(command)
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    store = open_store(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout=0.2)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    server.close()
    assert len(asked) == 1


@pytest.mark.gen_test
async def test_the_log_tells_of_a_change_and_never_of_the_password(open_store, caplog):
    store = open_store("redis://:sesame@127.0.0.1:1")
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await store.ping()
    assert len(caplog.records) == 1
    assert "Redis is unavailable" in caplog.text
    assert "sesame" not in caplog.text
