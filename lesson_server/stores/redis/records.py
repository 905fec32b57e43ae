"""The records of a person in a lesson in Redis: their keys, fields and TTLs.

=============================  =====================================================================================
a teacher in a lesson          ``lesson_teacher_{lesson_id}``: user_id → sid; ``{user_id}``: lesson_id
a participant in a lesson      ``lesson_student_{lesson_id}``: client_id → sid
a participant, in any lesson   ``{client_id}``: sid, client_id, role. It outlives the connection by 24 h, so that a
                               reconnect is recognized
=============================  =====================================================================================

The keys and TTLs come from the contract, section 5. Each connection that has joined holds a *claim* on the entries of
its record; see claims.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import orjson

from lesson_server.stores.redis import keys

# TTL in seconds of a teacher's sid and a participant's record: a lesson and its breaks are over by then.
DAY = 24 * 60 * 60


@dataclass(frozen=True, slots=True)
class Entry:
    """Fields of one hash that are written and removed together.

    Attributes:
        name: the key, without ``redis.key_prefix``.
        fields: field, value, field, value, …; the entry exists if its first field exists.
        ttl: seconds; None: ``presence.retention``.
        outlives: whether the entry stays until its TTL ends after the last connection with a claim on it has ended.
    """

    name: str
    fields: tuple[str, ...]
    ttl: int | None
    outlives: bool = False


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """A teacher in a lesson, connected as ``sid``."""

    KIND: ClassVar[str] = "teacher"

    role: ClassVar[str] = "teacher"
    sid: str
    lesson_id: str
    user_id: str

    def entries(self) -> tuple[Entry, ...]:
        """Return the entries of the teacher in Redis.

        Source: Teacher App diagram, arrows 12 and 13.
        """
        return (
            Entry(keys.teachers(self.lesson_id), (self.user_id, self.sid), DAY),
            Entry(keys.teacher(self.user_id), ("lesson_id", self.lesson_id), None),
        )


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A participant in a lesson, connected as ``sid``."""

    KIND: ClassVar[str] = "participant"

    sid: str
    lesson_id: str
    client_id: str
    role: str

    def entries(self) -> tuple[Entry, ...]:
        """Return the entries of the participant in Redis.

        Source: Participant diagram, the arrows after 11.
        """
        client = ("sid", self.sid, "client_id", self.client_id, "role", self.role)
        return (
            Entry(keys.students(self.lesson_id), (self.client_id, self.sid), None),
            Entry(keys.client(self.client_id), client, DAY, outlives=True),
        )


Record = TeacherRecord | ClientRecord
KINDS: dict[str, type[TeacherRecord] | type[ClientRecord]] = {cls.KIND: cls for cls in (TeacherRecord, ClientRecord)}


def encode(record: Record) -> bytes:
    """Return a record as stored in the index of its node."""
    return orjson.dumps([record.KIND, *(getattr(record, name) for name in record.__slots__)])


def decode(text: str) -> Record:
    """Return a record that was read from an index."""
    kind, *fields = orjson.loads(text)
    return KINDS[kind](*fields)
