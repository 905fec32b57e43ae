"""A lesson: the syntax of its id, and its seat count."""

import re
from dataclasses import dataclass
from typing import Any

# The syntax of a lesson_id.
LESSON_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# One script writes a seat map, one Redis hash: the limit keeps a wrong row in RDS from blocking Redis for all clients.
MAX_SEATS = 10_000


@dataclass(frozen=True, slots=True)
class Lesson:
    """A lesson in RDS, with ``seat_count`` 0 for a lesson without seats."""

    lesson_id: str
    seat_count: int


def lesson_of(lesson_id: str, seat_counts: dict[str, Any]) -> Lesson | ValueError | None:
    """Return a lesson as RDS has it.

    Args:
        lesson_id: the id of the lesson.
        seat_counts: seat counts by lesson id, as RDS has them, of the lessons that exist.

    Returns:
        the lesson, None if RDS has no such lesson, or an error if the seat count is invalid.
    """
    if lesson_id not in seat_counts:
        return None
    try:
        seats = int(seat_counts[lesson_id] or 0)
    except (ValueError, TypeError, OverflowError):
        return ValueError(f"lesson {lesson_id} has a number of seats in RDS that is none")
    if seats > MAX_SEATS:
        return ValueError(f"lesson {lesson_id} has {seats} seats in RDS, more than {MAX_SEATS}")
    return Lesson(lesson_id, max(seats, 0))
