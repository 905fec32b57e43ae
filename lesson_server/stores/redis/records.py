"""The records of a person in a lesson in Redis: their keys, fields, TTLs and claims.

=============================  =====================================================================================
a teacher in a lesson          ``lesson_teacher_{lesson_id}``: user_id → sid; ``{user_id}``: lesson_id
a participant in a lesson      ``lesson_student_{lesson_id}``: client_id → sid
a participant, in any lesson   ``{client_id}``: sid, client_id, role. It outlives the connection by 24 h, so that a
                               reconnect is recognized
=============================  =====================================================================================

The keys and TTLs come from the contract, section 5. Each connection that has joined holds a *claim* on the entries of
its record. Redis keeps the claims on an entry next to it, in the order of joining. The entry shows the newest claim.
"""

from dataclasses import dataclass, field
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


@dataclass(slots=True, eq=False)
class Incarnation:
    """A node under one node id: from its registration in Redis until Redis loses it or another node sweeps it.

    Attributes:
        node_id: the node's id in Redis. Never reused: a removal for an earlier incarnation can't affect a later one.
        last_number: the number of the last claim that was made in this incarnation.
        claims: the numbers of the claims that are in Redis, may still be written, or are being removed.
        late: claims that were removed while a write of them was unanswered: number → loop time until which Redis may
            still execute the write, so that the claim is removed again, and whether the join is to be undone.
        acknowledged: number of writes that Redis has answered; the count in Redis must never be lower.
    """

    node_id: str
    last_number: int = 0
    claims: set[int] = field(default_factory=set)
    late: dict[int, tuple[float, bool]] = field(default_factory=dict)
    acknowledged: int = 0


@dataclass(slots=True, eq=False)
class Claim:
    """A connection's claim on the entries of its record.

    Each attempt to write a record makes a new claim. So any node can remove a claim at any time without affecting a
    later write of the same connection.

    Attributes:
        record: the claimed record.
        incarnation: the incarnation that made the claim.
        number: unique among the claims of the incarnation.
        order: the claim's score in the sorted set of each entry, once Redis has assigned it. Of two joins at the same
            moment, each may have come first on one entry: the check of the records gives a claim the same order on all
            of its entries, so that they show the same connection.
        unanswered: whether the last write of the claim was not answered; Redis may still execute that write.
        replaced: the claim of an earlier incarnation that this claim replaces.
    """

    record: Record
    incarnation: Incarnation
    number: int
    order: str = ""
    replaced: "Claim | None" = None
    unanswered: bool = False


def claim_on(entry: Entry, node_id: str, number: int) -> bytes:
    """Return a claim as stored in the sorted set of an entry: its name, then the fields that the entry shows for it."""
    return orjson.dumps([f"{node_id}:{number}", *entry.fields])


def encode(record: Record) -> bytes:
    """Return a record as stored in the index of its node."""
    return orjson.dumps([record.KIND, *(getattr(record, name) for name in record.__slots__)])


def decode(text: str) -> Record:
    """Return a record that was read from an index."""
    kind, *fields = orjson.loads(text)
    return KINDS[kind](*fields)
