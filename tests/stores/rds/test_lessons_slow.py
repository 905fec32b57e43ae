"""lessons.py when lessons are slow though RDS is well, or RDS fails at one of them."""

import asyncio
import gc

import psycopg2
import pytest
from lesson_queries import are_too_slow, ask_for

from lesson_server.errors import LessonNotFound, StoreUnavailable
from lesson_server.settings.schema import RdsSettings
from lesson_server.stores.rds import lessons as lessons_module
from lesson_server.stores.rds.connections import Rds
from lesson_server.stores.rds.lesson import Lesson
from lesson_server.stores.rds.lesson_admin import add_lesson, list_lessons
from lesson_server.stores.rds.lesson_query import LessonQuery

QUERY = RdsSettings().lesson_query


async def comes_true(condition):
    while not condition():
        await asyncio.sleep(0.001)


# Lessons that are slow though RDS is well

# Those whose id begins with "slow" are.
SOME_ARE_SLOW = "SELECT 3 FROM pg_sleep(CASE WHEN %(lesson_id)s LIKE 'slow%%' THEN 60 ELSE 0 END)"


def are_found(answers):
    return {answer.seat_count for answer in answers} == {3}


def assert_no_task_has_died(caplog):
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.fixture
def slow_and_quick(open_lessons, asked):
    """Lessons of which some are slow, three connections, and nothing asked for yet."""
    lessons = open_lessons(SOME_ARE_SLOW, timeout=1.6, pool_size=3)
    asked.clear()
    return lessons


async def becomes_slow(lessons, *lesson_ids):
    """Joins of these are under way, and they are known to be slow."""
    joins = [asyncio.create_task(lessons.get(lesson_id)) for lesson_id in lesson_ids]
    while not lessons._slow_lessons.keys() >= set(lesson_ids):
        await asyncio.sleep(0.01)
    return joins


def test_a_slow_lesson_does_not_fail_those_that_share_its_query(io_loop, slow_and_quick, asked, caplog):
    lesson_ids = ["quick-1", "slow", "quick-2"]
    quick, slow, other = io_loop.run_sync(lambda: ask_for(slow_and_quick, lesson_ids))
    assert are_found([quick, other])
    assert are_too_slow([slow])
    assert sorted(asked) == sorted([lesson_ids, ["quick-1"], ["slow"], ["quick-2"]])
    assert "RDS is unavailable" not in caplog.text


def test_many_slow_lessons_at_once_do_not_fail_those_that_share_their_queries(io_loop, open_lessons, monkeypatch):
    """More of them than there are connections, and all of them in front."""
    under_way = []
    most = []
    fetch = Rds.fetch

    async def count(*statement):
        under_way.append(statement)
        most.append(len(under_way))
        try:
            return await fetch(*statement)
        finally:
            under_way.remove(statement)

    monkeypatch.setattr(Rds, "fetch", count)
    lessons = open_lessons(SOME_ARE_SLOW, timeout=1.6, pool_size=4)
    lesson_ids = [f"slow-{number}" for number in range(5)] + [f"quick-{number}" for number in range(30)]
    answers = io_loop.run_sync(lambda: ask_for(lessons, lesson_ids), timeout=20)
    assert are_too_slow(answers[:5])
    assert are_found(answers[5:])
    assert max(most) == 4


def test_a_lesson_that_was_slow_is_asked_for_alone_until_it_is_quick(io_loop, slow_and_quick, asked, sql, monkeypatch):
    lessons = slow_and_quick
    assert are_too_slow(io_loop.run_sync(lambda: ask_for(lessons, ["slow"])))
    asked.clear()
    quick, slow, other = io_loop.run_sync(lambda: ask_for(lessons, ["quick-1", "slow", "quick-2"]))
    assert are_found([quick, other])
    assert are_too_slow([slow])
    assert sorted(asked) == [["quick-1", "quick-2"], ["slow"]]
    lessons._query = LessonQuery("SELECT 3 WHERE %(lesson_id)s <> ''")
    for together in ([["quick"], ["slow"]], [["quick", "slow"]]):
        asked.clear()
        assert are_found(io_loop.run_sync(lambda: ask_for(lessons, ["quick", "slow"])))
        assert sorted(asked) == together


