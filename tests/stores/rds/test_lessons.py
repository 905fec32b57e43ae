"""lessons.py against a real PostgreSQL."""

import asyncio
from functools import partial

import pytest
from lesson_queries import are_too_slow, ask_for
from waiting import LONG, until

from lesson_server.errors import LessonNotFound, StoreUnavailable
from lesson_server.stores.rds.lesson import Lesson
from lesson_server.stores.rds.lessons import FIRST_LESSONS, MAX_LESSONS


@pytest.mark.gen_test
async def test_a_lesson_has_its_seats(lessons):
    assert await lessons.get("1") == Lesson("1", 30)
    await until(lambda: not lessons._tasks)  # while nobody asks, nothing runs


@pytest.mark.gen_test
async def test_an_unknown_lesson_is_named(lessons):
    with pytest.raises(LessonNotFound, match=r"^lesson no-such not found$"):
        await lessons.get("no-such")


@pytest.mark.parametrize(("in_rds", "seats"), [(None, 0), (0, 0), (-3, 0), (1, 1), (10_000, 10_000)])
def test_null_and_zero_are_no_seats(io_loop, lessons, sql, in_rds, seats):
    sql.execute("UPDATE lessons SET seat_count = %s", (in_rds,))
    assert io_loop.run_sync(lambda: lessons.get("1")).seat_count == seats


@pytest.mark.gen_test
async def test_a_seat_count_that_redis_could_not_hold_is_an_error_of_the_data(lessons, sql):
    sql.execute("UPDATE lessons SET seat_count = 10001")
    with pytest.raises(ValueError, match="10001"):
        await lessons.get("1")


@pytest.mark.parametrize("in_rds", ["'many'", "ARRAY[1]", "'Infinity'::float8"])
def test_a_seat_count_that_is_no_number_is_an_error_of_the_data(io_loop, open_lessons, in_rds):
    lessons = open_lessons(f"SELECT {in_rds} WHERE %(lesson_id)s <> ''")
    with pytest.raises(ValueError, match=r"^lesson maths-1 has a number of seats in RDS that is none$"):
        io_loop.run_sync(lambda: lessons.get("maths-1"))


@pytest.mark.gen_test
async def test_a_lesson_id_is_never_part_of_the_statement(lessons):
    with pytest.raises(LessonNotFound):
        await lessons.get("1' OR '1'='1")


def test_a_platform_may_ask_its_own_tables(io_loop, open_lessons):
    lessons = open_lessons("SELECT 7.0 WHERE %(lesson_id)s = 'abc'")
    assert io_loop.run_sync(lambda: lessons.get("abc")) == Lesson("abc", 7)


def test_joins_that_wait_together_share_one_query(io_loop, open_lessons, sql):
    sql.execute("CREATE SEQUENCE asked")
    try:
        lessons = open_lessons("SELECT 5 FROM (SELECT nextval('asked')) asked, pg_sleep(0.1) WHERE %(lesson_id)s = '1'")

        async def ask():
            return await asyncio.gather(*(lessons.get("1") for _ in range(50)))

        assert io_loop.run_sync(ask) == [Lesson("1", 5)] * 50
        sql.execute("SELECT last_value FROM asked")
        assert sql.fetchone() == (1,)
    finally:
        sql.execute("DROP SEQUENCE asked")


@pytest.mark.parametrize("ending", ["", ";", " -- how many", "\n"])
def test_lessons_that_are_wanted_together_are_asked_for_together(io_loop, open_lessons, asked, ending):
    lessons = open_lessons("SELECT length(%(lesson_id)s), 0 WHERE %(lesson_id)s <> 'no-such'" + ending)
    asked.clear()
    known, short, unknown = io_loop.run_sync(lambda: ask_for(lessons, ["lesson", "2", "no-such"]))
    assert (known, short) == (Lesson("lesson", 6), Lesson("2", 1))
    assert isinstance(unknown, LessonNotFound)
    assert asked == [["lesson", "2", "no-such"]]


def test_of_several_rows_the_first_counts_however_many_lessons_are_asked_for(io_loop, open_lessons):
    lessons = open_lessons("SELECT * FROM (VALUES (1), (2)) seats WHERE %(lesson_id)s <> ''")
    assert io_loop.run_sync(lambda: lessons.get("1")) == Lesson("1", 1)
    assert io_loop.run_sync(lambda: ask_for(lessons, ["1", "2"])) == [Lesson("1", 1), Lesson("2", 1)]


