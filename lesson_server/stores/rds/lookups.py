"""Lookups of lessons in progress. All joins that wait for a lesson share one lookup."""

import asyncio
from dataclasses import dataclass, field

from lesson_server.stores.rds.lesson import Lesson

# The outcome of a lookup: None if RDS has no such lesson.
Outcome = Lesson | Exception | None


@dataclass(eq=False, slots=True)
class Lookup:
    """The lookup of one lesson, for all joins that wait for it.

    Attributes:
        outcome: the lesson, None if RDS has no such lesson, or the error.
        joins: the answers to the waiting joins.
        is_alone: whether the lesson has, or is going to have, a query of its own.
    """

    lesson_id: str
    outcome: "asyncio.Future[Outcome]"
    joins: "list[asyncio.Future[Lesson | None]]" = field(default_factory=list)
    is_alone: bool = False

    async def answer(self) -> Lesson | None:
        """Wait for the outcome on behalf of one join.

        Returns:
            the lesson; None if RDS has no such lesson.

        Raises:
            Exception: the outcome, if it is an error.
        """
        answer: asyncio.Future[Lesson | None] = asyncio.get_running_loop().create_future()
        self.joins.append(answer)
        try:
            return await answer
        finally:
            self.joins.remove(answer)


class Lookups:
    """The lookups that have no outcome yet, one for each lesson."""

    def __init__(self) -> None:
        self._lookups: dict[str, Lookup] = {}

    def get(self, lesson_id: str) -> Lookup | None:
        """Return the lookup of a lesson, if one is in progress."""
        return self._lookups.get(lesson_id)

    def begin(self, lesson_id: str) -> Lookup:
        """Return a new lookup."""
        lookup = self._lookups[lesson_id] = Lookup(lesson_id, asyncio.get_running_loop().create_future())
        return lookup

    def settle(self, lookup: Lookup, outcome: Outcome) -> None:
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

    def fail_all(self, error: Exception) -> None:
        """Settle all lookups with an error."""
        for lookup in list(self._lookups.values()):
            self.settle(lookup, error)

    def drop_unwanted(self, lookups: list[Lookup]) -> list[Lookup]:
        """Return the lookups that joins wait for, and drop the rest, so that no queue outgrows the waiting joins."""
        for lookup in lookups:
            if not lookup.joins and not lookup.outcome.done():
                del self._lookups[lookup.lesson_id]
                lookup.outcome.cancel()
        return [lookup for lookup in lookups if not lookup.outcome.done()]
