"""``rds.lesson_query``, the operator's query for one lesson.

Here it is asked as it is, and for several lessons at once; and here is found out what is wrong with it.
"""

import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import psycopg2
import psycopg2.errors

from lesson_server.settings.schema import SettingsError
from lesson_server.stores.rds.connections import Statement, StatementFault, cause_of

logger = logging.getLogger(__name__)

# Lesson ids by which the query is tried, for columns of text and numbers, and of uuids.
SAMPLE_IDS = ("1", "00000000-0000-4000-8000-000000000000")

# What PostgreSQL says of an id that a column can't hold.
NO_ID = (psycopg2.errors.InvalidTextRepresentation, psycopg2.errors.NumericValueOutOfRange)

# Types in which each lesson has one id only: not 042 and 0x2A beside 42, nor a uuid in upper and lower case.
TEXT_TYPES = {"text", "character varying", "character"}

_WORD = re.compile(r"[A-Za-z0-9_-]+")

Fetch = Callable[[str, Any], Awaitable[list[Any]]]


class LessonQuery:
    """One statement with the parameter ``%(lesson_id)s`` that returns the seat count, or no row.

    Args:
        text: what the operator has set.
    """

    def __init__(self, text: str) -> None:
        self._text = text.strip().rstrip(";")

    def for_one(self, lesson_id: str) -> Statement:
        """Return the statement that asks for one lesson."""
        return self._text, {"lesson_id": lesson_id}

    def for_several(self, lesson_ids: Sequence[str]) -> Statement:
        """One statement that asks for several lessons: before the seat count stands the lesson's id."""
        parameters = {f"lesson_id_{number}": lesson_id for number, lesson_id in enumerate(lesson_ids)}
        # The query is the operator's; what clients send are parameters. The line break ends a comment at its end.
        parts = (
            f"SELECT %({name})s, answer.seats_of_lesson"  # noqa: S608
            f" FROM ({self._text.replace('%(lesson_id)s', f'%({name})s')}\n) answer (seats_of_lesson)"
            for name in parameters
        )
        return " UNION ALL ".join(parts), parameters

    async def check(self, fetch: Fetch) -> bool:
        """Find a wrong query at the start: at a join it would look like an outage.

        Args:
            fetch: :meth:`Rds.fetch`.

        Returns:
            whether several lessons can be asked for at once.

        Raises:
            SettingsError: RDS can't make sense of the query.
            StoreUnavailable: RDS failed or was too slow.
        """
        try:
            for sample in SAMPLE_IDS:
                fault = await self._explain(fetch, self.for_one(sample))
                if not isinstance(fault, NO_ID):
                    break
        except (ValueError, TypeError, KeyError) as error:  # psycopg2 found no sense in its "%"
            raise _wrong(cause_of(error)) from error
        if isinstance(fault, psycopg2.errors.UndefinedTable):
            logger.error("RDS: %s; has conf/schema.sql been applied?", cause_of(fault))
            return True
        if isinstance(fault, psycopg2.ProgrammingError):
            raise _wrong(cause_of(fault)) from fault
        fault = await self._explain(fetch, self.for_several([sample, sample]))
        if isinstance(fault, psycopg2.errors.InvalidColumnReference):  # seats_of_lesson is the first of no columns
            raise _wrong("it returns no column") from fault
        await self._check_type(fetch)
        if fault is not None and not isinstance(fault, NO_ID):
            logger.warning("rds.lesson_query can't be part of another query: lessons are looked up one by one")
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
        """Warn when the id is compared as something else than text, because a lesson has several ids then."""
        # One message, and a name of its own that is left there: a pooler may send the next message to another server
        # process, and this one to a process that has served an earlier start.
        name = f"lesson_query_{secrets.token_hex(4)}"
        prepare = f"PREPARE {name} AS {self._text % _Numbers()}\n"
        types = f"SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = '{name}'"  # noqa: S608
        try:
            ((found,),) = await fetch(f"{prepare}; {types}", None)
        except StatementFault:
            return  # PostgreSQL can't tell the type of a parameter that nothing is compared with
        if found and TEXT_TYPES.isdisjoint(found):
            logger.warning(
                "rds.lesson_query compares the lesson's id as %s, so one lesson can be joined by several ids, as"
                " 42 by 042, and those who do don't meet. Compare it as text:"
                " SELECT seat_count FROM lessons WHERE id::text = %%(lesson_id)s",
                found[0],
            )


class _Numbers:
    """The parameters of psycopg2, under the names that PREPARE wants.

    Each use of the lesson's id is a parameter of its own, as it is with psycopg2, because each may be of another type.
    """

    def __init__(self) -> None:
        self._last = 0

    def __getitem__(self, name: str) -> str:
        self._last += 1
        return f"${self._last}"


def is_about(fault: StatementFault, lesson_id: str) -> bool:
    """Return whether RDS refused the lesson's id: such a lesson does not exist.

    It may have stumbled over its own data, too, and then its message names those.
    """
    return isinstance(fault.error, NO_ID) and lesson_id in _WORD.findall(fault.error.diag.message_primary)


def _wrong(why: str) -> SettingsError:
    return SettingsError(f"rds.lesson_query (LESSON_RDS_LESSON_QUERY): {why}")
