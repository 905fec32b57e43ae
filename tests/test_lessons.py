"""lessons.py against a real PostgreSQL."""

import asyncio
import os
import resource
import threading

import psycopg2
import pytest

from lesson_server import lessons as lessons_module
from lesson_server.errors import LessonNotFound, StoreUnavailable
from lesson_server.lesson_table import add_lesson, list_lessons
from lesson_server.lessons import FIRST_LESSONS, MAX_LESSONS, Lesson, Lessons
from lesson_server.settings import RdsSettings, SettingsError

QUERY = RdsSettings().lesson_query
SLOW = "SELECT seat_count FROM lessons, pg_sleep(60) WHERE id = %(lesson_id)s"


@pytest.fixture
def open_lessons(io_loop, stores):
    opened = []

    def open_lessons(query=QUERY, timeout=3.0, pool_size=2):
        lessons = Lessons(stores.dsn, query, timeout, pool_size)
        io_loop.run_sync(lessons.open)
        opened.append(lessons)
        return lessons

    yield open_lessons
    for lessons in opened:
        io_loop.run_sync(lessons.close)


@pytest.fixture
def lessons(open_lessons):
    return open_lessons()


@pytest.mark.gen_test
async def test_a_lesson_has_its_seats(lessons):
    assert await lessons.get("1") == Lesson("1", 30)


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


@pytest.fixture
def asked(monkeypatch):
    """The lessons that each query asked for."""
    asked = []
    execute = Lessons._execute

    async def watch(self, query, parameters):
        if parameters:
            asked.append(list(parameters.values()))
        return await execute(self, query, parameters)

    monkeypatch.setattr(Lessons, "_execute", watch)
    return asked


def ask_for(lessons, lesson_ids):
    """What becomes of joins of these lessons in the same moment."""
    return asyncio.gather(*map(lessons.get, lesson_ids), return_exceptions=True)


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


def test_a_query_is_no_longer_than_rds_can_plan(io_loop, lessons, asked):
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


def test_a_query_grows_again_when_rds_is_quick_again(io_loop, lessons, asked):
    lessons._adapt(48, 100.0)
    assert lessons._lessons_in_query == 24
    for _ in range(9):
        lessons._adapt(lessons._lessons_in_query, 100.0)
    assert lessons._lessons_in_query == 1
    io_loop.run_sync(lambda: ask_for(lessons, [str(number) for number in range(20)]))
    assert [len(together) for together in asked] == [1, 2, 4, 8, 5]


def test_lessons_that_follow_a_query_gather_for_the_next_one(io_loop, lessons, asked, monkeypatch):
    monkeypatch.setattr(lessons_module, "QUERY_INTERVAL", 1.0)
    monkeypatch.setattr(lessons_module, "SLOW_QUERY", 10.0)

    async def ask():
        await ask_for(lessons, ["1"])
        second = asyncio.create_task(lessons.get("2"))
        await asyncio.sleep(0.01)
        await asyncio.gather(second, lessons.get("3"), return_exceptions=True)

    io_loop.run_sync(ask)
    assert asked == [["1"], ["2", "3"]]


def test_lessons_do_not_wait_for_a_slow_query(io_loop, open_lessons, asked):
    lessons = open_lessons("SELECT 3 FROM pg_sleep(CASE %(lesson_id)s WHEN 'slow' THEN 60 ELSE 0 END)", timeout=5)

    async def ask():
        slow = asyncio.create_task(lessons.get("slow"))
        while ["slow"] not in asked:
            await asyncio.sleep(0)
        assert await lessons.get("quick") == Lesson("quick", 3)
        assert not slow.done()
        slow.cancel()

    io_loop.run_sync(ask)


