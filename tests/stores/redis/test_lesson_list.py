"""lesson_list.py: the lessons in which somebody is, against a real Valkey."""

import pytest
from fakes import BreakableStore
from node_keys import House
from presences import RECORDS, other

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis.lesson_list import LessonList
from lesson_server.stores.redis.nodes import LOST_AFTER
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord

LIST = "lesson_node_lessons"


@pytest.fixture
def store(io_loop, stores):
    store = BreakableStore(stores.redis_url, "", 2.0, 4)
    yield store
    io_loop.run_sync(store.close)


@pytest.fixture
def lessons(store):
    return LessonList(store)


def listed(redis_client):
    return redis_client.zrange(LIST, 0, -1)


# The list


@pytest.mark.gen_test
async def test_a_page_has_the_lessons_that_follow_in_the_order_of_their_ids(lessons, store):
    ids = ["-", "0", "1", "10", "2", "A", "B", "_", "a", "b", "b-", "b_"]
    await store.execute(lessons.addition(reversed(ids)))
    assert ids == sorted(ids)
    assert await lessons.page(None, 100) == ids
    for limit in (1, 5, len(ids)):
        pages, after = [], None
        while page := await lessons.page(after, limit):
            assert len(page) <= limit
            pages += page
            after = page[-1]
        assert pages == ids
    assert await lessons.page("aa", 2) == ["b", "b-"]  # a lesson that is not in the list
    assert await lessons.page("b_", 2) == []


@pytest.mark.gen_test
async def test_a_lesson_is_in_the_list_once(lessons, store, redis_client):
    for _ in range(2):
        await store.execute(lessons.addition(["1", "2"]))
    assert redis_client.zrange(LIST, 0, -1, withscores=True) == [("1", 0), ("2", 0)]


@pytest.mark.gen_test
async def test_only_empty_lessons_are_removed(lessons, store, redis_client):
    redis_client.hset("lesson_teacher_1", "t1", "sid")
    redis_client.hset("lesson_student_2", "p1", "sid")
    redis_client.hset("lesson_seat_3", "1", "p1")  # a seat is nobody
    await store.execute(lessons.addition(["1", "2", "3", "4"]))
    await lessons.remove_empty(["1", "2", "3", "4", "not in the list"])
    assert listed(redis_client) == ["1", "2"]


@pytest.mark.parametrize("at", ["before the check", "before the removal", "before the second check", "after it"])
@pytest.mark.gen_test
async def test_who_joins_during_a_removal_is_in_a_lesson_that_is_listed(
    lessons, store, presence, redis_client, monkeypatch, at
):
    step = ["before the check", "before the removal", "before the second check", "after it"].index(at)
    await store.execute(lessons.addition(["1", "2"]))
    steps = []
    execute = store.execute

    async def join_at_step(*commands, bookkeeping=()):
        if len(steps) == step:
            await presence.write(ClientRecord("sid", "1", "p1", "student"))
        steps.append(commands[0][0])
        return await execute(*commands, bookkeeping=bookkeeping)

    monkeypatch.setattr(store, "execute", join_at_step)
    await lessons.remove_empty(["1", "2"])
    if step == len(steps):
        await presence.write(ClientRecord("sid", "1", "p1", "student"))
    assert steps[:3] == ["EXISTS", "ZREM", "EXISTS"]
    assert redis_client.exists("lesson_student_1")
    assert listed(redis_client) == ["1"]


# Presence keeps the list


@RECORDS
@pytest.mark.gen_test
async def test_a_lesson_is_listed_from_the_first_join_to_the_last_leave(presence, elsewhere, redis_client, record):
    await presence.write(record)
    assert listed(redis_client) == ["1"]
    await elsewhere.write(other(record, "another"))
    await presence.remove(record.sid)
    assert listed(redis_client) == ["1"]
    await elsewhere.remove("another")
    assert listed(redis_client) == []


@pytest.mark.gen_test
async def test_a_teacher_alone_and_a_participant_alone_keep_the_lesson_listed(presence, redis_client):
    await presence.write(TeacherRecord("sid-t", "1", "t1"))
    await presence.write(ClientRecord("sid-p", "1", "p1", "student"))
    await presence.remove("sid-t")
    assert listed(redis_client) == ["1"]
    await presence.write(TeacherRecord("sid-t", "1", "t1"))
    await presence.remove("sid-p")
    assert listed(redis_client) == ["1"]
    await presence.remove("sid-t", undo=True)
    assert listed(redis_client) == []


@RECORDS
@pytest.mark.gen_test
async def test_the_list_has_the_prefix_of_all_keys(open_presence, redis_client, record):
    presence = open_presence(key_prefix="school:")
    await presence.write(record)
    assert redis_client.zrange(f"school:{LIST}", 0, -1) == ["1"]
    assert not redis_client.exists(LIST)
    await presence.remove(record.sid)
    assert not redis_client.exists(f"school:{LIST}")


@RECORDS
@pytest.mark.gen_test
async def test_a_failed_join_leaves_no_lesson_in_the_list(presence, redis_client, record):
    presence._store.fault = "unanswered"
    with pytest.raises(StoreUnavailable):
        await presence.write(record)
    presence._store.fault = None
    assert presence._store.injected == 1
    assert listed(redis_client) == ["1"]
    await presence.remove(record.sid, undo=True)
    assert listed(redis_client) == []


@RECORDS
@pytest.mark.gen_test
async def test_an_outage_during_a_leave_ends_with_the_lesson_removed(presence, redis_client, record):
    await presence.write(record)
    presence._store.fault = "unreachable"
    await presence.remove(record.sid)
    assert presence._store.injected == 1
    assert listed(redis_client) == ["1"]
    presence._store.fault = None
    await presence.removals.settled()
    assert listed(redis_client) == []


@pytest.mark.gen_test
async def test_the_lessons_of_a_lost_node_are_removed_with_its_people(a, b, redis_client):
    await a.join(TeacherRecord("1", "only-a", "t1"), ClientRecord("2", "both", "p1", "student"))
    await b.join(ClientRecord("3", "both", "p2", "student"))
    await b.beat(LOST_AFTER + 2)
    assert listed(redis_client) == ["both"]


@pytest.mark.parametrize("lost", [None, LIST], ids=["everything", "the list"])
@pytest.mark.gen_test
async def test_the_check_of_the_records_restores_a_list_that_redis_has_lost(a: House, redis_client, lost):
    await a.join(TeacherRecord("1", "first", "t1"), ClientRecord("2", "second", "p1", "student"))
    redis_client.delete(lost) if lost else redis_client.flushall()
    assert listed(redis_client) == []
    await a.beat()
    await a.node.check_records()
    assert listed(redis_client) == ["first", "second"]


@RECORDS
@pytest.mark.gen_test
async def test_a_list_of_another_type_fails_no_join(presence, redis_client, record):
    redis_client.set(LIST, "not a list")
    await presence.write(record)
    assert redis_client.exists(f"lesson_{'teacher' if isinstance(record, TeacherRecord) else 'student'}_1")
    await presence.remove(record.sid)
    assert not redis_client.exists("lesson_teacher_1", "lesson_student_1")
