"""Access of the command line to the table of conf/schema.sql, synchronously and by a connection of its own."""

import contextlib
from typing import Any

import psycopg2

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.rds.connections import cause_of, parse_dsn

# Seconds to reach RDS.
CONNECT_TIMEOUT = 5


def add_lesson(dsn: str, lesson_id: str, seat_count: int | None, title: str) -> bool:
    """Add a lesson, or update the lesson with this id.

    Args:
        dsn: libpq connection string or URL.
        lesson_id: matches :data:`LESSON_ID`.
        seat_count: None for a lesson without seats.
        title: shown by :func:`list_lessons`.

    Returns:
        whether the lesson is new.

    Raises:
        StoreUnavailable: RDS can't be reached or refuses.
    """
    rows = _run(
        dsn,
        "INSERT INTO lessons (id, seat_count, title) VALUES (%s, %s, %s) ON CONFLICT (id) DO UPDATE"
        " SET seat_count = excluded.seat_count, title = excluded.title RETURNING xmax = 0",
        (lesson_id, seat_count, title),
    )
    return bool(rows[0][0])


def list_lessons(dsn: str) -> list[tuple[str, int | None, str]]:
    """Return the id, seat count and title of every lesson, in the order they were created.

    Raises:
        StoreUnavailable: RDS can't be reached or refuses.
    """
    return _run(dsn, "SELECT id, seat_count, title FROM lessons ORDER BY created_at, id", ())


def _run(dsn: str, query: str, parameters: tuple[object, ...]) -> list[Any]:
    parse_dsn(dsn)
    try:
        connect = psycopg2.connect(dsn, connect_timeout=CONNECT_TIMEOUT)
        with contextlib.closing(connect) as connection, connection, connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return list(cursor.fetchall())
    except psycopg2.Error as error:
        raise StoreUnavailable("RDS", cause_of(error)) from error
