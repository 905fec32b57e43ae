"""RDS: does the lesson exist, and how many seats has it. The only SQL of the server.

RDS is PostgreSQL, reached by aiopg. One query answers both questions of the diagrams (arrows 2 and 6), and joins of the
same lesson that wait at the same time wait for the same query.
"""

import asyncio
import contextlib
import logging
import re
import select
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import aiopg
import aiopg.connection
import psycopg2
import psycopg2.errors
import psycopg2.extensions

from lesson_server.errors import LessonNotFound, StoreUnavailable
from lesson_server.health import Condition
from lesson_server.settings import SettingsError

logger = logging.getLogger(__name__)

# A lesson_id, as text.
LESSON_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# What a connection that has died raises; AssertionError is the pool's, when one has died while the pool looked at
# another, and RuntimeError uvloop's, when a new one has the file descriptor of one that has died just now.
BROKEN_CONNECTION = (psycopg2.OperationalError, psycopg2.InterfaceError, AssertionError, RuntimeError)

# A seat map is one Redis hash written by one script: the bound keeps a wrong row in RDS from stalling Redis for all.
MAX_SEATS = 10_000

# Seconds that a lookup waits, when others are under way, for more joins of its lesson: classes begin on the hour.
GATHERING = 0.01

# Seconds for the command line to reach RDS.
CONNECT_TIMEOUT = 5


@dataclass(frozen=True, slots=True)
class Lesson:
    """A row of RDS. ``seat_count`` is 0 for a lesson without seats."""

    lesson_id: str
    seat_count: int


class Lessons:
    """The lessons that RDS knows.

    Args:
        dsn: libpq connection string or URL.
        query: one statement with the parameter ``%(lesson_id)s`` that returns the seat count, or no row.
        timeout: seconds that a lookup may take once it has a connection, further tries included.
        pool_size: connections held open. aiopg waits with ``select``, which breaks above file descriptor 1023, so all
            of them are opened before the first client.
    """

    def __init__(self, dsn: str, query: str, timeout: float, pool_size: int) -> None:
        self._dsn = dsn
        self._options = _parse_dsn(dsn).get("options", "")
        self._query = query
        self._timeout = timeout
        self._pool_size = pool_size
        self._pool: aiopg.Pool | None = None
        # Who waits for a connection waits here, where it is neither RDS that is slow nor four turns of a busy loop that
        # it takes to hand a connection on, as in aiopg's pool.
        self._turns = asyncio.Semaphore(pool_size)
        self._lookups: dict[str, asyncio.Task[Lesson | None]] = {}
        self._condition = Condition("RDS")

    async def open(self) -> None:
        """Opens the connections.

        Raises:
            SettingsError: RDS can't make sense of the query.
            StoreUnavailable: RDS can't be reached or refuses us.
        """
        _poll_instead_of_select()
        try:
            self._pool = await aiopg.create_pool(
                self._dsn,
                minsize=self._pool_size,
                maxsize=self._pool_size,
                timeout=self._timeout,
                enable_hstore=False,  # saves a query on each new connection
                # The server gives up as well; otherwise a query that we no longer wait for would go on there.
                options=f"{self._options} -c statement_timeout={int(self._timeout * 1000)}",
            )
        except (psycopg2.Error, OSError, TimeoutError) as error:
            raise StoreUnavailable("RDS", _cause(error)) from error
        await self._try_query()

    async def _try_query(self) -> None:
        """Finds a wrong ``rds.lesson_query`` at the start: at a join it would look like an outage."""
        try:
            await self._execute(self._query, {"lesson_id": ""})
        except psycopg2.errors.UndefinedTable as error:
            logger.error("RDS: %s; has conf/schema.sql been applied?", _cause(error))
        except (psycopg2.ProgrammingError, ValueError, TypeError, IndexError, KeyError) as error:
            raise SettingsError(f"rds.lesson_query (LESSON_RDS_LESSON_QUERY): {_cause(error)}") from error
        except (psycopg2.Error, OSError, TimeoutError) as error:
            raise StoreUnavailable("RDS", _cause(error)) from error

    async def close(self) -> None:
        """Closes the connections, those in use too."""
        if self._pool is not None:
            self._pool.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pool.wait_closed(), self._timeout)

    async def get(self, lesson_id: str) -> Lesson:
        """The lesson of that id.

        Source: Teacher App and Participant diagrams, arrows 2 to 4 and 6.

        Raises:
            LessonNotFound: RDS has no such lesson.
            StoreUnavailable: RDS failed or was too slow.
            ValueError: RDS says something that can't be a number of seats.
        """
        lookup = self._lookups.get(lesson_id)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(lesson_id))
            self._lookups[lesson_id] = lookup
            lookup.add_done_callback(partial(self._end_lookup, lesson_id))
        # Shielded: a join that is given up must not take the answer from the others that wait for it.
        lesson = await asyncio.shield(lookup)
        if lesson is None:
            raise LessonNotFound(lesson_id)
        return lesson

    def _end_lookup(self, lesson_id: str, lookup: "asyncio.Task[Lesson | None]") -> None:
        del self._lookups[lesson_id]
        if not lookup.cancelled():
            lookup.exception()  # looked at: when all that waited have given up, there is nobody else to do it

    async def ping(self) -> None:
        """Asks RDS for nothing but an answer.

        Raises:
            StoreUnavailable: there was none.
        """
        await self._fetch("SELECT 1", {})

    async def _look_up(self, lesson_id: str) -> Lesson | None:
        if len(self._lookups) > 1:
            await asyncio.sleep(GATHERING)
        row = await self._fetch(self._query, {"lesson_id": lesson_id})
        if row is None:
            return None
        seat_count = int(row[0] or 0)
        if seat_count > MAX_SEATS:
            raise ValueError(f"lesson {lesson_id} has {seat_count} seats in RDS, more than {MAX_SEATS}")
        return Lesson(lesson_id, max(seat_count, 0))

    async def _fetch(self, query: str, parameters: dict[str, str]) -> Any:
        """The first row, or None. All errors of aiopg and psycopg2 are translated here."""
        try:
            async with self._turns, asyncio.timeout(self._timeout):
                row = await self._execute_somewhere(query, parameters)
        except (psycopg2.Error, OSError, TimeoutError, *BROKEN_CONNECTION) as error:
            self._condition.failed(_cause(error))
            raise StoreUnavailable("RDS", _cause(error)) from error
        except asyncio.CancelledError:
            # aiopg raises this when the server cancelled the statement; when we were cancelled ourselves, it goes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._condition.failed("statement timeout")
            raise StoreUnavailable("RDS", "statement timeout") from None
        self._condition.answered()
        return row

    async def _execute_somewhere(self, query: str, parameters: dict[str, str]) -> Any:
        """Tries other connections when some have died since they were last used, as all have after a restart of RDS."""
        for _ in range(self._pool_size):
            with contextlib.suppress(*BROKEN_CONNECTION):
                return await self._execute(query, parameters)
        return await self._execute(query, parameters)

    async def _execute(self, query: str, parameters: dict[str, str]) -> Any:
        assert self._pool is not None, "Lessons.open() comes first"
        connection = await self._pool.acquire()
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(query, parameters)
                return await cursor.fetchone()
        finally:
            # Not awaited: that would only wait for the pool to wake somebody, and nobody waits there; see _turns.
            self._pool.release(connection)


