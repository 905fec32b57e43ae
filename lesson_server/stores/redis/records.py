"""What Redis says of a person in a lesson: which keys and fields, how long, and by whose claim.

=============================  =====================================================================================
a teacher in a lesson          ``lesson_teacher_{lesson_id}``: user_id → sid; ``{user_id}``: lesson_id
a participant in a lesson      ``lesson_student_{lesson_id}``: client_id → sid
a participant, wherever it is  ``{client_id}``: sid, client_id, role. It outlives the connection by 24 h: that is how a
                               reconnect is known
=============================  =====================================================================================

The keys and their lives are the contract's, section 5. Each connection that has joined holds a *claim* on the entries
of its record. The claims on an entry stand beside it in Redis, in the order of joining, and the entry shows the newest.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import orjson

from lesson_server.stores.redis import keys

# Seconds that a teacher's sid and a participant's record live: a lesson and its breaks are over by then.
DAY = 24 * 60 * 60


@dataclass(frozen=True, slots=True)
class Entry:
    """Fields of one hash that are written and removed together.

    Attributes:
        name: the key, without ``redis.key_prefix``.
        fields: field, value, field, value, …; the first field is what tells that the entry is there.
        ttl: seconds; None: ``presence.retention``.
        outlives: whether the entry stays until its TTL when the last connection that claimed it has ended.
    """

    name: str
    fields: tuple[str, ...]
    ttl: int | None
    outlives: bool = False


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """A teacher in a lesson, by this sid."""

    KIND: ClassVar[str] = "teacher"

    sid: str
    lesson_id: str
    user_id: str

    def entries(self) -> tuple[Entry, ...]:
        """Return what Redis says of the teacher. Source: Teacher App diagram, arrows 12 and 13."""
        return (
            Entry(keys.teachers(self.lesson_id), (self.user_id, self.sid), DAY),
            Entry(keys.teacher(self.user_id), ("lesson_id", self.lesson_id), None),
        )


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A participant in a lesson, by this sid."""

    KIND: ClassVar[str] = "participant"

    sid: str
    lesson_id: str
    client_id: str
    role: str

    def entries(self) -> tuple[Entry, ...]:
        """Return what Redis says of the participant. Source: Participant diagram, the arrows after 11."""
        client = ("sid", self.sid, "client_id", self.client_id, "role", self.role)
        return (
            Entry(keys.students(self.lesson_id), (self.client_id, self.sid), None),
            Entry(keys.client(self.client_id), client, DAY, outlives=True),
        )


Record = TeacherRecord | ClientRecord
KINDS: dict[str, type[TeacherRecord] | type[ClientRecord]] = {cls.KIND: cls for cls in (TeacherRecord, ClientRecord)}


@dataclass(slots=True, eq=False)
class Incarnation:
    """A life of a node: from when it made itself known in Redis until Redis has lost it, or another node has swept it.

    Attributes:
        node_id: names it in Redis. Never used again: what is removed of an earlier life can't touch a later one.
        last_number: of the claims that were made in this life.
        claims: the numbers of those that stand in Redis, may come to stand there, or are being removed.
        late: claims that were removed while a write of theirs had not been answered: until when Redis may yet carry out
            the write, so that they are removed again, and whether the join is to be undone.
        acknowledged: how many writes Redis has answered; its own count must never be lower.
    """

    node_id: str
    last_number: int = 0
    claims: set[int] = field(default_factory=set)
    late: dict[int, tuple[float, bool]] = field(default_factory=dict)
    acknowledged: int = 0


@dataclass(slots=True, eq=False)
class Claim:
    """A connection's claim on the entries of its record. Each attempt to write a record is a claim of its own.

    So a claim can be removed at any time, by anybody: no later write of the same connection is touched by it.

    Attributes:
        record: what is claimed.
        incarnation: the node that made it.
        number: tells it from the other claims of the incarnation.
        order: the position of the claim among those on each entry, once Redis has given it. Of two joins at the same
            moment each may have come first on one entry: the check of the records gives each claim the same order on
            all of its entries, so that they show the same connection.
        unanswered: whether the last write of the claim was not answered; Redis may still carry it out.
        replaced: a claim of an earlier incarnation that this one takes the place of.
    """

    record: Record
    incarnation: Incarnation
    number: int
    order: str = ""
    replaced: "Claim | None" = None
    unanswered: bool = False


def claim_on(entry: Entry, node_id: str, number: int) -> bytes:
    """Return a claim as it stands in Redis beside an entry: its name, then the fields that the entry shows for it."""
    return orjson.dumps([f"{node_id}:{number}", *entry.fields])


def encode(record: Record) -> bytes:
    """Return a record as it stands in the index of its node."""
    return orjson.dumps([record.KIND, *(getattr(record, name) for name in record.__slots__)])


def decode(text: str) -> Record:
    """Return the record that stands in an index."""
    kind, *fields = orjson.loads(text)
    return KINDS[kind](*fields)