def test_a_quick_lesson_does_not_wait_for_slow_ones_however_many(io_loop, slow_and_quick, asked):
    async def ask():
        slow = await becomes_slow(slow_and_quick, "slow-1", "slow-2")
        slow += [asyncio.create_task(slow_and_quick.get(f"slow-{number}")) for number in range(3, 9)]
        assert are_found([await slow_and_quick.get("quick")])
        assert not any(join.done() for join in slow[:2])
        for join in slow:
            join.cancel()

    io_loop.run_sync(ask, timeout=30)


def test_slow_and_quick_lessons_together_use_no_more_connections_than_there_are(io_loop, slow_and_quick, held):
    lessons = slow_and_quick
    lessons._remember_as_slow("slow")
    lessons._patience = 3600.0

    async def ask():
        joins = []
        for lesson_id in ("slow", "1", "2"):
            joins.append(asyncio.create_task(lessons.get(lesson_id)))
            await comes_true(lambda: len(held.under_way) == len(joins))
        joins.append(asyncio.create_task(lessons.get("3")))
        await asyncio.sleep(0.05)
        assert held.under_way == ["slow", "1", "2"]
        for name in ("slow", "1", "2", "3"):
            held.answer(name)
        assert are_found(await asyncio.gather(*joins))

    io_loop.run_sync(ask, timeout=20)


def test_a_batch_that_is_answered_late_ends_what_it_has_answered_and_nothing_newer(io_loop, slow_and_quick, held):
    lessons = slow_and_quick

    async def ask():
        first, other = (asyncio.create_task(lessons.get(lesson_id)) for lesson_id in ("a", "b"))
        await comes_true(lambda: set(held.under_way) == {"a,b", "a", "b"})  # the batch was slow
        held.answer("a")
        assert await first == Lesson("a", 3)
        held.hold_again("a")
        newer = asyncio.create_task(lessons.get("a"))
        await comes_true(lambda: held.asked.count("a") > 1)
        held.answer("a,b")
        assert await other == Lesson("b", 3)
        await comes_true(lambda: "b" not in held.under_way)
        held.answer("a")
        assert await newer == Lesson("a", 3)

    io_loop.run_sync(ask, timeout=20)


def test_a_batch_ends_when_its_lessons_have_been_answered_one_by_one(io_loop, slow_and_quick, held):
    async def ask():
        joins = ask_for(slow_and_quick, ["a", "b"])
        await comes_true(lambda: set(held.under_way) == {"a,b", "a", "b"})  # the batch was slow
        held.answer("a")
        held.answer("b")
        assert are_found(await joins)
        try:
            async with asyncio.timeout(5):
                await comes_true(lambda: held.under_way == [])
        finally:
            held.answer("a,b")

    io_loop.run_sync(ask, timeout=20)


def test_a_slow_lesson_that_finds_no_connection_waits_for_those_before_it(io_loop, open_lessons):
    """Each of these takes longer than the patience, and none longer than the timeout."""
    lessons = open_lessons("SELECT 3 FROM pg_sleep(0.3) WHERE %(lesson_id)s <> ''", timeout=1.6, pool_size=2)
    assert are_found(io_loop.run_sync(lambda: ask_for(lessons, ["1"])))
    assert are_found(io_loop.run_sync(lambda: ask_for(lessons, ["1", "2", "3", "4"]), timeout=20))


def test_batches_of_an_rds_that_is_slow_as_a_whole_are_answered(io_loop, slow_and_quick, monkeypatch, caplog):
    """The answer to a batch comes before those to its lessons, of which there are more than connections."""
    fetch = Rds.fetch

    async def is_slow(self, query, parameters):
        rows = await fetch(self, query, parameters)
        await asyncio.sleep(slow_and_quick._patience * 2)
        return rows

    monkeypatch.setattr(Rds, "fetch", is_slow)
    assert are_found(io_loop.run_sync(lambda: ask_for(slow_and_quick, [str(number) for number in range(8)])))
    io_loop.run_sync(slow_and_quick.close)
    assert_no_task_has_died(caplog)


