"""The removal of a person from a lesson, on whatever nodes the person is connected."""

import asyncio
from typing import Any

from lesson_server.errors import StoreUnavailable
from lesson_server.gateway.handlers import Gateway
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.claims import Claims
from lesson_server.stores.redis.messages import Messages
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.stores.redis.roster import Roster

# The kind of message that asks every node to close the connections of a person.
REMOVE = "remove"
# Seconds between two requests to the nodes: a node may have lost its subscription, and subscribes again in a second.
REQUEST_INTERVAL = 0.5
# Requests after which the claims that are left are removed from here: their node is dead, or does not answer.
REQUESTS = 3
# Seconds between two looks whether the person is gone.
LOOK_INTERVAL = 0.02

# The client of each kind of people in a lesson → the key of these people.
KEYS = {"teacher": keys.teachers, "participant": keys.students}


class Removal:
    """Removes people from lessons.

    Args:
        gateway: the connections of this node.
        roster: reads who is in a lesson.
        claims: removes claims of any node.
        messages: the messages between nodes.
    """

    def __init__(self, gateway: Gateway, roster: Roster, claims: Claims, messages: Messages) -> None:
        self._gateway = gateway
        self._roster = roster
        self._claims = claims
        self._messages = messages
        messages.on(REMOVE, self._handle)

    async def remove(self, lesson_id: str, client: str, person: str) -> bool:
        """Close every connection of a person in a lesson, on every node, and remove the person's presence.

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
        if not await self._roster.is_there(key, person):
            return False
        for _ in range(REQUESTS):
            await self._messages.publish(REMOVE, lesson_id=lesson_id, client=client, person=person)
            if await self._is_gone(key, person):
                return True
        for sid, node, number, role in await self._roster.claims(key, person):
            record = _record(client, sid, lesson_id, person, role)
            await self._claims.remove(record, node, number, undo=False)
        if not await self._is_gone(key, person):
            raise StoreUnavailable("Redis", f"{person} is still in lesson {lesson_id}")
        return True

    async def _handle(self, message: dict[str, Any]) -> None:
        await self._gateway.remove(message["lesson_id"], message["client"], message["person"])

    async def _is_gone(self, key: str, person: str) -> bool:
        clock = asyncio.get_running_loop().time
        deadline = clock() + REQUEST_INTERVAL
        while True:
            if not await self._roster.is_there(key, person):
                return True
            if clock() > deadline:
                return False
            await asyncio.sleep(LOOK_INTERVAL)


def _record(client: str, sid: str, lesson_id: str, person: str, role: str) -> Record:
    if client == "teacher":
        return TeacherRecord(sid, lesson_id, person)
    return ClientRecord(sid, lesson_id, person, role)
