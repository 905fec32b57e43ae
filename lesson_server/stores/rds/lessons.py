"""RDS: lookups of lessons, that is, whether a lesson exists and how many seats it has.

This is the only SQL that a join runs. One query answers both questions of the diagrams (arrows 2 and 6). Concurrent
joins of a lesson share one lookup, and lessons that are requested at the same moment share one query, a *batch*.

A lesson may be slow although RDS is healthy, because the operator's query takes long for it. A slow lesson must fail
neither the other lessons of its batch nor later lessons:

* A query is *slow* when it has taken a small part of its timeout, its *patience*. The lessons of a slow batch are
  queried again, each alone; the first answer counts.
* A lesson that was slow alone is remembered, and is queried alone until it is quick again.
* Slow queries occupy at most all connections but one. A further slow query is cancelled, and its lesson waits until a
  slow query has ended.

So at least one connection is free again after each patience. For each slow lesson that is queried for the first time, a
quick lesson waits at most two patiences: one for the batch, and one for the slow lesson alone. It does not wait for
lessons that are known to be slow. With a pool of one connection, a slow lesson delays all other lessons by its timeout.
"""

import asyncio
import re
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from lesson_server.errors import LessonNotFound
from lesson_server.stores.rds.connections import Rds, StatementFault, cause_of
from lesson_server.stores.rds.lesson_query import LessonQuery, is_about

# The syntax of a lesson_id.
LESSON_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# One script writes a seat map, one Redis hash: the limit keeps a wrong row in RDS from blocking Redis for all clients.
MAX_SEATS = 10_000

# Lessons in one query: initially, and at most while the queries are quick. PostgreSQL plans and answers MAX_LESSONS in
# 3 ms, but an operator's own query may be slow, and the lessons of a query wait for each other.
FIRST_LESSONS = 8
MAX_LESSONS = 48
# The fraction of its timeout after which a query is slow: large enough for an RDS that is slow as a whole to answer its
# batches, small enough to answer the lessons of a slow batch one by one within their timeout.
PATIENCE = 1 / 8
# Maximum number of lessons remembered as slow: more than occur in an hour, fewer than a guest could invent.
MAX_SLOW_LESSONS = 1_000


@dataclass(frozen=True, slots=True)
class Lesson:
    """A lesson in RDS, with ``seat_count`` 0 for a lesson without seats."""

    lesson_id: str
    seat_count: int


@dataclass(eq=False, slots=True)
class _Lookup:
    """The lookup of one lesson, for all joins that wait for it.

    Attributes:
        outcome: the lesson, None if RDS has no such lesson, or the error.
        joins: the answers to the waiting joins.
        is_alone: whether the lesson has, or is going to have, a query of its own.
    """

    lesson_id: str
    outcome: "asyncio.Future[Lesson | Exception | None]"
    joins: "list[asyncio.Future[Lesson | None]]" = field(default_factory=list)
    is_alone: bool = False


