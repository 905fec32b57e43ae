"""RDS: does the lesson exist, and how many seats has it. The only SQL that a join runs.

RDS is PostgreSQL, reached by aiopg. One query answers both questions of the diagrams (arrows 2 and 6). Joins of a
lesson that wait at the same time wait for the same answer, and lessons that are wanted in the same moment are asked
for by one query.
"""

import asyncio
import contextlib
import logging
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

import aiopg
import psycopg2
import psycopg2.errors
import psycopg2.extensions

from lesson_server.errors import LessonNotFound, StoreUnavailable
from lesson_server.health import Condition
from lesson_server.mended_aiopg import mend
from lesson_server.settings import SettingsError

logger = logging.getLogger(__name__)

# A lesson_id, as text.
LESSON_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# What a connection that has died raises; AssertionError is the pool's, when one has died while the pool looked at
# another, and RuntimeError too, when the pool has been closed because the server stops.
BROKEN_CONNECTION = (psycopg2.OperationalError, psycopg2.InterfaceError, AssertionError, RuntimeError)

# A seat map is one Redis hash written by one script: the bound keeps a wrong row in RDS from stalling Redis for all.
MAX_SEATS = 10_000

# Lessons that one query asks for: at first, and as long as it takes a small part of the timeout. PostgreSQL plans and
# answers the most in 3 ms, but an operator's own query may be slow, and the lessons of a query wait for each other.
FIRST_LESSONS = 8
MAX_LESSONS = 48
QUICK_PART = 0.25
# Seconds from the beginning of a query to that of the next one at least, while lessons gather for it. One for each join
# would cost a third of the server's time.
QUERY_INTERVAL = 0.005
# Seconds after which a query is slow: the next one goes by another connection.
SLOW_QUERY = 0.02

