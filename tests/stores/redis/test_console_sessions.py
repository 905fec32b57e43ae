"""console_sessions.py: sessions of the console, against a real Valkey."""

import pytest
from fakes import BreakableStore

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis.console_sessions import SESSION_LIFE, ConsoleSessions

KEYS = "lesson_node_console:*"


@pytest.fixture
def open_sessions(io_loop, stores):
    opened = []

    def open_sessions(key_prefix=""):
        opened.append(BreakableStore(stores.redis_url, key_prefix, 2.0, 4))
        return ConsoleSessions(opened[-1])

    yield open_sessions
    for store in opened:
        io_loop.run_sync(store.close)


@pytest.fixture
def sessions(open_sessions):
    return open_sessions()


@pytest.mark.gen_test
async def test_a_session_is_valid_from_its_begin_to_its_end_on_every_node(sessions, open_sessions):
    elsewhere = open_sessions()
    first, second = [await sessions.begin() for _ in range(2)]
    assert first != second
    assert await elsewhere.is_valid(first)
    await elsewhere.end(first)
    assert not await sessions.is_valid(first)
    assert await sessions.is_valid(second)
    await sessions.end(first)  # again


@pytest.mark.gen_test
async def test_a_session_ends_by_itself(sessions, redis_client):
    session = await sessions.begin()
    (key,) = redis_client.keys(KEYS)
    assert SESSION_LIFE - 10 < redis_client.ttl(key) <= SESSION_LIFE
    redis_client.pexpire(key, 0)
    assert not await sessions.is_valid(session)


@pytest.mark.gen_test
async def test_redis_holds_nothing_by_which_a_session_could_be_used(sessions, redis_client):
    session = await sessions.begin()
    (key,) = redis_client.keys(KEYS)
    assert session not in key
    assert redis_client.get(key) == ""
    assert not await sessions.is_valid(key.rpartition(":")[2])


@pytest.mark.parametrize("session", ["", "unknown", "*", "\x00", "é" * 1000])
@pytest.mark.gen_test
async def test_what_never_began_is_not_valid(sessions, session):
    await sessions.begin()
    assert not await sessions.is_valid(session)
    await sessions.end(session)


@pytest.mark.gen_test
async def test_sessions_have_the_prefix_of_all_keys(open_sessions, redis_client):
    session = await open_sessions("a:").begin()
    assert len(redis_client.keys(f"a:{KEYS}")) == 1
    assert not await open_sessions("b:").is_valid(session)


@pytest.mark.gen_test
async def test_an_outage_is_no_answer(sessions):
    session = await sessions.begin()
    sessions._store.fault = "unreachable"
    for ask in (sessions.begin, lambda: sessions.is_valid(session), lambda: sessions.end(session)):
        with pytest.raises(StoreUnavailable):
            await ask()
    assert sessions._store.injected == 3
    sessions._store.fault = None
    assert await sessions.is_valid(session)