def test_a_lesson_that_rds_stumbles_over_is_nobody_else_s_fault(io_loop, open_lessons):
    lessons = open_lessons("SELECT 12 / (length(%(lesson_id)s) - 3)")
    good, bad, other = io_loop.run_sync(lambda: ask_for(lessons, ["seven-7", "bad", "five5"]))
    assert (good, other) == (Lesson("seven-7", 3), Lesson("five5", 6))
    assert isinstance(bad, StoreUnavailable)


def test_an_id_that_the_column_can_not_hold_is_that_of_no_lesson(io_loop, open_lessons, sql, caplog):
    sql.execute("CREATE TABLE numbered AS SELECT 7 AS id, 30 AS seats")
    try:
        lessons = open_lessons("SELECT seats FROM numbered WHERE id = %(lesson_id)s")
        known, *unknown = io_loop.run_sync(lambda: ask_for(lessons, ["7", "seven", "8", "9" * 64]))
    finally:
        sql.execute("DROP TABLE numbered")
    assert known == Lesson("7", 30)
    assert all(isinstance(error, LessonNotFound) for error in unknown)
    assert "unavailable" not in caplog.text


def test_a_query_that_can_not_be_part_of_another_asks_for_one_lesson_at_a_time(io_loop, open_lessons, sql, caplog):
    sql.execute("CREATE TABLE asked_for (lesson_id text)")
    try:
        lessons = open_lessons(
            "WITH asked AS (INSERT INTO asked_for VALUES (%(lesson_id)s) RETURNING 1) SELECT 5 FROM asked"
        )
        assert "one by one" in caplog.text
        assert io_loop.run_sync(lambda: ask_for(lessons, ["1", "2"])) == [Lesson("1", 5), Lesson("2", 5)]
        sql.execute("SELECT count(*) FROM asked_for WHERE lesson_id <> ''")
        assert sql.fetchone() == (2,)
    finally:
        sql.execute("DROP TABLE asked_for")


def test_a_join_that_gives_up_does_not_take_the_answer_from_the_others(io_loop, open_lessons):
    lessons = open_lessons("SELECT 5 FROM pg_sleep(0.2) WHERE %(lesson_id)s = '1'")

    async def ask():
        first = asyncio.create_task(lessons.get("1"))
        second = asyncio.create_task(lessons.get("1"))
        await asyncio.sleep(0.05)
        first.cancel()
        return await second

    assert io_loop.run_sync(ask) == Lesson("1", 5)


def test_a_slow_rds_is_unavailable_and_its_query_ends_on_the_server_too(io_loop, open_lessons, sql):
    lessons = open_lessons(SLOW, timeout=0.3)
    with pytest.raises(StoreUnavailable):
        io_loop.run_sync(lambda: lessons.get("1"))
    for _ in range(200):
        sql.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid() AND state = 'active'"
        )
        if sql.fetchone() == (0,):
            return
        io_loop.run_sync(lambda: asyncio.sleep(0.05))
    pytest.fail("the query goes on on the server")


def test_a_statement_that_the_server_cancels_is_unavailable_and_not_a_cancellation(io_loop, stores):
    """aiopg raises CancelledError for it, which would end the join's task without an answer."""
    lessons = Lessons(stores.dsn, SLOW, 3.0, 1)
    lessons._timeout = 0.2  # the server gives up first
    io_loop.run_sync(lessons.open)
    lessons._timeout = 10.0
    with pytest.raises(StoreUnavailable):
        io_loop.run_sync(lambda: lessons.get("1"), timeout=20)
    io_loop.run_sync(lessons.close)


@pytest.mark.gen_test
async def test_a_broken_statement_is_unavailable_also_above_descriptor_1023(open_lessons_later):
    """aiopg's error path calls select(), which can't take such a descriptor; the query would hang."""
    lessons = await open_lessons_later(QUERY)
    lessons._query = "SELECT nonsense WHERE %(lesson_id)s = ''"
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(lessons.get("1"), 10)


