"""``rds.lesson_query``, the operator's query for one lesson.

This module makes the statements for one lesson and for several lessons, and validates the query.
"""

import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import psycopg2
import psycopg2.errors

from lesson_server.log import EventLogger
from lesson_server.settings.schema import SettingsError
from lesson_server.stores.rds.connections import Statement, StatementFault, cause_of

logger = EventLogger(__name__)

# Lesson ids that the query is checked with: one for columns of text and numbers, one for columns of uuids.
SAMPLE_IDS = ("1", "00000000-0000-4000-8000-000000000000")

# PostgreSQL's errors for an id that the type of a column can't hold.
NO_ID = (psycopg2.errors.InvalidTextRepresentation, psycopg2.errors.NumericValueOutOfRange)

# Types in which each lesson has only one id. In others, 042 and 0x2A equal 42, and the case of a uuid does not matter.
TEXT_TYPES = {"text", "character varying", "character"}

_WORD = re.compile(r"[A-Za-z0-9_-]+")

Fetch = Callable[[str, Any], Awaitable[list[Any]]]


class LessonQuery:
    """One statement with the parameter ``%(lesson_id)s`` that returns the seat count, or no row.

    Args:
        text: the query as the operator has set it.
    """

    def __init__(self, text: str) -> None:
        self._text = text.strip().rstrip(";")

    def for_one(self, lesson_id: str) -> Statement:
        """Return the statement for one lesson."""
        return self._text, {"lesson_id": lesson_id}

    def for_several(self, lesson_ids: Sequence[str]) -> Statement:
        """Return one statement for several lessons, with rows of lesson id and seat count."""
        parameters = {f"lesson_id_{number}": lesson_id for number, lesson_id in enumerate(lesson_ids)}
        # The query is the operator's; clients only send parameters. The line break ends a comment at the query's end.
        parts = (
            f"SELECT %({name})s, answer.seats_of_lesson"  # noqa: S608
            f" FROM ({self._text.replace('%(lesson_id)s', f'%({name})s')}\n) answer (seats_of_lesson)"
            for name in parameters
        )
        return " UNION ALL ".join(parts), parameters

    async def check(self, fetch: Fetch) -> bool:
        """Validate the query at startup, because at a join an invalid query would look like an outage.

        Args:
            fetch: :meth:`Rds.fetch`.

        Returns:
            whether one statement can look up several lessons.

        Raises:
            SettingsError: the query is invalid.
            StoreUnavailable: RDS failed or was too slow.
        """
        try:
            for sample in SAMPLE_IDS:
                fault = await self._explain(fetch, self.for_one(sample))
                if not isinstance(fault, NO_ID):
                    break
        except (ValueError, TypeError, KeyError) as error:  # psycopg2 can't interpret a "%" in the query
            raise _wrong(cause_of(error)) from error
        if isinstance(fault, psycopg2.errors.UndefinedTable):
            logger.error(
                "lessons_table_missing", "RDS: {cause}; has conf/schema.sql been applied?", cause=cause_of(fault)
            )
            return True
        if isinstance(fault, psycopg2.ProgrammingError):
            raise _wrong(cause_of(fault)) from fault
        fault = await self._explain(fetch, self.for_several([sample, sample]))
        if isinstance(fault, psycopg2.errors.InvalidColumnReference):  # there is no column to be named seats_of_lesson
            raise _wrong("it returns no column") from fault
        await self._check_type(fetch)
        if fault is not None and not isinstance(fault, NO_ID):
            logger.warning(
                "lesson_query_unbatched",
                "rds.lesson_query can't be part of another query: lessons are looked up one by one",
            )
            return False
        return True

    async def _explain(self, fetch: Fetch, statement: Statement) -> psycopg2.Error | None:
        query, parameters = statement
        try:
            await fetch(f"EXPLAIN {query}", parameters)
        except StatementFault as fault:
            return fault.error
        return None

    async def _check_type(self, fetch: Fetch) -> None:
        """Warn if the id is not compared as text, because then a lesson has several ids."""
        # PREPARE and SELECT are one message, because a pooler may send the next message to another server process. The
        # name is random, because it is never deallocated, and the process may have served an earlier start.
        name = f"lesson_query_{secrets.token_hex(4)}"
        prepare = f"PREPARE {name} AS {self._text % _Numbers()}\n"
        types = f"SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = '{name}'"  # noqa: S608
        try:
            ((found,),) = await fetch(f"{prepare}; {types}", None)
        except StatementFault:
            return  # PostgreSQL can't infer the type of a parameter that is compared with nothing
        if found and TEXT_TYPES.isdisjoint(found):
            logger.warning(
                "lesson_query_not_text",
                "rds.lesson_query compares the lesson's id as {type}, so one lesson can be joined by several ids, as"
                " 42 by 042, and those who do don't meet. Compare it as text:"
                " SELECT seat_count FROM lessons WHERE id::text = %(lesson_id)s",
                type=found[0],
            )


class _Numbers:
    """The parameters of psycopg2, with the names that PREPARE requires: ``$1``, ``$2``, ….

    Each use of the lesson's id is a separate parameter, as in psycopg2, because each use may have another type.
    """

    def __init__(self) -> None:
        self._last = 0

    def __getitem__(self, name: str) -> str:
        self._last += 1
        return f"${self._last}"


def is_about(fault: StatementFault, lesson_id: str) -> bool:
    """Return whether RDS refused the lesson's id, which means that the lesson does not exist.

    The same errors occur for invalid data in RDS; the message then names the data.
    """
    return isinstance(fault.error, NO_ID) and lesson_id in _WORD.findall(fault.error.diag.message_primary)


def _wrong(why: str) -> SettingsError:
    return SettingsError(f"rds.lesson_query (LESSON_RDS_LESSON_QUERY): {why}")