def test_a_query_is_no_longer_than_rds_can_plan(io_loop, open_lessons, asked):
    lessons = open_lessons(pool_size=1)
    io_loop.run_sync(lambda: ask_for(lessons, ["one"]))  # not a reason for longer or shorter ones
    asked.clear()
    lesson_ids = [str(number) for number in range(150)]
    io_loop.run_sync(lambda: ask_for(lessons, lesson_ids))
    assert [len(together) for together in asked] == [8, 16, 32, 48, 46]
    assert MAX_LESSONS == 48


def test_lessons_of_a_slow_query_do_not_time_out_together(io_loop, open_lessons, asked):
    """One that takes a twentieth of the timeout for each lesson would, with fifty in it, fail all of them for ever."""
    lessons = open_lessons("SELECT 3 FROM pg_sleep(0.1) WHERE %(lesson_id)s <> ''", timeout=2.0)
    asked.clear()
    first, second = [[f"{turn}-{number}" for number in range(16)] for turn in "ab"]
    answers = io_loop.run_sync(lambda: ask_for(lessons, first))
    answers += io_loop.run_sync(lambda: ask_for(lessons, second))
    assert answers == [Lesson(lesson_id, 3) for lesson_id in first + second]
    assert max(len(together) for together in asked) == FIRST_LESSONS


def test_a_slow_batch_is_followed_by_shorter_ones_which_grow_again(io_loop, open_lessons, asked, monkeypatch):
    lessons = open_lessons("SELECT 3 FROM pg_sleep(0.005) WHERE %(lesson_id)s <> ''", pool_size=1)
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(lessons, "_patience", 0.0)
        for length in (8, 4, 2, 1):
            lesson_ids = [f"{length}-{number}" for number in range(length)]
            io_loop.run_sync(partial(ask_for, lessons, lesson_ids))
    batches = [len(together) for together in asked]
    assert [length for length in batches if length > 1] == [8, 4, 2]
    asked.clear()
    io_loop.run_sync(lambda: ask_for(lessons, [str(number) for number in range(20)]))
    assert [len(together) for together in asked] == [1, 2, 4, 8, 5]


def test_while_all_connections_have_a_query_lessons_gather_for_the_next_one(io_loop, open_lessons, asked):
    lessons = open_lessons("SELECT 3 FROM pg_sleep(0.05) WHERE %(lesson_id)s <> ''", pool_size=2)

    async def ask():
        first = ask_for(lessons, ["1"])
        await until(lambda: len(asked) == 1)
        second = ask_for(lessons, ["2"])
        await until(lambda: len(asked) == 2)
        await asyncio.gather(first, second, ask_for(lessons, ["3"]), ask_for(lessons, ["4", "5"]))

    asked.clear()
    io_loop.run_sync(ask)
    assert asked == [["1"], ["2"], ["3", "4", "5"]]


def test_while_a_query_is_under_way_the_next_one_lets_lessons_of_the_next_turn_in(io_loop, lessons, held):
    async def ask():
        first = ask_for(lessons, ["1"])
        await until(lambda: held.under_way == ["1"])
        second = ask_for(lessons, ["2"])
        await asyncio.sleep(0)
        third = ask_for(lessons, ["3"])
        await until(lambda: len(held.under_way) == 2)
        for name in ("1", "2", "3", "2,3"):
            held.answer(name)
        await asyncio.gather(first, second, third)

    io_loop.run_sync(ask)
    assert held.asked == ["1", "2,3"]


def test_a_join_that_is_given_up_in_the_moment_of_the_answer_harms_nobody(io_loop, lessons, held):
    async def ask():
        given_up, waiting = (asyncio.ensure_future(lessons.get("1")) for _ in range(2))
        await until(lambda: held.under_way == ["1"])
        given_up.cancel()
        await lessons.close()
        with pytest.raises(StoreUnavailable):
            await waiting

    io_loop.run_sync(ask)


def test_after_an_outage_those_are_asked_for_who_come_then(io_loop, open_lessons):
    lessons = open_lessons(pool_size=1)

    async def ask():
        async with lessons._turns:
            waiting = ask_for(lessons, ["2"])
            await until(lambda: lessons._lookups._lookups)
            await asyncio.sleep(0)
            lessons._fail_all()
            assert are_too_slow(await waiting)
        async with asyncio.timeout(LONG):
            return await lessons.get("1")

    assert io_loop.run_sync(ask) == Lesson("1", 30)
