"""RDS: does the lesson exist, and how many seats has it. The only SQL that a join runs.

One query answers both questions of the diagrams (arrows 2 and 6). Joins of a lesson that wait at the same time wait for
the same answer, and lessons that are wanted in the same moment are asked for by one query, a *batch*.

A lesson may be slow though RDS is well, because the operator's query takes long for it. It must not fail those that
share its query, nor those that come later:

* A query that has taken a small part of its timeout, its patience, is *slow*. The lessons of a slow batch are asked for
  once more, each alone; whichever answers first counts.
* A lesson that was slow alone is remembered and asked for alone from then on, until it is quick again.
* Slow queries hold all connections but one at most. One more is cancelled, and its lesson waits for their end.

So one connection at least is free again after each patience. A quick lesson waits for two patiences at most for each
slow lesson that RDS is asked for the first time, in its batch and alone; for lessons that are known to be slow it does
not wait. With a pool of one connection, a slow lesson holds up the others for its timeout.
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

# A lesson_id, as text.
LESSON_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# A seat map is one Redis hash written by one script: the bound keeps a wrong row in RDS from stalling Redis for all.
MAX_SEATS = 10_000

# Lessons that one query asks for: at first, and as long as the queries are quick. PostgreSQL plans and answers the most
# in 3 ms, but an operator's own query may be slow, and the lessons of a query wait for each other.
FIRST_LESSONS = 8
MAX_LESSONS = 48
# The part of its timeout after which a query is slow: late enough for an RDS that is slow as a whole to answer its
# batches, early enough for the lessons of a slow batch to be answered after all.
PATIENCE = 1 / 8
# Lessons that are remembered as slow: more than an hour has, fewer than a guest who makes them up could fill.
MAX_SLOW_LESSONS = 1_000


@dataclass(frozen=True, slots=True)
class Lesson:
    """A row of RDS. ``seat_count`` is 0 for a lesson without seats."""

    lesson_id: str
    seat_count: int


@dataclass(eq=False, slots=True)
class _Lookup:
    """A lesson that joins wait for.

    Attributes:
        outcome: the lesson, None if RDS has not found it, or what went wrong.
        joins: the answers to the joins that wait.
        is_alone: whether it is, or is going to be, asked for by a query of its own.
    """

    lesson_id: str
    outcome: "asyncio.Future[Lesson | Exception | None]"
    joins: "list[asyncio.Future[Lesson | None]]" = field(default_factory=list)
    is_alone: bool = False


class Lessons:
    """The lessons that RDS knows.

    Args:
        dsn: libpq connection string or URL.
        query: one statement with the parameter ``%(lesson_id)s`` that returns the seat count, or no row.
        timeout: seconds that a query may take once it has a connection.
        pool_size: connections used by lookups. One more is for readiness and probes.
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
        self._unasked: deque[_Lookup] = deque()  # those that wait for a batch
        self._slow_lessons: dict[str, None] = {}  # the longest known first
        self._beginning = False  # a query for a batch waits for its turn
        self._under_way = 0  # queries
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Open the connections.

        Raises:
            SettingsError: RDS can't make sense of the query.
            StoreUnavailable: RDS can't be reached or refuses us.
        """
        await self._rds.open()
        if not await self._query.check(self._rds.fetch):
            self._lessons_in_query = self._max_lessons_in_query = 1

    async def close(self) -> None:
        """End the lookups and close the connections."""
        self._fail_all()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._rds.close()

    async def get(self, lesson_id: str) -> Lesson:
        """Return the lesson of that id.

        Source: Teacher App and Participant diagrams, arrows 2 to 4 and 6.

        Raises:
            LessonNotFound: RDS has no such lesson.
            StoreUnavailable: RDS failed or was too slow, or is known not to answer.
            ValueError: RDS says something that can't be a number of seats.
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
        """Asks RDS for nothing but an answer.

        Raises:
            StoreUnavailable: there was none.
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
        """Answer the joins that wait. The first outcome counts."""
        if lookup.outcome.done():
            return
        del self._lookups[lookup.lesson_id]
        lookup.outcome.set_result(outcome)
        for answer in lookup.joins:
            if answer.done():
                continue  # the join was given up in this turn of the loop
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

    def _fail_all(self) -> None:
        """Fail all lookups, and cancel their queries: RDS is known not to answer, or the server stops."""
        self._unasked.clear()
        self._slow_lessons.clear()  # it was RDS that was slow
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
        """Begin a query when all that is asked for in this turn of the loop is known."""
        if self._unasked and not self._beginning:
            self._beginning = True
            self._spawn(self._look_up_batch())

    async def _look_up_batch(self) -> None:
        """Asks for lessons of which RDS has not been asked yet. While it waits for its turn, more of them come."""
        async with self._turns:
            for _ in range(self._under_way):  # those under way make this one gather
                await asyncio.sleep(0)
            self._beginning = False
            batch = [self._unasked.popleft() for _ in range(min(len(self._unasked), self._lessons_in_query))]
            self._ask_soon()
            await self._ask(batch)

    async def _look_up_alone(self, lookup: _Lookup) -> None:
        """Asks for a lesson of a batch that was slow or failed."""
        async with self._turns:
            await self._ask([lookup])

    async def _look_up_slowly(self, lookup: _Lookup) -> None:
        """Asks for a lesson that is known to be slow."""
        async with self._slow_turns, self._turns:
            if self._wanted([lookup]) and await self._load([lookup]):
                self._slow_lessons.pop(lookup.lesson_id, None)

    async def _ask(self, lookups: list[_Lookup]) -> None:
        """Asks for lessons by one query. The caller has taken a turn for it."""
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
        """Decide what becomes of a slow query, and of its lessons.

        A query that is cancelled closes its connection.
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
        """Return the lookups that joins wait for. The rest is dropped: no queue is longer than the waiting joins."""
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
        """Wait until a query has ended, or all of its lookups have an outcome from elsewhere."""
        while not query.done():
            unsettled = [lookup.outcome for lookup in lookups if not lookup.outcome.done()]
            if not unsettled:
                return
            waiting: set[asyncio.Future[Any]] = {query, *unsettled}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def _load(self, lookups: list[_Lookup]) -> bool:
        """Run one query, and settle its lookups by the answer, or by what went wrong.

        Returns:
            whether it was quick.
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
        """Return what RDS says of those lessons that exist."""
        if len(lesson_ids) > 1:
            rows = await self._rds.fetch(*self._query.for_several(lesson_ids))
            return dict(reversed(rows))  # of several rows the first counts
        rows = await self._rds.fetch(*self._query.for_one(lesson_ids[0]))
        return {lesson_ids[0]: rows[0][0]} if rows else {}


def _lesson(lesson_id: str, seat_counts: dict[str, Any]) -> Lesson | ValueError | None:
    """Return the lesson, None if RDS has not found it, or why its number of seats can't be one."""
    if lesson_id not in seat_counts:
        return None
    try:
        seats = int(seat_counts[lesson_id] or 0)
    except (ValueError, TypeError, OverflowError):
        return ValueError(f"lesson {lesson_id} has a number of seats in RDS that is none")
    if seats > MAX_SEATS:
        return ValueError(f"lesson {lesson_id} has {seats} seats in RDS, more than {MAX_SEATS}")
    return Lesson(lesson_id, max(seats, 0))
