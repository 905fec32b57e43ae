"""Redis: who is in which lesson, read for people: the roster API and the console.

A roster is read a part at a time. Between two parts the reader waits while the server is busy, so that it does not slow
joins.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from lesson_server.errors import StoreRefused
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.claims import ClaimName, parse_claim
from lesson_server.stores.redis.lesson_list import LessonList
from lesson_server.stores.redis.store import Command, Store

# Lessons, and people, that are read in one round trip: about a millisecond of Redis and of the event loop.
LESSONS_AT_ONCE = 50
PEOPLE_AT_ONCE = 250
# Seconds that the next part of a roster waits at most for the server to be less busy, and between two looks.
BUSY_PATIENCE = 0.025
BUSY_INTERVAL = 0.001

# Returns the number of seats that are taken. The fields of a seat map are seats; the value of a free seat is empty.
COUNT_TAKEN = """
local taken = 0
for _, occupant in ipairs(redis.call('HVALS', KEYS[1])) do
    if occupant ~= '' then taken = taken + 1 end
end
return taken
"""

# KEYS[1] is the hash of people in a lesson, id → sid. ARGV[1] is a cursor of HSCAN, ARGV[2] its COUNT; ARGV[3] and
# ARGV[4] enclose an id in the key of its claims, which is in the slot of KEYS[1]. Returns the next cursor and, for each
# person: the id, the newest claim, which contains the sid, and its order; or the id, the sid, and '' without a claim.
READ_PEOPLE = """
local call, before, after = redis.call, ARGV[3], ARGV[4]
local page = call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local entries, people, size = page[2], {}, 0
for position = 1, #entries, 2 do
    local id = entries[position]
    local newest = call('ZREVRANGE', before .. id .. after, '0', '0', 'WITHSCORES')
    people[size + 1] = id
    people[size + 2] = newest[1] or entries[position + 1]
    people[size + 3] = newest[2] or ''
    size = size + 3
