"""The claims of connections on entries in Redis, and the commands that write, check and remove the claims.

Next to each entry, in the same slot of a cluster, is a sorted set of the claims on the entry:
``lesson_node_claims:{field}{key}``, claim → order of joining. Every script accesses one entry and its claims, and every
script that writes the entry leaves it so that *the entry shows its newest claim*. So if a person has several
connections, Redis shows the one that joined last. When this connection ends, the same atomic step makes Redis show the
previous connection, on whatever node that connection is.

A node also lists what it has written in its index (``lesson_node_{node_id}``: claim number → record), so that another
node can remove the records if this node dies; see nodes.py. The index is written before the record, and a claim is
deleted from the index after the record has been removed.
"""

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.lesson_list import LessonList
from lesson_server.stores.redis.presence_scripts import CHECK, REMOVE, RESTORE, WRITE
from lesson_server.stores.redis.records import DAY, ClientRecord, Entry, Record, encode
from lesson_server.stores.redis.seats import Seats
from lesson_server.stores.redis.store import Command, Store

logger = EventLogger(__name__)


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

    def predecessors(self) -> Iterator["Claim"]:
        """Yield the earlier claims that this claim replaces."""
        claim = self
        while claim.replaced is not None:
            claim = claim.replaced
            yield claim


class ClaimName(NamedTuple):
    """The name of a connection's claim: its node, its number among the claims of the node, and the person's role."""

    node: str
    number: int
    role: str


