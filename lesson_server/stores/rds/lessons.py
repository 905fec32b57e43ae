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
from collections import deque
from collections.abc import Coroutine
from typing import Any

from lesson_server.errors import LessonNotFound
from lesson_server.status import Status
from lesson_server.stores.rds.connections import Rds, StatementFault, cause_of
from lesson_server.stores.rds.lesson import Lesson, lesson_of
from lesson_server.stores.rds.lesson_query import LessonQuery, is_about
from lesson_server.stores.rds.lookups import Lookup, Lookups

# Lessons in one query: initially, and at most while the queries are quick. PostgreSQL plans and answers MAX_LESSONS in
# 3 ms, but an operator's own query may be slow, and the lessons of a query wait for each other.
FIRST_LESSONS = 8
MAX_LESSONS = 48
# The fraction of its timeout after which a query is slow: large enough for an RDS that is slow as a whole to answer its
# batches, small enough to answer the lessons of a slow batch one by one within their timeout.
PATIENCE = 1 / 8
# Maximum number of lessons remembered as slow: more than occur in an hour, fewer than a guest could invent.
MAX_SLOW_LESSONS = 1_000


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
        self._lookups = Lookups()
        self._queue: deque[Lookup] = deque()  # lookups that wait for a batch query
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
        lesson = await lookup.answer()
        if lesson is None:
            raise LessonNotFound(lesson_id)
        return lesson

    @property
    def status(self) -> Status:
        """How RDS is doing."""
        return self._rds.availability.status

    async def ping(self) -> None:
        """Check that RDS answers.

        Raises:
            StoreUnavailable: RDS did not answer.
        """
        await self._rds.ping()

    # Lookups

    def _begin(self, lesson_id: str) -> Lookup:
        lookup = self._lookups.begin(lesson_id)
        if lesson_id in self._slow_lessons:
            self._spawn(self._load_slow(lookup))
        else:
            self._queue.append(lookup)
            self._dispatch_soon()
        return lookup

    def _fail_all(self) -> None:
        """Fail all lookups and cancel their queries, because RDS is unavailable or the server stops."""
        self._queue.clear()
        self._slow_lessons.clear()  # RDS was slow, not the lessons
        self._lookups.fail_all(self._rds.availability.refusal())
        for task in self._tasks:
            task.cancel()
        self._beginning = False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Queries

    def _dispatch_soon(self) -> None:
        """Schedule a batch query for the next event loop iteration, so that it takes all lookups of this iteration."""
        if self._queue and not self._beginning:
            self._beginning = True
            self._spawn(self._load_batch())

    async def _load_batch(self) -> None:
        """Query a batch of lessons, including those that are requested while the query waits for its turn."""
        async with self._turns:
            for _ in range(self._under_way):  # the more queries in progress, the larger the batch
                await asyncio.sleep(0)
            self._beginning = False
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._lessons_in_query))]
            self._dispatch_soon()
            await self._dispatch(batch)

    async def _load_alone(self, lookup: Lookup) -> None:
        """Query one lesson of a batch that was slow or failed."""
        async with self._turns:
            await self._dispatch([lookup])

    async def _load_slow(self, lookup: Lookup) -> None:
        """Query a lesson that is known to be slow."""
        async with self._slow_turns, self._turns:
            if self._lookups.drop_unwanted([lookup]) and await self._load([lookup]):
                self._slow_lessons.pop(lookup.lesson_id, None)

    async def _dispatch(self, lookups: list[Lookup]) -> None:
        """Look up lessons by one query, for which the caller has taken a turn."""
        wanted = self._lookups.drop_unwanted(lookups)
        if not wanted:
            return
        query = asyncio.current_task()
        assert query is not None
        timer = asyncio.get_running_loop().call_later(
            self._patience, lambda: self._spawn(self._handle_slow(query, wanted))
        )
        try:
            is_quick = await self._load(wanted)
        finally:
            timer.cancel()
        if is_quick and len(wanted) == self._lessons_in_query:
            self._lessons_in_query = min(len(wanted) * 2, self._max_lessons_in_query)

    async def _handle_slow(self, query: "asyncio.Task[None]", lookups: list[Lookup]) -> None:
        """Decide whether a slow query may continue, and how its lessons are queried again.

        Cancelling a query closes its connection.
        """
        may_continue = not self._slow_turns.locked()
        if all(lookup.outcome.done() for lookup in lookups):
            may_continue = False
        elif len(lookups) > 1:
            self._lessons_in_query = min(self._lessons_in_query, len(lookups) // 2)
            self._load_each_alone(lookups)
        else:
            self._remember_as_slow(lookups[0].lesson_id)
            if not may_continue:
                self._spawn(self._load_slow(lookups[0]))
        if may_continue:
            async with self._slow_turns:
                await self._end_or_outcomes(query, lookups)
        query.cancel()

    def _load_each_alone(self, lookups: list[Lookup]) -> None:
        for lookup in lookups:
            if not lookup.is_alone:
                lookup.is_alone = True
                self._spawn(self._load_alone(lookup))

    def _remember_as_slow(self, lesson_id: str) -> None:
        self._slow_lessons[lesson_id] = None
        if len(self._slow_lessons) > MAX_SLOW_LESSONS:
            del self._slow_lessons[next(iter(self._slow_lessons))]

    @staticmethod
    async def _end_or_outcomes(query: "asyncio.Task[None]", lookups: list[Lookup]) -> None:
        """Wait until a query has ended, or all of its lookups have an outcome from other queries."""
        while not query.done():
            unsettled = [lookup.outcome for lookup in lookups if not lookup.outcome.done()]
            if not unsettled:
                return
            waiting: set[asyncio.Future[Any]] = {query, *unsettled}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def _load(self, lookups: list[Lookup]) -> bool:
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
                self._load_each_alone(lookups)
            elif is_about(fault, lookups[0].lesson_id):
                self._lookups.settle(lookups[0], None)
            else:
                self._rds.availability.failed(cause_of(fault.error))
                self._lookups.settle(lookups[0], fault)
        except Exception as error:
            for lookup in lookups:
                self._lookups.settle(lookup, error)
        else:
            for lookup in lookups:
                self._lookups.settle(lookup, lesson_of(lookup.lesson_id, seat_counts))
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