def test_a_lesson_that_nobody_waits_for_any_more_is_not_asked_for(io_loop, slow_and_quick, asked):
    lessons = slow_and_quick

    async def ask():
        slow = await becomes_slow(lessons, "slow-1", "slow-2")
        given_up = [asyncio.create_task(lessons.get("slow-1")), *await becomes_slow(lessons, "slow-3")]
        for join in given_up:
            join.cancel()
        asked.clear()
        await asyncio.wait(slow)
        assert are_found([await lessons.get("quick")])
        assert asked == [["quick"]]
        still_slow = asyncio.create_task(lessons.get("slow-3"))
        assert are_found([await lessons.get("quick")])
        assert sorted(asked[1:]) == [["quick"], ["slow-3"]]
        still_slow.cancel()

    io_loop.run_sync(ask, timeout=20)


def test_a_lesson_that_nobody_waits_for_any_more_may_fail(io_loop, open_lessons, asked, caplog):
    lessons = open_lessons(SOME_ARE_SLOW, timeout=0.1)

    async def ask():
        join = asyncio.create_task(lessons.get("slow"))
        while ["slow"] not in asked:
            await asyncio.sleep(0)
        join.cancel()
        await asyncio.wait(lessons._tasks)
        assert not lessons._lookups._lookups

    io_loop.run_sync(ask)
    assert_no_task_has_died(caplog)


def test_joins_that_wait_when_the_server_stops_are_failed(io_loop, open_lessons, asked, monkeypatch, caplog):
    lessons = open_lessons(SOME_ARE_SLOW)
    monkeypatch.setattr(lessons._rds, "_timeout", 3600.0)

    async def ask():
        joins = ask_for(lessons, [f"slow-{number}" for number in range(100)])
        while ["slow-0"] not in asked:
            await asyncio.sleep(0.01)
        assert lessons._queue
        closing = asyncio.create_task(lessons.close())
        await asyncio.sleep(0)
        assert not lessons._queue
        await closing
        assert are_too_slow(await joins)

    io_loop.run_sync(ask, timeout=20)
    assert_no_task_has_died(caplog)


def test_the_server_stops_when_its_queries_have_ended(io_loop, lessons, monkeypatch, caplog):
    lessons._remember_as_slow("slow")
    under_way = []

    async def ends_late(self, query, parameters):
        under_way.append(query)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            under_way.remove(query)

    monkeypatch.setattr(Rds, "fetch", ends_late)

    async def ask():
        joins = ask_for(lessons, ["slow", "quick"])
        await comes_true(lambda: len(under_way) == 2)
        await lessons.close()
        assert under_way == []
        assert are_too_slow(await joins)

    io_loop.run_sync(ask, timeout=20)
    assert_no_task_has_died(caplog)


def test_lessons_that_were_slow_because_rds_was_are_asked_for_together_again(
    io_loop, slow_and_quick, asked, monkeypatch
):
    lessons = slow_and_quick
    availability = lessons._rds.availability

    async def does_not_answer():
        raise ConnectionError

    async def ask():
        (join,) = await becomes_slow(lessons, "slow")
        with monkeypatch.context() as outage:
            outage.setattr(availability, "_probe", does_not_answer)
            availability.failed("timeout")
            with pytest.raises(StoreUnavailable):
                await join
            asked.clear()
            with pytest.raises(StoreUnavailable):
                await lessons.get("quick")
            assert asked == []
        await availability._probing
        lessons._query = LessonQuery("SELECT 3 WHERE %(lesson_id)s <> ''")
        assert are_found(await ask_for(lessons, ["slow", "quick"]))
        assert asked == [["slow", "quick"]]

    io_loop.run_sync(ask)


def test_no_more_than_so_many_lessons_are_remembered_as_slow(io_loop, lessons, monkeypatch):
    monkeypatch.setattr(lessons_module, "MAX_SLOW_LESSONS", 2)
    for lesson_id in ("a", "b", "a", "c"):
        lessons._remember_as_slow(lesson_id)
    assert list(lessons._slow_lessons) == ["b", "c"]


def test_readiness_does_not_wait_for_slow_lessons(io_loop, open_lessons):
    lessons = open_lessons(SOME_ARE_SLOW, pool_size=1)

    async def ask():
        (slow,) = await becomes_slow(lessons, "slow")
        await lessons.ping()
        assert not slow.done()

    io_loop.run_sync(ask)


# Lessons that RDS stumbles over