# What the command line does to the table of conf/schema.sql, synchronously and by itself.


def add_lesson(dsn: str, lesson_id: str, seat_count: int | None, title: str) -> bool:
    """Adds a lesson, or changes the one of that id.

    Args:
        dsn: libpq connection string or URL.
        lesson_id: matches :data:`LESSON_ID`.
        seat_count: None for a lesson without seats.
        title: shown by :func:`list_lessons`.

    Returns:
        whether it is new.

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
    """The id, seat count and title of every lesson, in the order they were created.

    Raises:
        StoreUnavailable: RDS can't be reached or refuses.
    """
    return _run(dsn, "SELECT id, seat_count, title FROM lessons ORDER BY created_at, id", ())


def _run(dsn: str, query: str, parameters: tuple[object, ...]) -> list[Any]:
    _parse_dsn(dsn)
    try:
        connect = psycopg2.connect(dsn, connect_timeout=CONNECT_TIMEOUT)
        with contextlib.closing(connect) as connection, connection, connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return list(cursor.fetchall())
    except psycopg2.Error as error:
        raise StoreUnavailable("RDS", _cause(error)) from error


def _parse_dsn(dsn: str) -> dict[str, str]:
    """The parts of a connection string. libpq's own error would quote it, and the password with it."""
    try:
        parts: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
        for port in filter(None, parts.get("port", "").split(",")):
            int(port)
    except (psycopg2.ProgrammingError, ValueError):
        raise SettingsError("rds.dsn (LESSON_RDS_DSN): should be a libpq connection string or URI") from None
    return parts


def _cause(error: BaseException) -> str:
    """One line for the log. psycopg2's messages name host, user and database, never the password."""
    return " ".join(str(error).split()) or type(error).__name__


def _poll_instead_of_select() -> None:
    """Replaces the ``select.select`` that aiopg 1.4 calls after an SQL error to learn whether its socket is still open.

    ``select`` raises ValueError for a file descriptor above 1023, nobody catches it, and the query waits for ever.
    """

    def poll(readable: list[int], _writable: object, _exceptional: object, _timeout: float) -> None:
        poller = select.poll()
        poller.register(readable[0], select.POLLIN)
        if any(events & select.POLLNVAL for _, events in poller.poll(0)):
            raise OSError(9, "Bad file descriptor")

    aiopg.connection.select = SimpleNamespace(select=poll)  # type: ignore[assignment,attr-defined]