# What PostgreSQL says of an id that its column can't hold: such a lesson does not exist.
NO_ID = (psycopg2.errors.InvalidTextRepresentation, psycopg2.errors.NumericValueOutOfRange)
# Faults of a statement, and maybe of one lesson in it: the others are asked for without it.
STATEMENT_FAULTS = (
    psycopg2.DataError,
    psycopg2.IntegrityError,
    psycopg2.InternalError,
    psycopg2.NotSupportedError,
    psycopg2.ProgrammingError,
)


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
        self._options = parse_dsn(dsn).get("options", "")
        self._query = query
        self._timeout = timeout
        self._pool_size = pool_size
        self._pool: aiopg.Pool | None = None
        # Who waits for a connection waits here, where it is neither RDS that is slow nor four turns of a busy loop that
        # it takes to hand a connection on, as in aiopg's pool.
        self._turns = asyncio.Semaphore(pool_size)
        self._lessons_in_query = FIRST_LESSONS
        self._max_lessons_in_query = MAX_LESSONS
        self._lookups: dict[str, asyncio.Future[Lesson | None]] = {}
        self._waiting: deque[str] = deque()  # the lessons of those lookups that no query asks for yet
        self._queries: set[asyncio.Task[None]] = set()
        self._asker: asyncio.Task[None] | None = None
        self._condition = Condition("RDS")

    async def open(self) -> None:
        """Opens the connections.

        Raises:
            SettingsError: RDS can't make sense of the query.
            StoreUnavailable: RDS can't be reached or refuses us.
        """
        mend()
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
            raise StoreUnavailable("RDS", cause_of(error)) from error
        await self._try_query()

    async def _try_query(self) -> None:
        """Finds a wrong ``rds.lesson_query`` at the start: at a join it would look like an outage."""
        try:
            await self._execute(self._query, {"lesson_id": ""})
        except NO_ID:
            pass
        except psycopg2.errors.UndefinedTable as error:
            logger.error("RDS: %s; has conf/schema.sql been applied?", cause_of(error))
            return
        except (psycopg2.ProgrammingError, ValueError, TypeError, IndexError, KeyError) as error:
            raise SettingsError(f"rds.lesson_query (LESSON_RDS_LESSON_QUERY): {cause_of(error)}") from error
        except (psycopg2.Error, OSError, TimeoutError) as error:
            raise StoreUnavailable("RDS", cause_of(error)) from error
        try:
            await self._execute(*_together(self._query, ["", ""]))
        except NO_ID:
            pass
        except STATEMENT_FAULTS:  # as of one that writes
            logger.warning("rds.lesson_query can't be part of another query: lessons are looked up one by one")
            self._lessons_in_query = self._max_lessons_in_query = 1
        except (psycopg2.Error, OSError, TimeoutError) as error:
            raise StoreUnavailable("RDS", cause_of(error)) from error

    async def close(self) -> None:
        """Closes the connections, those in use too."""
        if self._pool is not None:
            self._pool.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pool.wait_closed(), self._timeout)
        if self._asker is not None:
            await asyncio.wait((self._asker, *self._queries), timeout=self._timeout)

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
            lookup = self._lookups[lesson_id] = asyncio.get_running_loop().create_future()
            self._waiting.append(lesson_id)
            if self._asker is None:
                self._asker = asyncio.create_task(self._ask())
        # Shielded: a join that is given up must not take the answer from the others that wait for it.
        lesson = await asyncio.shield(lookup)
        if lesson is None:
            raise LessonNotFound(lesson_id)
        return lesson

    async def ping(self) -> None:
        """Asks RDS for nothing but an answer.

        Raises:
            StoreUnavailable: there was none.
        """
        async with self._turns:
            await self._fetch("SELECT 1", {})

    async def _ask(self) -> None:
        """Asks RDS for what is wanted, query by query, until nobody waits for one."""
        while self._waiting:
            await self._turns.acquire()
            wanted = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._lessons_in_query))]
            query = asyncio.create_task(self._look_up(wanted))
            self._queries.add(query)
            query.add_done_callback(self._end_query)
            await asyncio.sleep(QUERY_INTERVAL)
            await asyncio.wait((query,), timeout=SLOW_QUERY - QUERY_INTERVAL)
        self._asker = None

    def _end_query(self, query: "asyncio.Task[None]") -> None:
        self._queries.discard(query)
        self._turns.release()

    async def _look_up(self, wanted: list[str]) -> None:
        """Asks for lessons by one query, and tells those who wait, whatever becomes of it."""
        outcomes: dict[str, Lesson | Exception | None]
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            found = await self._seat_counts(wanted)
            outcomes = {lesson_id: _lesson(lesson_id, found) for lesson_id in wanted}
        except Exception as error:
            if len(wanted) > 1 and isinstance(error.__cause__, STATEMENT_FAULTS):
                middle = len(wanted) // 2
                await self._look_up(wanted[:middle])
                await self._look_up(wanted[middle:])
                return
            outcomes = dict.fromkeys(wanted, error)
        self._adapt(len(wanted), loop.time() - began)
        for lesson_id, outcome in outcomes.items():
            lookup = self._lookups.pop(lesson_id)
            if isinstance(outcome, Exception):
                lookup.set_exception(outcome)
                lookup.exception()  # looked at: when all that waited have given up, there is nobody else to do it
            else:
                lookup.set_result(outcome)

    def _adapt(self, lessons: int, seconds: float) -> None:
        """Makes the next query shorter or longer, by how long one took that asked for so many lessons."""
        if seconds > self._timeout * QUICK_PART:
            self._lessons_in_query = max(lessons // 2, 1)
        elif lessons == self._lessons_in_query:
            self._lessons_in_query = min(lessons * 2, self._max_lessons_in_query)

    async def _seat_counts(self, wanted: list[str]) -> dict[str, Any]:
        """What RDS says of those lessons that exist."""
        if len(wanted) > 1:
            rows = await self._fetch(*_together(self._query, wanted))
            return {lesson_id: seat_count for lesson_id, seat_count, *_ in reversed(rows)}
        try:
            rows = await self._fetch(self._query, {"lesson_id": wanted[0]})
        except StoreUnavailable as error:
            if isinstance(error.__cause__, NO_ID):
                return {}
            raise
        return {wanted[0]: rows[0][0]} if rows else {}

    async def _fetch(self, query: str, parameters: dict[str, str]) -> list[Any]:
        """The rows. All errors of aiopg and psycopg2 are translated here."""
        try:
            async with asyncio.timeout(self._timeout):
                rows = await self._execute_somewhere(query, parameters)
        except (psycopg2.Error, OSError, TimeoutError, *BROKEN_CONNECTION) as error:
            if not isinstance(error, NO_ID):
                self._condition.failed(cause_of(error))
            raise StoreUnavailable("RDS", cause_of(error)) from error
        except asyncio.CancelledError:
            # aiopg raises this when the server cancelled the statement; when we were cancelled ourselves, it goes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._condition.failed("statement timeout")
            raise StoreUnavailable("RDS", "statement timeout") from None
        self._condition.answered()
        return rows

    async def _execute_somewhere(self, query: str, parameters: dict[str, str]) -> list[Any]:
        """Tries other connections when some have died since they were last used, as all have after a restart of RDS."""
        for _ in range(self._pool_size):
            with contextlib.suppress(*BROKEN_CONNECTION):
                return await self._execute(query, parameters)
        return await self._execute(query, parameters)

    async def _execute(self, query: str, parameters: dict[str, str]) -> list[Any]:
        assert self._pool is not None, "Lessons.open() comes first"
        connection = await self._pool.acquire()
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(query, parameters)
                return list(await cursor.fetchall())
        finally:
            # Not awaited: that would only wait for the pool to wake somebody, and nobody waits there; see _turns.
            self._pool.release(connection)


def _together(query: str, lesson_ids: list[str]) -> tuple[str, dict[str, str]]:
    """One statement that asks for several lessons, and its parameters. Before each row stands the lesson's id."""
    parameters = {f"lesson_id_{number}": lesson_id for number, lesson_id in enumerate(lesson_ids)}
    query = query.strip().rstrip(";")
    # The query is the operator's; what clients send are parameters. The line break ends a comment at its end.
    parts = (
        f"SELECT %({name})s, answer.* FROM ({query.replace('%(lesson_id)s', f'%({name})s')}\n) answer"  # noqa: S608
        for name in parameters
    )
    return " UNION ALL ".join(parts), parameters


def _lesson(lesson_id: str, found: dict[str, Any]) -> Lesson | ValueError | None:
    """The lesson, None if RDS has not found it, or why its number of seats can't be one."""
    if lesson_id not in found:
        return None
    try:
        seats = int(found[lesson_id] or 0)
    except (ValueError, TypeError, OverflowError):
        return ValueError(f"lesson {lesson_id} has a number of seats in RDS that is none")
    if seats > MAX_SEATS:
        return ValueError(f"lesson {lesson_id} has {seats} seats in RDS, more than {MAX_SEATS}")
    return Lesson(lesson_id, max(seats, 0))


def parse_dsn(dsn: str) -> dict[str, str]:
    """The parts of a connection string. libpq's own error would quote it, and the password with it."""
    try:
        parts: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
        for port in filter(None, parts.get("port", "").split(",")):
            int(port)
    except (psycopg2.ProgrammingError, ValueError):
        raise SettingsError("rds.dsn (LESSON_RDS_DSN): should be a libpq connection string or URI") from None
    return parts


def cause_of(error: BaseException) -> str:
    """One line for the log. psycopg2's messages name host, user and database, never the password."""
    return " ".join(str(error).split()) or type(error).__name__