def test_a_lesson_that_rds_stumbles_over_is_nobody_else_s_fault(io_loop, open_lessons):
    """Nor is it an unknown one because "division by zero" names it."""
    lessons = open_lessons("SELECT 12 / (length(%(lesson_id)s) - 2)")
    good, bad, other = io_loop.run_sync(lambda: ask_for(lessons, ["seven-7", "by", "five5"]))
    assert (good, other) == (Lesson("seven-7", 2), Lesson("five5", 4))
    assert isinstance(bad, StoreUnavailable)
    bad, good = io_loop.run_sync(lambda: ask_for(lessons, ["by", "five5"]), timeout=20)
    assert isinstance(bad, StoreUnavailable)
    assert good == Lesson("five5", 4)


def test_a_batch_that_is_slow_and_then_fails_is_followed_by_one_query_for_each_lesson(io_loop, open_lessons, asked):
    lessons = open_lessons(
        "SELECT 12 / (length(id) - 2) FROM (SELECT %(lesson_id)s::text AS id, pg_sleep(0.3)) asked", timeout=4.0
    )
    asked.clear()
    *good, bad = io_loop.run_sync(lambda: ask_for(lessons, ["seven-7", "five5", "by"]))
    assert good == [Lesson("seven-7", 2), Lesson("five5", 4)]
    assert isinstance(bad, StoreUnavailable)
    assert sorted(asked) == [["by"], ["five5"], ["seven-7"], ["seven-7", "five5", "by"]]


def test_a_batch_that_rds_does_not_answer_fails_all_of_its_lessons(io_loop, lessons, monkeypatch):
    async def fails(self, query, parameters):
        raise StoreUnavailable("RDS", "timeout")

    monkeypatch.setattr(Rds, "fetch", fails)
    assert are_too_slow(io_loop.run_sync(lambda: ask_for(lessons, ["1", "2", "3"])))


def test_an_id_that_the_column_can_not_hold_is_that_of_no_lesson(io_loop, open_lessons, sql, caplog):
    sql.execute("CREATE TABLE numbered AS SELECT 7 AS id, 30 AS seats")
    try:
        lessons = open_lessons("SELECT seats FROM numbered WHERE id = %(lesson_id)s")
        known, *unknown = io_loop.run_sync(lambda: ask_for(lessons, ["7", "seven", "8", "9" * 64]))
    finally:
        sql.execute("DROP TABLE numbered")
    assert known == Lesson("7", 30)
    assert all(isinstance(error, LessonNotFound) for error in unknown)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_data_that_rds_can_not_take_is_no_unknown_lesson(io_loop, open_lessons):
    lessons = open_lessons(
        "SELECT seats::int FROM (VALUES ('a', '7'), ('b', 'many')) t (id, seats) WHERE id = %(lesson_id)s"
    )
    good, bad, unknown = io_loop.run_sync(lambda: ask_for(lessons, ["a", "b", "many"]))
    assert good == Lesson("a", 7)
    assert isinstance(bad, StoreUnavailable)
    assert isinstance(unknown, LessonNotFound)


def test_a_join_that_gives_up_does_not_take_the_answer_from_the_others(io_loop, open_lessons):
    lessons = open_lessons("SELECT 5 FROM pg_sleep(0.2) WHERE %(lesson_id)s = '1'")

    async def ask():
        first = asyncio.create_task(lessons.get("1"))
        second = asyncio.create_task(lessons.get("1"))
        await asyncio.sleep(0.05)
        first.cancel()
        return await second

    assert io_loop.run_sync(ask) == Lesson("1", 5)


def test_the_command_line_adds_changes_and_lists(stores):
    assert add_lesson(stores.dsn, "b", None, "") is True
    assert add_lesson(stores.dsn, "b", 12, "Algebra") is False
    assert list_lessons(stores.dsn) == [("1", 30, ""), ("b", 12, "Algebra")]


def test_the_command_line_says_why_it_can_not(tmp_path):
    with pytest.raises(StoreUnavailable) as caught:
        list_lessons(f"host={tmp_path} dbname=lessons")
    assert str(tmp_path) in caught.value.cause


def test_the_schema_is_what_the_default_query_asks(sql):
    sql.execute(QUERY, {"lesson_id": "1"})
    assert sql.fetchone() == (30,)
    with pytest.raises(psycopg2.errors.NotNullViolation):
        sql.execute("INSERT INTO lessons (id, title) VALUES ('x', NULL)")
