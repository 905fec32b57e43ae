"""presence.py against a real Valkey."""

import asyncio

import pytest

from lesson_server import presence as presence_module
from lesson_server.errors import StoreUnavailable
from lesson_server.presence import ClientRecord, Presence, TeacherRecord
from lesson_server.redis_store import RedisStore

RETENTION = 7 * 86_400
DAY = 86_400
TEACHER = TeacherRecord("sid-t", "1", "ms-hill")
CLIENT = ClientRecord("sid-p", "1", "p1", "student")


@pytest.fixture
def store(io_loop, stores):
    store = RedisStore(stores.redis_url, "", 2.0, 4)
    yield store
    io_loop.run_sync(store.close)


@pytest.fixture
def presence(io_loop, store, monkeypatch):
    monkeypatch.setattr(presence_module, "RETRY_INTERVAL", 0.01)
    presence = Presence(store, RETENTION, "node")
    yield presence
    io_loop.run_sync(presence.close)


def other(record, sid):
    return type(record)(**{**{field: getattr(record, field) for field in record.__slots__}, "sid": sid})


async def eventually(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never came true")


@pytest.mark.gen_test
async def test_a_teacher_stands_in_both_records_with_the_lives_of_the_contract(presence, redis_client):
    await presence.set_teacher(TEACHER)
    assert redis_client.hgetall("lesson_teacher_1") == {"ms-hill": "sid-t"}
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "1"}
    assert redis_client.ttl("lesson_teacher_1") == DAY
    assert redis_client.ttl("ms-hill") == RETENTION


@pytest.mark.gen_test
async def test_a_participant_stands_in_both_records_with_the_lives_of_the_contract(presence, redis_client):
    await presence.set_client(CLIENT)
    assert redis_client.hgetall("lesson_student_1") == {"p1": "sid-p"}
    assert redis_client.hgetall("p1") == {"sid": "sid-p", "client_id": "p1", "role": "student"}
    assert redis_client.ttl("lesson_student_1") == RETENTION
    assert redis_client.ttl("p1") == DAY


@pytest.mark.gen_test
async def test_a_reconnect_is_a_known_client_with_another_sid(presence):
    assert await presence.set_client(CLIENT) is False
    assert await presence.set_client(CLIENT) is False
    assert await presence.set_client(other(CLIENT, "sid-2")) is True


@pytest.mark.gen_test
async def test_known_means_that_the_field_sid_exists(presence, redis_client):
    redis_client.hset("p1", "lesson_id", "1")  # a teacher of the same name
    assert await presence.set_client(CLIENT) is False


@pytest.mark.gen_test
async def test_of_first_connections_at_once_exactly_one_is_the_first(presence):
    reconnects = await asyncio.gather(*(presence.set_client(other(CLIENT, f"sid-{n}")) for n in range(20)))
    assert sorted(reconnects) == [False] + [True] * 19


@pytest.mark.gen_test
async def test_the_end_of_a_participant_leaves_what_a_reconnect_is_known_by(presence, redis_client):
    await presence.set_client(CLIENT)
    await presence.remove(CLIENT)
    assert redis_client.keys() == ["p1"]


@pytest.mark.gen_test
async def test_a_join_that_failed_leaves_nothing(presence, redis_client):
    await presence.set_client(CLIENT)
    await presence.remove(CLIENT, forget=True)
    assert redis_client.keys() == []


@pytest.mark.gen_test
async def test_the_end_of_an_old_connection_takes_nothing_from_the_new_one(presence, redis_client):
    await presence.set_client(CLIENT)
    await presence.set_client(other(CLIENT, "sid-new"))
    await presence.remove(CLIENT, forget=True)
    assert redis_client.hgetall("lesson_student_1") == {"p1": "sid-new"}
    assert redis_client.hget("p1", "sid") == "sid-new"

    await presence.set_teacher(TEACHER)
    await presence.set_teacher(other(TEACHER, "sid-new"))
    await presence.remove(TEACHER)
    assert redis_client.hgetall("lesson_teacher_1") == {"ms-hill": "sid-new"}
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "1"}


@pytest.mark.gen_test
async def test_the_end_of_a_teacher_takes_both_records(presence, redis_client):
    await presence.set_teacher(TEACHER)
    await presence.remove(TEACHER)
    assert redis_client.keys() == []


@pytest.mark.gen_test
async def test_a_teacher_who_went_on_to_another_lesson_stays_in_it(presence, redis_client):
    await presence.set_teacher(TEACHER)
    await presence.set_teacher(TeacherRecord("sid-2", "2", "ms-hill"))
    await presence.remove(TEACHER)
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "2"}
    assert redis_client.hgetall("lesson_teacher_2") == {"ms-hill": "sid-2"}
    assert not redis_client.exists("lesson_teacher_1")


@pytest.mark.gen_test
async def test_what_is_owed_is_paid_when_redis_is_back(presence, redis_client, store, monkeypatch):
    await presence.set_client(CLIENT)
    await presence.set_teacher(TEACHER)
    with monkeypatch.context() as outage:
        outage.setattr(store, "run", _raise_unavailable)
        await presence.remove(CLIENT)
        await presence.remove(TEACHER)
        await asyncio.sleep(0.05)
        assert redis_client.hgetall("lesson_student_1") == {"p1": "sid-p"}
    await eventually(lambda: redis_client.keys() == ["p1"])


@pytest.mark.gen_test
async def test_a_connection_that_joins_again_owes_nothing_any_more(presence, redis_client, store, monkeypatch):
    with monkeypatch.context() as outage:
        outage.setattr(store, "run", _raise_unavailable)
        await presence.remove(CLIENT, forget=True)
    await presence.set_client(CLIENT)
    await asyncio.sleep(0.1)
    assert redis_client.hgetall("lesson_student_1") == {"p1": "sid-p"}


async def _raise_unavailable(*commands):
    raise StoreUnavailable("Redis", "outage")
