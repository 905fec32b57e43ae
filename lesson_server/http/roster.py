"""The roster API: who is in which lesson, over all nodes (contract, section 10)."""

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from lesson_server.gateway.removal import Removal
from lesson_server.http.access import Access
from lesson_server.http.api import ApiError, ApiHandler
from lesson_server.http.pages import Readiness
from lesson_server.stores.rds.lesson import LESSON_ID
from lesson_server.stores.redis.roster import LessonCounts, Person, Roster

# The number of lessons on a page: without a limit in the request, and at most.
DEFAULT_LIMIT = 50
MAX_LIMIT = 500
# People that are formatted before other tasks have a turn.
PEOPLE_AT_ONCE = 1_000

Status = Literal["up", "down"]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Error(TypedDict):
    """What went wrong, in one plain sentence."""

    error: str


class NodeStatus(TypedDict):
    """A process of the server, and when it was heard of last."""

    node: str
    connections: int
    heard_of: Time


class Overview(TypedDict):
    """The numbers of lessons and people, the stores, and the nodes."""

    lessons: int
    teachers: int
    participants: int
    guests: int
    stores: dict[str, Status]
    nodes: list[NodeStatus]


class LessonSummary(TypedDict):
    """The numbers of people and seats in a lesson."""

    lesson_id: str
    teachers: int
    participants: int
    seats: int
    taken: int


class LessonPage(TypedDict):
    """The lessons in which somebody is, by lesson_id; ``cursor`` is null on the last page."""

    lessons: list[LessonSummary]
    cursor: str | None


class Teacher(TypedDict):
    """A teacher in a lesson. ``node`` and ``since`` are null if another program has written the presence."""

    user_id: str
    sid: str
    node: str | None
    since: Time | None


class Participant(TypedDict):
    """A participant in a lesson. ``role``, ``node`` and ``since`` are null as for a teacher."""

    client_id: str
    role: str | None
    sid: str
    node: str | None
    since: Time | None


class LessonDetail(TypedDict):
    """Everybody in a lesson, and its seats: seat → client_id, or an empty string."""

    lesson_id: str
    seats: dict[str, str]
    teachers: list[Teacher]
    participants: list[Participant]


def rfc3339(seconds: float) -> str:
    """Return a time in UTC, given in seconds since 1970."""
    return _rfc3339(int(seconds))


@lru_cache(maxsize=4096)  # many people join in the same seconds
def _rfc3339(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:-6] + "Z"


def since(person: Person) -> str | None:
    """Return since when a person has been in a lesson."""
    return None if person.since is None else rfc3339(person.since)


def teacher(person: Person) -> Teacher:
    """Return a teacher as the API shows it."""
    return {"user_id": person.id, "sid": person.sid, "node": person.node, "since": since(person)}


def participant(person: Person) -> Participant:
    """Return a participant as the API shows it."""
    return {
        "client_id": person.id,
        "role": person.role,
        "sid": person.sid,
        "node": person.node,
        "since": since(person),
    }


def summary(lesson: LessonCounts) -> LessonSummary:
    """Return the numbers of a lesson as the API shows them."""
    return {
        "lesson_id": lesson.lesson_id,
        "teachers": lesson.teachers,
        "participants": lesson.participants,
        "seats": lesson.seats,
        "taken": lesson.taken,
    }


async def formatted(people: Sequence[Person], show: Callable[[Person], Any]) -> list[Any]:
    """Return people as ``show`` shows them, with a turn for other tasks now and then."""
    shown: list[Any] = []
    for start in range(0, len(people), PEOPLE_AT_ONCE):
        shown += map(show, people[start : start + PEOPLE_AT_ONCE])
        await asyncio.sleep(0)
    return shown


class RosterHandler(ApiHandler):
    """The base of the handlers of the roster."""

    def initialize(self, access: Access, roster: Roster, readiness: Readiness, removal: Removal) -> None:  # type: ignore[override]
        super().initialize(access)
        self.roster = roster
        self.readiness = readiness
        self.removal = removal


class OverviewHandler(RosterHandler):
    """Answers with the numbers over all lessons and nodes."""

    async def get(self) -> None:
        lessons = [lesson async for part in self.roster.all_lessons() for lesson in part]
        nodes = await self.roster.nodes()
        down = await self.readiness.down()
        overview: Overview = {
            "lessons": len(lessons),
            "teachers": sum(lesson.teachers for lesson in lessons),
            "participants": sum(lesson.participants for lesson in lessons),
            "guests": sum(node.guests for node in nodes),
            "stores": {name: "down" if name in down else "up" for name in ("RDS", "Redis")},
            "nodes": [
                {"node": node.node, "connections": node.connections, "heard_of": rfc3339(node.heard_of)}
                for node in nodes
            ],
        }
        self.answer(overview)


class LessonsHandler(RosterHandler):
    """Answers with a page of the lessons in which somebody is."""

    async def get(self) -> None:
        limit = self._limit()
        after = self.get_query_argument("cursor", None, strip=False)
        if after is not None and LESSON_ID.fullmatch(after) is None:
            raise ApiError(400, "cursor should be one that a page has returned")
        lessons = await self.roster.lessons(after, limit + 1)
        page: LessonPage = {
            "lessons": list(map(summary, lessons[:limit])),
            "cursor": lessons[limit - 1].lesson_id if len(lessons) > limit else None,
        }
        self.answer(page)

    def _limit(self) -> int:
        text = self.get_query_argument("limit", str(DEFAULT_LIMIT), strip=False)
        if re.fullmatch(r"[0-9]{1,3}", text) is None or not 1 <= int(text) <= MAX_LIMIT:
            raise ApiError(400, f"limit should be a number from 1 to {MAX_LIMIT}")
        return int(text)


class LessonHandler(RosterHandler):
    """Answers with everybody in a lesson."""

    async def get(self, lesson_id: str) -> None:
        found = await self.roster.lesson(lesson_id) if LESSON_ID.fullmatch(lesson_id) else None
        if found is None:
            raise ApiError(404, "nobody is in this lesson")
        lesson: LessonDetail = {
            "lesson_id": lesson_id,
            "seats": found.seats,
            "teachers": await formatted(found.teachers, teacher),
            "participants": await formatted(found.participants, participant),
        }
        self.answer(lesson)


class PersonHandler(RosterHandler):
    """Removes a person from a lesson."""

    CLIENTS = {"teachers": "teacher", "participants": "participant"}  # noqa: RUF012 (never changed)

    async def delete(self, lesson_id: str, kind: str, person: str) -> None:
        known = LESSON_ID.fullmatch(lesson_id) is not None
        if not known or not await self.removal.remove(lesson_id, self.CLIENTS[kind], person):
            raise ApiError(404, "nobody of this id is in this lesson")
        self.set_status(204)
        self.finish()