end
return {page[1], people}
"""


@dataclass(frozen=True, slots=True)
class LessonCounts:
    """The numbers of people and seats in a lesson; ``taken`` of the ``seats`` are taken."""

    lesson_id: str
    teachers: int
    participants: int
    seats: int
    taken: int


class Person(NamedTuple):
    """A person in a lesson, by the connection that joined last.

    Attributes:
        id: the ``user_id`` of a teacher, the ``client_id`` of a participant.
        sid: the Socket.IO id of the connection.
        role: the role in the access token; ``teacher`` for a teacher. None if another program has written the person.
        node: the node of the connection; None as for ``role``.
        since: when the connection joined, in seconds since 1970 by the clock of Redis; None as for ``role``.
    """

    id: str
    sid: str
    role: str | None
    node: str | None
    since: float | None


@dataclass(frozen=True, slots=True)
class LessonRoster:
    """Everybody in a lesson, by id, and its seats: seat → ``client_id``, or an empty string."""

    lesson_id: str
    seats: dict[str, str]
    teachers: list[Person]
    participants: list[Person]


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """What a node has said of itself in its last heartbeat.

    Attributes:
        node: the node's id.
        connections: the number of its connections.
        guests: how many of them are guests.
        heard_of: the time of the heartbeat, in seconds since 1970 by the clock of the node.
    """

    node: str
    connections: int
    guests: int
    heard_of: float


class Roster:
    """Reads from Redis who is in which lesson.

    Args:
        store: the connection to Redis.
        is_busy: returns whether the server is answering events.
    """

    def __init__(self, store: Store, is_busy: Callable[[], bool]) -> None:
        self._store = store
        self._is_busy = is_busy
        self._lessons = LessonList(store)

    async def lessons(self, after: str | None, limit: int) -> list[LessonCounts]:
        """Return the lessons in which somebody is, in the order of their ids.

        Args:
            after: only lessons that follow this lesson id; None: from the first lesson on.
            limit: the maximum number of lessons.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        found: list[LessonCounts] = []
        async for part in self.all_lessons(after, min(limit, LESSONS_AT_ONCE)):
            found += part
            if len(found) >= limit:
                break
        return found[:limit]

    async def all_lessons(
        self, after: str | None = None, at_once: int = LESSONS_AT_ONCE
    ) -> AsyncIterator[list[LessonCounts]]:
        """Yield the lessons in which somebody is, a part at a time.

        Args:
            after: as for :meth:`lessons`.
            at_once: the maximum number of lessons in a part.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        while True:
            await self._wait_while_busy()
            lesson_ids = await self._lessons.page(after, at_once)
            if not lesson_ids:
                return
            counts = await self._counts(lesson_ids)
            empty = [lesson.lesson_id for lesson in counts if not lesson.teachers and not lesson.participants]
            if empty:
                await self._lessons.remove_empty(empty)
            yield [lesson for lesson in counts if lesson.teachers or lesson.participants]
            after = lesson_ids[-1]

    async def lesson(self, lesson_id: str) -> LessonRoster | None:
        """Return everybody in a lesson, and its seats; None if Redis knows nothing of the lesson.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        await self._wait_while_busy()
        (seats,) = await self._store.execute(("HGETALL", self._store.key(keys.seat_map(lesson_id))))
        teachers = await self._people(keys.teachers(lesson_id))
        participants = await self._people(keys.students(lesson_id))
        if not seats and not teachers and not participants:
            return None
        return LessonRoster(lesson_id, {seat: seats[seat] for seat in _in_order(seats)}, teachers, participants)

    async def connections(self, key: str, person: str) -> dict[str, ClaimName | None]:
        """Return the connections that hold a person in a lesson, by sid.

        Args:
            key: of the people of a kind in the lesson, from ``keys.py``.
            person: the id of the person.

        Returns:
            sid → the name of the connection's claim, the newest last; None: the sid stands in Redis without a claim,
            because another program has written it.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        full_key = self._store.key(key)
        shown, claims = await self._store.execute(
            ("HGET", full_key, person), ("ZRANGE", self._store.key(keys.claims(person, full_key)), 0, -1)
        )
        if shown is None:
            return {}
        return {shown: None} | {sid: name for name, sid in map(parse_claim, claims)}

    async def nodes(self) -> list[NodeFigures]:
        """Return the nodes that are alive, by their ids.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        counts, figures = await self._store.execute(
            ("HGETALL", self._store.key(keys.NODE_COUNTS)), ("HGETALL", self._store.key(keys.NODE_FIGURES))
        )
        return [
            _node_figures(node, orjson.loads(figures[node]))
            for node, count in sorted(counts.items())
            if int(count) >= 0 and node in figures
        ]

    async def _counts(self, lesson_ids: Sequence[str]) -> list[LessonCounts]:
        commands = tuple(command for lesson_id in lesson_ids for command in self._count(lesson_id))
        # As bookkeeping, so that a key of another type, which another program has written, hides no other lesson.
        answers = map(_number, await self._store.execute(bookkeeping=commands))
        return [LessonCounts(lesson_id, *(next(answers) for _ in range(4))) for lesson_id in lesson_ids]

    def _count(self, lesson_id: str) -> Iterator[Command]:
        yield ("HLEN", self._store.key(keys.teachers(lesson_id)))
        yield ("HLEN", self._store.key(keys.students(lesson_id)))
        seat_map = self._store.key(keys.seat_map(lesson_id))
        yield ("HLEN", seat_map)
        yield ("EVAL", COUNT_TAKEN, 1, seat_map)

    async def _people(self, name: str) -> list[Person]:
        key = self._store.key(name)
        # The id of a person stands between these two parts of the key of the person's claims.
        before, after = self._store.key(keys.claims("\n", key)).split("\n")
        people: dict[str, Person] = {}  # HSCAN may return somebody twice
        cursor = "0"
        while True:
            await self._wait_while_busy()
            ((cursor, found),) = await self._store.execute(
                ("EVAL", READ_PEOPLE, 1, key, cursor, PEOPLE_AT_ONCE, before, after)
            )
            for person, claim, order in zip(found[::3], found[1::3], found[2::3], strict=True):
                people[person] = _person(person, claim, order)
            if cursor == "0":
                break
        return [people[person] for person in sorted(people)]

    async def _wait_while_busy(self) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + BUSY_PATIENCE
        while self._is_busy() and clock() < deadline:  # noqa: ASYNC110 (an event would cost each join something)
            await asyncio.sleep(BUSY_INTERVAL)


def _number(answer: int | Exception) -> int:
    if isinstance(answer, StoreRefused):
        return 0
    if isinstance(answer, Exception):
        raise answer
    return answer


def _node_figures(node: str, said: dict[str, Any]) -> NodeFigures:
    # A node of a newer version may say more.
    return NodeFigures(node, said["connections"], said["guests"], said["heard_of"])


def _person(person: str, claim: str, order: str) -> Person:
    if not order:  # the claim is the sid
        return Person(person, claim, None, None, None)
    name, sid = parse_claim(claim)
    return Person(person, sid, name.role, name.node, float(order) / 1e6)


def _in_order(seats: Iterable[str]) -> list[str]:
    try:
        return sorted(seats, key=int)
    except ValueError:  # another program has written a field that is no number: it comes first
        return sorted(seats, key=lambda seat: (int(seat), "") if seat.isdecimal() else (-1, seat))