@pytest.fixture
def open_lessons_later(io_loop, stores):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    opened = []

    async def open_lessons_later(query):
        lessons = Lessons(stores.dsn, query, 3.0, 1)
        await lessons.open()
        opened.append(lessons)
        return lessons

    yield open_lessons_later
    for lessons in opened:
        io_loop.run_sync(lessons.close)
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_rds_has_closed_are_replaced_unnoticed(io_loop, lessons, sql):
    """As after a restart or a failover of RDS."""
    sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'lessons'"
    )
    assert io_loop.run_sync(lambda: lessons.get("1")) == Lesson("1", 30)


def test_open_says_in_one_line_why_it_can_not(io_loop, tmp_path):
    lessons = Lessons(f"postgresql://someone:sesame@/lessons?host={tmp_path}", QUERY, 1.0, 1)
    with pytest.raises(StoreUnavailable) as caught:
        io_loop.run_sync(lessons.open)
    assert str(tmp_path) in caught.value.cause
    assert "\n" not in caught.value.cause
    assert "sesame" not in caught.value.cause


def test_the_log_tells_of_a_change_and_not_of_each_request(io_loop, lessons, stores, caplog):
    good, lessons._query = lessons._query, "SELECT broken WHERE %(lesson_id)s = ''"
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            io_loop.run_sync(lambda: lessons.get("1"))
    lessons._query = good
    for _ in range(3):
        io_loop.run_sync(lambda: lessons.get("1"))
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


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


def test_no_thread_is_left(io_loop, lessons):
    io_loop.run_sync(lambda: lessons.get("1"))
    assert threading.active_count() == 1


# What is wrong with a setting is found at the start.


def fails_to_open(io_loop, stores, query=QUERY, dsn=None):
    async def open_and_close():
        lessons = Lessons(dsn or stores.dsn, query, 2.0, 1)
        try:
            await lessons.open()
        finally:
            await lessons.close()

    with pytest.raises(SettingsError) as caught:
        io_loop.run_sync(open_and_close)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "query",
    [
        "SELEKT 1 WHERE %(lesson_id)s = ''",
        "SELECT 1 WHERE %(lesson_id)s LIKE 'q%'",
        "SELECT no_such_column FROM lessons WHERE id = %(lesson_id)s",
    ],
)
def test_a_query_that_rds_can_not_take_is_named(io_loop, stores, query):
    assert fails_to_open(io_loop, stores, query).startswith("rds.lesson_query (LESSON_RDS_LESSON_QUERY): ")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgres//someone:sesame@127.0.0.1/school",
        "postgresql://someone:ses/ame@127.0.0.1/school",
        "host=127.0.0.1 port=sesame",
    ],
)
def test_a_malformed_dsn_is_named_and_not_quoted(io_loop, stores, dsn):
    told = fails_to_open(io_loop, stores, dsn=dsn)
    assert told == "rds.dsn (LESSON_RDS_DSN): should be a libpq connection string or URI"
    with pytest.raises(SettingsError):
        list_lessons(dsn)


def test_a_missing_table_is_told_to_the_log(io_loop, open_lessons, caplog):
    lessons = open_lessons("SELECT seat_count FROM not_yet WHERE id = %(lesson_id)s")
    assert "conf/schema.sql" in caplog.text
    with pytest.raises(StoreUnavailable):
        io_loop.run_sync(lambda: lessons.get("1"))


def test_the_options_of_the_dsn_are_kept(io_loop, stores, sql):
    sql.execute("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.here AS SELECT 4 AS seats")
    query = "SELECT seats FROM here WHERE %(lesson_id)s IS NOT NULL"
    lessons = Lessons(stores.dsn + " options='-c search_path=elsewhere'", query, 2.0, 1)
    try:
        io_loop.run_sync(lessons.open)
        assert io_loop.run_sync(lambda: lessons.get("1")) == Lesson("1", 4)
    finally:
        io_loop.run_sync(lessons.close)
        sql.execute("DROP SCHEMA elsewhere CASCADE")