class Lessons:
    """The lessons in RDS.

    Args:
        dsn: libpq connection string or URL.
        query: one statement with the parameter ``%(lesson_id)s`` that returns the seat count, or no row.
        timeout: seconds for one query, without the time that it waits for its turn.
        pool_size: connections for lookups. One more is for readiness and probes.
    """

    def __init__(self, dsn: str, query: str, timeout: float, pool_size: int) -> None:
        self._rds = Rds(dsn, timeout, pool_size, self._fail_all)
        self._query = LessonQuery(query)
        self._patience = timeout * PATIENCE
        self._max_lessons_in_query = MAX_LESSONS
        self._lessons_in_query = FIRST_LESSONS
        self._turns = asyncio.Semaphore(pool_size)  # one for each connection
        self._slow_turns = asyncio.Semaphore(max(pool_size - 1, 1))
        self._lookups: dict[str, _Lookup] = {}
        self._unasked: deque[_Lookup] = deque()  # lookups that wait for a batch
        self._slow_lessons: dict[str, None] = {}  # an ordered set, oldest first
        self._beginning = False  # a batch query waits for its turn
        self._under_way = 0  # queries in progress
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Open the connections.

        Raises:
            SettingsError: the query is invalid.
            StoreUnavailable: RDS can't be reached or refuses the connection.
        """
        await self._rds.open()
        if not await self._query.check(self._rds.fetch):
            self._lessons_in_query = self._max_lessons_in_query = 1

    async def close(self) -> None:
        """Fail the lookups and close the connections."""
        self._fail_all()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._rds.close()

    async def get(self, lesson_id: str) -> Lesson:
        """Return the lesson with this id.

        Source: Teacher App and Participant diagrams, arrows 2 to 4 and 6.

        Raises:
            LessonNotFound: RDS has no such lesson.
            StoreUnavailable: RDS failed, was too slow, or is unavailable.
            ValueError: the seat count in RDS is not a valid number of seats.
        """
        lookup = self._lookups.get(lesson_id)
        if lookup is None:
            self._rds.availability.require()
            lookup = self._begin(lesson_id)
        answer: asyncio.Future[Lesson | None] = asyncio.get_running_loop().create_future()
        lookup.joins.append(answer)
        try:
            lesson = await answer
        finally:
            lookup.joins.remove(answer)
        if lesson is None:
            raise LessonNotFound(lesson_id)
        return lesson

    async def ping(self) -> None:
        """Check that RDS answers.

        Raises:
            StoreUnavailable: RDS did not answer.
        """
        await self._rds.ping()

    # Lookups

    def _begin(self, lesson_id: str) -> _Lookup:
        lookup = self._lookups[lesson_id] = _Lookup(lesson_id, asyncio.get_running_loop().create_future())
        if lesson_id in self._slow_lessons:
            self._spawn(self._look_up_slowly(lookup))
        else:
            self._unasked.append(lookup)
            self._ask_soon()
        return lookup

    def _settle(self, lookup: _Lookup, outcome: Lesson | Exception | None) -> None:
        """Answer the waiting joins, unless the lookup has an outcome already."""
        if lookup.outcome.done():
            return
        del self._lookups[lookup.lesson_id]
        lookup.outcome.set_result(outcome)
        for answer in lookup.joins:
            if answer.done():
                continue  # the join was cancelled in this loop iteration
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

    def _fail_all(self) -> None:
        """Fail all lookups and cancel their queries, because RDS is unavailable or the server stops."""
        self._unasked.clear()
        self._slow_lessons.clear()  # RDS was slow, not the lessons
        for lookup in list(self._lookups.values()):
            self._settle(lookup, self._rds.availability.refusal())
        for task in self._tasks:
            task.cancel()
        self._beginning = False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Queries

    def _ask_soon(self) -> None:
        """Schedule a batch query for the next event loop iteration, so that it takes all lookups of this iteration."""
        if self._unasked and not self._beginning:
            self._beginning = True
            self._spawn(self._look_up_batch())

    async def _look_up_batch(self) -> None:
        """Query a batch of lessons, including those that are requested while the query waits for its turn."""
        async with self._turns:
            for _ in range(self._under_way):  # the more queries in progress, the larger the batch
                await asyncio.sleep(0)
            self._beginning = False
            batch = [self._unasked.popleft() for _ in range(min(len(self._unasked), self._lessons_in_query))]
            self._ask_soon()
            await self._ask(batch)

    async def _look_up_alone(self, lookup: _Lookup) -> None:
        """Query one lesson of a batch that was slow or failed."""
        async with self._turns:
            await self._ask([lookup])

    async def _look_up_slowly(self, lookup: _Lookup) -> None:
        """Query a lesson that is known to be slow."""
        async with self._slow_turns, self._turns:
            if self._wanted([lookup]) and await self._load([lookup]):
                self._slow_lessons.pop(lookup.lesson_id, None)

    async def _ask(self, lookups: list[_Lookup]) -> None:
        """Look up lessons by one query, for which the caller has taken a turn."""
        wanted = self._wanted(lookups)
        if not wanted:
            return
        query = asyncio.current_task()
        assert query is not None
        attend = asyncio.get_running_loop().call_later(
            self._patience, lambda: self._spawn(self._attend_to_slow(query, wanted))
        )
        try:
            is_quick = await self._load(wanted)
        finally:
            attend.cancel()
        if is_quick and len(wanted) == self._lessons_in_query:
            self._lessons_in_query = min(len(wanted) * 2, self._max_lessons_in_query)

    async def _attend_to_slow(self, query: "asyncio.Task[None]", lookups: list[_Lookup]) -> None:
        """Decide whether a slow query may continue, and how its lessons are queried again.

        Cancelling a query closes its connection.
        """
        may_go_on = not self._slow_turns.locked()
        if all(lookup.outcome.done() for lookup in lookups):
            may_go_on = False
        elif len(lookups) > 1:
            self._lessons_in_query = min(self._lessons_in_query, len(lookups) // 2)
            self._look_up_each_alone(lookups)
        else:
            self._remember_as_slow(lookups[0].lesson_id)
            if not may_go_on:
                self._spawn(self._look_up_slowly(lookups[0]))
        if may_go_on:
            async with self._slow_turns:
                await self._end_or_outcomes(query, lookups)
        query.cancel()

    def _wanted(self, lookups: list[_Lookup]) -> list[_Lookup]:
        """Return the lookups that joins wait for, and drop the rest, so that no queue outgrows the waiting joins."""
        for lookup in lookups:
            if not lookup.joins and not lookup.outcome.done():
                del self._lookups[lookup.lesson_id]
                lookup.outcome.cancel()
        return [lookup for lookup in lookups if not lookup.outcome.done()]

    def _look_up_each_alone(self, lookups: list[_Lookup]) -> None:
        for lookup in lookups:
            if not lookup.is_alone:
                lookup.is_alone = True
                self._spawn(self._look_up_alone(lookup))

    def _remember_as_slow(self, lesson_id: str) -> None:
        self._slow_lessons[lesson_id] = None
        if len(self._slow_lessons) > MAX_SLOW_LESSONS:
            del self._slow_lessons[next(iter(self._slow_lessons))]

    @staticmethod
    async def _end_or_outcomes(query: "asyncio.Task[None]", lookups: list[_Lookup]) -> None:
        """Wait until a query has ended, or all of its lookups have an outcome from other queries."""
        while not query.done():
            unsettled = [lookup.outcome for lookup in lookups if not lookup.outcome.done()]
            if not unsettled:
                return
            waiting: set[asyncio.Future[Any]] = {query, *unsettled}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def _load(self, lookups: list[_Lookup]) -> bool:
        """Run one query, and settle its lookups with the answer or the error.

        Returns:
            whether the query was quick.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        self._under_way += 1
        try:
            seat_counts = await self._seat_counts([lookup.lesson_id for lookup in lookups])
        except StatementFault as fault:
            if len(lookups) > 1:
                self._look_up_each_alone(lookups)
            elif is_about(fault, lookups[0].lesson_id):
                self._settle(lookups[0], None)
            else:
                self._rds.availability.failed(cause_of(fault.error))
                self._settle(lookups[0], fault)
        except Exception as error:
            for lookup in lookups:
                self._settle(lookup, error)
        else:
            for lookup in lookups:
                self._settle(lookup, _lesson(lookup.lesson_id, seat_counts))
        finally:
            self._under_way -= 1
        return clock() - started < self._patience

    async def _seat_counts(self, lesson_ids: list[str]) -> dict[str, Any]:
        """Return the seat counts, as RDS has them, of those lessons that exist."""
        if len(lesson_ids) > 1:
            rows = await self._rds.fetch(*self._query.for_several(lesson_ids))
            return dict(reversed(rows))  # of several rows for a lesson, the first counts
        rows = await self._rds.fetch(*self._query.for_one(lesson_ids[0]))
        return {lesson_ids[0]: rows[0][0]} if rows else {}


def _lesson(lesson_id: str, seat_counts: dict[str, Any]) -> Lesson | ValueError | None:
    """Return the lesson, None if RDS has no such lesson, or an error if its seat count is invalid."""
    if lesson_id not in seat_counts:
        return None
    try:
        seats = int(seat_counts[lesson_id] or 0)
    except (ValueError, TypeError, OverflowError):
        return ValueError(f"lesson {lesson_id} has a number of seats in RDS that is none")
    if seats > MAX_SEATS:
        return ValueError(f"lesson {lesson_id} has {seats} seats in RDS, more than {MAX_SEATS}")
    return Lesson(lesson_id, max(seats, 0))
