"""lesson_query.py: what is wrong with ``rds.lesson_query`` is found at the start, by a real PostgreSQL."""

import asyncio

import pytest

from lesson_server.errors import LessonNotFound, StoreUnavailable
from lesson_server.settings.schema import SettingsError
from lesson_server.stores.rds.lesson import Lesson


def refused(open_lessons, query):
    with pytest.raises(SettingsError) as caught:
        open_lessons(query)
    told = str(caught.value)
    assert told.startswith("rds.lesson_query (LESSON_RDS_LESSON_QUERY): ")
    assert "\n" not in told
    return told


@pytest.mark.parametrize(
    "query",
    [
        "SELEKT 1 WHERE %(lesson_id)s = ''",
        "SELECT 1 WHERE %(lesson_id)s LIKE 'q%'",
        "SELECT 1 WHERE 'quarter' LIKE 'q%' AND %(lesson_id)s <> ''",
        "SELECT 1 WHERE %(lesson_id)s = %(other)s",
        "SELECT 1 WHERE %(lesson_id)s <> '' AND %(lesson_id) <> '0'",
        "SELECT no_such_column FROM lessons WHERE id = %(lesson_id)s",
        "SELECT 5 FROM (SELECT NULL::uuid AS id) lessons WHERE id = %(lesson_id)s AND no_such_column",
        "SELECT 5 FROM (SELECT NULL::int AS id) lessons WHERE id = %(lesson_id)s AND no_such_column",
        "SELECT seat_count FROM lessons WHERE id = '%(lesson_id)s'",
    ],
)
def test_a_query_that_rds_can_not_take_is_named(open_lessons, query):
    refused(open_lessons, query)


def test_a_query_that_returns_no_column_is_named(open_lessons):
    assert "no column" in refused(open_lessons, "SELECT FROM lessons WHERE id = %(lesson_id)s")


def test_a_missing_table_is_told_to_the_log(io_loop, open_lessons, caplog):
    lessons = open_lessons("SELECT seat_count FROM not_yet WHERE id = %(lesson_id)s")
    (line,) = caplog.messages
    assert "conf/schema.sql" in line
    assert "\n" not in line
    with pytest.raises(StoreUnavailable):
        io_loop.run_sync(lambda: lessons.get("1"))


def test_lessons_of_a_table_that_is_made_later_are_asked_for_together(io_loop, open_lessons, sql, asked):
    lessons = open_lessons("SELECT seats FROM not_yet WHERE id = %(lesson_id)s")
    asked.clear()
    sql.execute("CREATE TABLE not_yet (id, seats) AS VALUES ('1', 5), ('2', 6)")
    try:

        async def ask():
            return await asyncio.gather(*map(lessons.get, ["1", "2"]))

        assert io_loop.run_sync(ask) == [Lesson("1", 5), Lesson("2", 6)]
        assert asked == [["1", "2"]]
    finally:
        sql.execute("DROP TABLE not_yet")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT seat_count FROM lessons WHERE id = %(lesson_id)s",
        "(SELECT seat_count FROM lessons WHERE id = %(lesson_id)s);",
        "-- ours\nSELECT seat_count, title FROM lessons WHERE id = %(lesson_id)s -- %(lesson_id)s",
        "SELECT seat_count FROM lessons WHERE id = %(lesson_id)s AND %(lesson_id)s IS NOT NULL",
        "SELECT seat_count FROM lessons WHERE id = %(lesson_id)s AND title NOT LIKE 'no%%'",
        "SELECT seat_count FROM lessons WHERE id = %(lesson_id)s FOR SHARE",
        "WITH asked AS (SELECT %(lesson_id)s AS id) SELECT seat_count FROM asked JOIN lessons USING (id)",
    ],
)
def test_a_good_query_is_taken_without_a_word(io_loop, open_lessons, caplog, query):
    lessons = open_lessons(query)
    assert caplog.text == ""

    async def ask():
        return await asyncio.gather(*map(lessons.get, ["1", "2"]), return_exceptions=True)

    assert io_loop.run_sync(lambda: lessons.get("1")) == Lesson("1", 30)
    known, unknown = io_loop.run_sync(ask)
    assert known == Lesson("1", 30)
    assert isinstance(unknown, LessonNotFound)
    assert caplog.text == ""