class Claims:
    """The claims of one node: their numbers, their index, and the commands on the entries of a record.

    Args:
        store: the connection to Redis.
        retention: TTL in seconds of entries without a TTL of their own (``presence.retention``).
        seats: the seats, whose grace begins when a claim of a participant is removed.

    Attributes:
        incarnation: the current incarnation of the node.
    """

    def __init__(self, store: Store, retention: int, seats: Seats) -> None:
        self._store = store
        self._retention = retention
        self._seats = seats
        self._lessons = LessonList(store)
        self.incarnation = self.begin_incarnation()

    @property
    def shortest_ttl(self) -> int:
        """The shortest TTL of all entries, in seconds."""
        return min(self._retention, DAY)

    @property
    def nodes_key(self) -> str:
        """The key of the counts that show which nodes are alive."""
        return self._store.key(keys.NODE_COUNTS)

    def index_key(self, node_id: str) -> str:
        """Return the key of a node's index."""
        return self._store.key(keys.node_index(node_id))

    @property
    def figures_key(self) -> str:
        """The key of what the nodes say of themselves."""
        return self._store.key(keys.NODE_FIGURES)

    def begin_incarnation(self) -> Incarnation:
        """Continue under a new node id.

        Claims of the previous incarnation are replaced when their records are restored.
        """
        self.incarnation = Incarnation(secrets.token_hex(8))
        return self.incarnation

    def new(self, record: Record) -> Claim:
        """Return a new claim on the entries of a record."""
        incarnation = self.incarnation
        incarnation.last_number += 1
        incarnation.claims.add(incarnation.last_number)
        return Claim(record, incarnation, incarnation.last_number)

    async def write(self, claim: Claim) -> list[tuple[str, int]]:
        """Write a claim on each of its entries.

        Returns:
            for each entry, the order of the claim, and whether another connection has or had the entry.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the claim may have been written nevertheless.
        """
        return await self._write(
            claim, [self._script(WRITE, claim, entry, int(entry.outlives)) for entry in claim.record.entries()]
        )

    async def restore(self, claim: Claim) -> None:
        """Write a claim again with its order, in place of the claims that it replaces.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the claim may have been written nevertheless.
        """
        await self._write(
            claim,
            [
                self._script(RESTORE, claim, entry, claim.order, *self._replaced(claim, entry))
                for entry in claim.record.entries()
            ],
        )

    def listing(self, claims: Iterable[Claim]) -> Command:
        """Return the command that lists the lessons of claims, of which there is at least one."""
        return self._lessons.addition({claim.record.lesson_id for claim in claims})

    def checks(self, claim: Claim) -> list[Command]:
        """Return the commands that check a claim: one for each entry, and one for the index."""
        # Only the connection itself writes a missing record: a write from here could come after the connection ended.
        is_indexed = ("HEXISTS", self.index_key(claim.incarnation.node_id), claim.number)
        return [*(self._script(CHECK, claim, entry, claim.order) for entry in claim.record.entries()), is_indexed]

    async def remove(self, record: Record, node_id: str, number: int, *, undo: bool) -> None:
        """Remove a claim from each of its entries, and begin the grace of the participant's seat.

        Args:
            record: the claimed record.
            node_id: the node id of the incarnation that made the claim.
            number: the number of the claim.
            undo: whether to restore an entry that outlives its claims to its state before the claim.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the claim may have been removed nevertheless.
        """
        commands = [
            self._on(entry, REMOVE, claim_on(record, entry, node_id, number), _fate(entry, undo))
            for entry in record.entries()
        ]
        departure = self._departure(record)
        try:
            # The departure first: see Seats._free_if_due.
            *departed, is_gone, _ = await self._store.execute(*commands, bookkeeping=departure)
        except StoreRefused as error:
            # A key of another type is not ours any more, and the script can't change it.
            logger.warning(
                "removal_refused",
                "a record of {sid} can't be removed: {cause}",
                sid=record.sid,
                lesson_id=record.lesson_id,
                cause=error.cause,
            )
            return
        await self._complete_departure(record, *departed)
        if is_gone:  # nobody of this kind is in the lesson any more
            with contextlib.suppress(StoreUnavailable):  # the next reader removes the lesson from the list
                await self._lessons.remove_empty([record.lesson_id])

    def _departure(self, record: Record) -> tuple[Command, ...]:
        return (self._seats.departure(record.lesson_id, record.client_id),) if isinstance(record, ClientRecord) else ()

    async def _complete_departure(self, record: Record, is_known: int | Exception = 0) -> None:
        if isinstance(is_known, StoreRefused):  # a key of another type, as above
            return
        if isinstance(is_known, Exception):  # the removal is retried as a whole
            raise is_known
        if is_known and isinstance(record, ClientRecord):
            await self._seats.list_departure(record.lesson_id, record.client_id)

    async def _write(self, claim: Claim, commands: list[Command]) -> list[Any]:
        """Execute commands that write a claim, after the commands with which other nodes find it if this node dies.

        The latter add the claim to the index, count the write, which registers the node if Redis did not know it, and
        add the lesson to the list of lessons.
        """
        node_id = claim.incarnation.node_id
        claim.unanswered = True
        counted, _, _, *answers = await self._store.execute(
            *commands,
            bookkeeping=(
                ("HINCRBY", self.nodes_key, node_id, 1),
                ("HSET", self.index_key(node_id), claim.number, encode(claim.record)),
                self._lessons.addition([claim.record.lesson_id]),
            ),
        )
        claim.unanswered = False
        if not isinstance(counted, Exception):
            claim.incarnation.acknowledged += 1
        return answers

    def _script(self, script: str, claim: Claim, entry: Entry, *arguments: str | bytes | int) -> Command:
        name = claim_on(claim.record, entry, claim.incarnation.node_id, claim.number)
        return self._on(entry, script, name, *arguments)

    def _on(self, entry: Entry, script: str, claim: bytes, *arguments: str | bytes | int) -> Command:
        key = self._store.key(entry.name)
        claims_key = self._store.key(keys.claims(entry.fields[0], key))
        return ("EVAL", script, 2, key, claims_key, claim, entry.ttl or self._retention, *arguments)

    def _replaced(self, claim: Claim, entry: Entry) -> Iterator[bytes]:
        return (claim_on(claim.record, entry, old.incarnation.node_id, old.number) for old in claim.predecessors())


def claim_on(record: Record, entry: Entry, node_id: str, number: int) -> bytes:
    """Return a claim as stored in the sorted set of an entry: its name, then the fields that the entry shows for it."""
    return orjson.dumps([f"{node_id}:{number}:{record.role}", *entry.fields])


def parse_claim(text: str) -> tuple[ClaimName, str]:
    """Return the name and the sid of a claim that was read from the sorted set of the entry of a lesson."""
    name, _, sid = orjson.loads(text)
    node, number, role = name.split(":", 2)
    return ClaimName(node, int(number), role), sid


def _fate(entry: Entry, undo: bool) -> str:
    """Return what a removal does to an entry on which no other claim is left."""
    if not entry.outlives:
        return "remove"
    return "undo" if undo else "keep"
