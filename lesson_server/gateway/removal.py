"""The removal of a person from a lesson, on whatever nodes the person is connected."""

import asyncio
import contextlib
from collections.abc import Collection, Coroutine
from typing import Any

from lesson_server.errors import StoreUnavailable
from lesson_server.gateway.handlers import Gateway
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.claims import ClaimName, Claims
from lesson_server.stores.redis.messages import Messages
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.stores.redis.roster import Roster
from lesson_server.stores.redis.seats import Seats
from lesson_server.tasks import end

# The kind of message that asks every node to close the connections of a person.
REMOVE = "remove"
# Seconds between two requests to the nodes. The last request comes after 1.2 s: a node may have lost its subscription,
# and subscribes again in a second.
REQUEST_INTERVAL = 0.4
# Requests after which the claims that are left are removed from here: their node is dead, or does not answer.
REQUESTS = 4
# Seconds between two looks whether the person is gone.
LOOK_INTERVAL = 0.02
# Seconds between two further requests to a node that has not answered, and the number of these requests: a node notices
# within 12 s that its subscription is silent. The node would otherwise write the presence again.
REPEAT_INTERVAL = 1.0
REPEATS = 20

# The client of each kind of people in a lesson → the key of these people.
KEYS = {"teacher": keys.teachers, "participant": keys.students}
# Removes the presence that another program has written, which has no claim.
NO_CLAIM = ClaimName("", 0, "")


class Removal:
    """Removes people from lessons.

    Args:
        gateway: the connections of this node.
        roster: reads who is in a lesson.
        claims: removes claims of any node.
        seats: frees the seat of a participant.
        messages: the messages between nodes.
    """

    def __init__(self, gateway: Gateway, roster: Roster, claims: Claims, seats: Seats, messages: Messages) -> None:
        self._gateway = gateway
        self._roster = roster
        self._claims = claims
        self._seats = seats
        self._messages = messages
        self._tasks: set[asyncio.Task[None]] = set()
        messages.on(REMOVE, self._handle)

    async def remove(self, lesson_id: str, client: str, person: str) -> bool:
        """Close every connection of a person in a lesson, on every node; remove the presence, and free the seat.

        Source: contract, section 10.

        Args:
            lesson_id: the lesson.
            client: the kind of client, ``teacher`` or ``participant``.
            person: the ``user_id`` of a teacher, the ``client_id`` of a participant.

        Returns:
            False if nobody of that id is in the lesson.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the person may have been removed nevertheless.
        """
        key = KEYS[client](lesson_id)
        before = await self._roster.connections(key, person)
        if not before:
            return False
        # The first request closes every connection, also one whose join is under way. Each later request names the
        # connections: the person may have joined again since the first request.
        request = {"lesson_id": lesson_id, "client": client, "person": person}
        for attempt in range(REQUESTS):
            await self._messages.publish(REMOVE, **request, sids=list(before) if attempt else None)
            if await self._are_gone(key, person, before):
                break
        else:
            await self._remove_claims(key, lesson_id, client, person, before)
            if not await self._are_gone(key, person, before):
                raise StoreUnavailable("Redis", f"a person is still in lesson {lesson_id}")
            if any(before.values()):
                self._start(self._repeat({**request, "sids": list(before)}))
        if client == "participant":
            await self._seats.free(lesson_id, person)
        return True

    async def close(self) -> None:
        """End the removals that are under way on this node, and further requests."""
        await asyncio.gather(*map(end, self._tasks))

    async def _remove_claims(self, key: str, lesson_id: str, client: str, person: str, before: Collection[str]) -> None:
        for sid, claim in (await self._roster.connections(key, person)).items():
            if sid in before:
                node, number, role = claim or NO_CLAIM
                await self._claims.remove(_record(client, sid, lesson_id, person, role), node, number, undo=False)

    async def _are_gone(self, key: str, person: str, before: Collection[str]) -> bool:
        clock = asyncio.get_running_loop().time
        deadline = clock() + REQUEST_INTERVAL
        while True:
            if not (await self._roster.connections(key, person)).keys() & before:
                return True
            if clock() > deadline:
                return False
            await asyncio.sleep(LOOK_INTERVAL)

    async def _repeat(self, request: dict[str, Any]) -> None:
        for _ in range(REPEATS):
            await asyncio.sleep(REPEAT_INTERVAL)
            with contextlib.suppress(StoreUnavailable):
                await self._messages.publish(REMOVE, **request)

    async def _handle(self, message: dict[str, Any]) -> None:
        # A task, because a removal waits for the running step of a join, and the next message must not.
        lesson_id, client, person = message["lesson_id"], message["client"], message["person"]
        self._start(self._gateway.remove(lesson_id, client, person, message.get("sids")))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _record(client: str, sid: str, lesson_id: str, person: str, role: str) -> Record:
    if client == "teacher":
        return TeacherRecord(sid, lesson_id, person)
    return ClientRecord(sid, lesson_id, person, role)