def test_a_query_by_which_every_lesson_exists_is_taken_without_a_word(io_loop, open_lessons, caplog):
    lessons = open_lessons("SELECT 5 -- %(lesson_id)s")
    assert io_loop.run_sync(lambda: lessons.get("any")) == Lesson("any", 5)
    assert caplog.text == ""


def test_the_start_does_not_run_the_query(open_lessons, sql):
    """It may be slow for the lesson that it is tried with, and it may write."""
    sql.execute("CREATE TABLE asked_for (lesson_id text)")
    try:
        open_lessons("SELECT 5 FROM pg_sleep(60) WHERE %(lesson_id)s <> ''")
        open_lessons("WITH asked AS (INSERT INTO asked_for VALUES (%(lesson_id)s) RETURNING 1) SELECT 5 FROM asked")
        sql.execute("SELECT count(*) FROM asked_for")
        assert sql.fetchone() == (0,)
    finally:
        sql.execute("DROP TABLE asked_for")


def test_a_query_that_can_not_be_part_of_another_asks_for_one_lesson_at_a_time(
    io_loop, open_lessons, sql, asked, caplog
):
    sql.execute("CREATE TABLE asked_for (lesson_id text)")
    try:
        lessons = open_lessons(
            "WITH asked AS (INSERT INTO asked_for VALUES (%(lesson_id)s) RETURNING 1) SELECT 5 FROM asked"
        )
        assert "one by one" in caplog.text
        asked.clear()

        async def ask():
            return await asyncio.gather(*map(lessons.get, ["1", "2"]))

        assert io_loop.run_sync(ask) == [Lesson("1", 5), Lesson("2", 5)]
        assert asked == [["1"], ["2"]]
        sql.execute("SELECT lesson_id FROM asked_for ORDER BY 1")
        assert sql.fetchall() == [("1",), ("2",)]
    finally:
        sql.execute("DROP TABLE asked_for")


# One lesson, several ids


@pytest.mark.parametrize(
    ("column", "compared", "named"),
    [
        ("7", "id = %(lesson_id)s", "integer"),
        ("7::bigint", "%(lesson_id)s = id", "bigint"),
        ("7::numeric", "id = %(lesson_id)s AND %(lesson_id)s IS DISTINCT FROM id", "numeric"),
        ("7", "id = %(lesson_id)s AND 'x'::bytea <> %(lesson_id)s", "integer"),
        ("'7'::text", "id::int = CAST(%(lesson_id)s AS int)", "integer"),
        ("'6d9d2b5e-6b5c-4c0e-9d53-0ac0f8b5a4a4'::uuid", "id = %(lesson_id)s", "uuid"),
        ("'10.0.0.7'::inet", "id = %(lesson_id)s", "inet"),  # which neither of the ids that are tried can be
    ],
)
def test_a_query_by_which_one_lesson_has_several_ids_gets_a_warning(open_lessons, caplog, column, compared, named):
    open_lessons(f"SELECT 5 FROM (SELECT {column} AS id) lessons WHERE {compared};")
    (line,) = caplog.messages
    assert f" as {named}," in line
    assert "WHERE id::text = %(lesson_id)s" in line


@pytest.mark.parametrize(
    ("column", "compared"),
    [
        ("7", "id::text = %(lesson_id)s"),
        ("7", "id = %(lesson_id)s AND id::text = %(lesson_id)s"),  # by the index of id
        ("'7'::varchar(64)", "id = %(lesson_id)s"),
        ("'7'::varchar(64)", "id = %(lesson_id)s::varchar(64)"),
        ("'7'::char(64)", "id = %(lesson_id)s"),
    ],
)
def test_a_query_by_which_a_lesson_has_one_id_gets_none(io_loop, open_lessons, caplog, column, compared):
    lessons = open_lessons(f"SELECT 5 FROM (SELECT {column} AS id) lessons WHERE {compared}")
    assert caplog.text == ""
    assert io_loop.run_sync(lambda: lessons.get("7")) == Lesson("7", 5)
    with pytest.raises(LessonNotFound):
        io_loop.run_sync(lambda: lessons.get("07"))
