"""Redis: who is in which lesson, by which sid.

All Redis commands on keys are in this module, seats.py and nodes.py. The keys and fields are in records.py.

Next to each entry, in the same slot of a cluster, is a sorted set of the claims on the entry:
``lesson_node_claims:{field}{key}``, claim → order of joining. Every script accesses one entry and its claims, and every
script that writes the entry leaves it so that *the entry shows its newest claim*. So if a person has several
connections, Redis shows the one that joined last. When this connection ends, the same atomic step makes Redis show the
previous connection, on whatever node that connection is.

A node also lists what it has written in its index (``lesson_node_{node_id}``: claim number → record), so that another
node can remove the records if this node dies; see nodes.py. The index is written before the record, and a claim is
deleted from the index after the record has been removed.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from itertools import chain, groupby, islice
from operator import attrgetter
from typing import Any

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.presence_scripts import CHECK, REMOVE, RESTORE, WRITE
from lesson_server.stores.redis.records import DAY, Claim, Entry, Incarnation, Record, claim_on, decode, encode
from lesson_server.stores.redis.shard import Command
from lesson_server.stores.redis.store import Store

logger = logging.getLogger(__name__)

# Seconds that a removal may delay an answer; after that, the removal is retried in the background.
REMOVAL_PATIENCE = 0.5
# Seconds between two attempts at a removal that Redis has not answered.
RETRY_INTERVAL = 1.0
# Seconds for which removed claims are collected, before one command deletes them from the index. No caller waits.
UNINDEX_INTERVAL = 0.1
# Seconds after which Redis no longer executes a write that it has not answered: the timeout of the write, plus the time
# of TCP retransmissions.
LATE_WRITE = 10.0
# Maximum number of records that are checked or removed concurrently, and of index entries read in one round trip.
BATCH_SIZE = 100


class Presence:
    """The presence records in Redis.

    A removal that Redis does not answer is *pending*: it is retried until Redis answers.

    Args:
        store: the connection to Redis.
        retention: TTL in seconds of entries without a TTL of their own (``presence.retention``).
    """

    def __init__(self, store: Store, retention: int) -> None:
        self._store = store
        self._retention = retention
        self.incarnation = self.begin_incarnation()
        self._held: dict[str, Claim] = {}  # sid → the claim of that connection
        self._pending: list[tuple[Claim, bool]] = []
        self._removed: list[tuple[Claim, bool]] = []  # still to be deleted from the index
        self._cleaner: asyncio.Task[None] | None = None

    @property
    def shortest_ttl(self) -> int:
        """The shortest TTL of all entries, in seconds."""
        return min(self._retention, DAY)

    # Called by connections

    async def write(self, record: Record) -> bool:
        """Write the record of a connection, in one round trip.

        Source: Teacher App diagram, arrows 12 and 13; Participant diagram, the arrows after 11.

        Returns:
            whether this is a reconnect: the participant was known under another sid before.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the record may have been written nevertheless.
        """
        claim = self._held[record.sid] = self._claim(record)
        writes = [self._script(WRITE, claim, entry, int(entry.outlives)) for entry in record.entries()]
        answers = await self._run(claim, writes)
        claim.order = max(order for order, _ in answers)
        return any(known for _, known in answers)

    async def restore(self, record: Record) -> None:
        """Write a record again that Redis has lost; newer connections of the same person keep precedence.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        claim = self._held[record.sid]
        if claim.incarnation is not self.incarnation:
            replaced, claim = claim, self._claim(record)
            claim.order, claim.replaced = replaced.order, replaced
            self._held[record.sid] = claim
        await self._run(
            claim,
            [
                self._script(RESTORE, claim, entry, claim.order, *self._replaced(claim, entry))
                for entry in record.entries()
            ],
        )
        claim.replaced = None

    async def remove(self, sid: str, *, undo: bool = False) -> None:
        """Remove what was written for this sid, at once or as soon as Redis answers.

        Never raises StoreUnavailable.

        Args:
            sid: of a connection that has, or may have, written its record; for any other sid, nothing is removed.
            undo: whether the join has failed: ``{client_id}`` is then restored to its state before the join. When a
                connection ends without undo, ``{client_id}`` stays for its 24 h.
        """
        held = self._held.pop(sid, None)
        if held is None:
            return
        for claim in (held, *_formers(held)):
            try:
                async with asyncio.timeout(REMOVAL_PATIENCE):
                    await self._remove(claim.record, claim.incarnation.node_id, claim.number, undo=undo)
            except (StoreUnavailable, TimeoutError):
                self._pending.append((claim, undo))
            else:
                self._removed.append((claim, undo))
        if self._cleaner is None:
            self._cleaner = asyncio.create_task(self._clean())

    # Called by the node

    def begin_incarnation(self) -> Incarnation:
        """Continue under a new node id.

        Claims of the previous incarnation are replaced when their records are restored.
        """
        self.incarnation = Incarnation(secrets.token_hex(8))
        return self.incarnation

    async def check(self, sids: Sequence[str]) -> list[str]:
        """Return the sids whose records in Redis are missing or wrong, in one round trip.

        The TTLs of correct records are renewed. If Redis did not answer for a record, the record counts as correct:
        another check follows each failure of Redis.
        """
        claims = ((sid, self._held.get(sid)) for sid in sids)
        checks = {sid: self._checks(claim) for sid, claim in claims if claim is not None and self._is_current(claim)}
        answers = iter(await self._store.run(bookkeeping=tuple(chain.from_iterable(checks.values()))))
        standing = {sid for sid, commands in checks.items() if all(map(_stands, list(islice(answers, len(commands)))))}
        return [sid for sid in sids if sid not in standing]

    async def strays(self) -> AsyncIterator[int]:
        """Remove the records in this node's index that belong to no connection: late writes of failed joins.

        Yields:
            after each round trip, the number of records that were removed for good.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        incarnation = self.incarnation
        now = asyncio.get_running_loop().time()
        cursor: str | int = 0
        while True:
            ((cursor, entries),) = await self._store.run(
                ("HSCAN", self.index_key(incarnation.node_id), cursor, "COUNT", BATCH_SIZE)
            )
            # Numbers are never reused, so a stray record remains a stray.
            strays = {int(number): text for number, text in entries.items() if int(number) not in incarnation.claims}
            for undo in (True, False):
                some = {n: text for n, text in strays.items() if incarnation.late.get(n, (now, True))[1] is undo}
                # A claim that may still be written stays in the index: the next check removes it again.
                kept = {n for n in some if n in incarnation.late and incarnation.late[n][0] > now}
                yield await self._remove_entries(incarnation.node_id, some, undo=undo, kept=kept)
            if int(cursor) == 0:
                break
        incarnation.late = {n: late for n, late in incarnation.late.items() if late[0] > now}

    async def sweep(self, node_id: str) -> int:
        """Remove some of the records of a lost node.

        Several nodes may sweep the same node concurrently.

        Returns:
            number of claims removed; 0 when none is left.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        (answer,) = await self._store.run(("HRANDFIELD", self.index_key(node_id), BATCH_SIZE, "WITHVALUES"))
        entries = {int(number): text for number, text in _pairs(answer)}
        return await self._remove_entries(node_id, entries, undo=False)

    async def settled(self) -> None:
        """Wait until no removal is pending."""
        if self._cleaner is not None:
            await asyncio.shield(self._cleaner)

    async def close(self) -> None:
        """Stop retrying pending removals."""
        if self._cleaner is not None:
            self._cleaner.cancel()

    # Keys

    @property
    def nodes_key(self) -> str:
        """The key of the counts that show which nodes are alive."""
        return self._store.key(keys.NODE_COUNTS)

    def index_key(self, node_id: str) -> str:
        """Return the key of a node's index."""
        return self._store.key(keys.node_index(node_id))

    # Commands

    def _claim(self, record: Record) -> Claim:
        incarnation = self.incarnation
        incarnation.last_number += 1
        incarnation.claims.add(incarnation.last_number)
        return Claim(record, incarnation, incarnation.last_number)

    def _script(self, script: str, claim: Claim, entry: Entry, *arguments: str | bytes | int) -> Command:
        return self._on(entry, script, claim_on(entry, claim.incarnation.node_id, claim.number), *arguments)

    def _on(self, entry: Entry, script: str, claim: bytes, *arguments: str | bytes | int) -> Command:
        key = self._store.key(entry.name)
        claims_key = self._store.key(keys.claims(entry.fields[0], key))
        return ("EVAL", script, 2, key, claims_key, claim, entry.ttl or self._retention, *arguments)

    def _replaced(self, claim: Claim, entry: Entry) -> Iterator[bytes]:
        return (claim_on(entry, former.incarnation.node_id, former.number) for former in _formers(claim))

    async def _run(self, claim: Claim, commands: list[Command]) -> list[Any]:
        """Run commands that write a claim, after the commands that let other nodes find the claim if this node dies.

        The latter add the claim to the index, and count the write, which registers the node if Redis did not know it.
        """
        node_id = claim.incarnation.node_id
        claim.unanswered = True
        counted, _, *answers = await self._store.run(
            *commands,
            bookkeeping=(
                ("HINCRBY", self.nodes_key, node_id, 1),
                ("HSET", self.index_key(node_id), claim.number, encode(claim.record)),
            ),
        )
        claim.unanswered = False
        if not isinstance(counted, Exception):
            claim.incarnation.acknowledged += 1
        return answers

    def _is_current(self, claim: Claim) -> bool:
        return claim.incarnation is self.incarnation and claim.replaced is None

    def _checks(self, claim: Claim) -> list[Command]:
        # Only the connection itself writes a missing record: a write from here could come after the connection ended.
        is_indexed = ("HEXISTS", self.index_key(claim.incarnation.node_id), claim.number)
        return [*(self._script(CHECK, claim, entry, claim.order) for entry in claim.record.entries()), is_indexed]

    async def _remove(self, record: Record, node_id: str, number: int, *, undo: bool) -> None:
        with_claims = [
            self._on(entry, REMOVE, claim_on(entry, node_id, number), _fate(entry, undo)) for entry in record.entries()
        ]
        try:
            await self._store.run(*with_claims)
        except StoreRefused as error:
            # A key of another type is not ours any more, and the script can't change it.
            logger.warning("a record can't be removed: %s", error.cause)

    async def _remove_entries(
        self, node_id: str, entries: dict[int, str], *, undo: bool, kept: Collection[int] = ()
    ) -> int:
        """Remove claims that were read from an index, and then delete them from the index, except ``kept``."""
        results = await asyncio.gather(
            *(self._remove(decode(text), node_id, number, undo=undo) for number, text in entries.items()),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors and len(errors) == len(entries):
            raise errors[0]
        removed = [
            number for number, result in zip(entries, results, strict=True) if result is None and number not in kept
        ]
        if removed:
            await self._store.run(("HDEL", self.index_key(node_id), *removed))
        return len(removed)

    # Pending removals

    async def _clean(self) -> None:
        """Retry pending removals, and delete removed claims from the index, until none is left."""
        while self._pending or self._removed:
            try:
                await asyncio.sleep(UNINDEX_INTERVAL)
                await self._unindex()
                if self._pending:
                    # A removal ends with a delete from the index: if the index does not answer, no retry can complete.
                    await self._store.run(("HLEN", self.index_key(self.incarnation.node_id)))
                    await self._retry_removals()
                continue
            except StoreUnavailable:
                pass  # the outage has been logged
            except Exception:
                logger.exception("removals failed")
            await asyncio.sleep(RETRY_INTERVAL)
        self._cleaner = None

    async def _unindex(self) -> None:
        removed, self._removed = self._removed, []
        try:
            for claim, undo in removed:
                if claim.unanswered:
                    late = asyncio.get_running_loop().time() + LATE_WRITE
                    claim.incarnation.late[claim.number] = late, undo
                    claim.incarnation.claims.discard(claim.number)
            answered = (claim for claim, _ in removed if not claim.unanswered)
            for incarnation, claims in groupby(answered, attrgetter("incarnation")):
                numbers = [claim.number for claim in claims]
                commands: list[Command] = [("HDEL", self.index_key(incarnation.node_id), *numbers)]
                if incarnation is self.incarnation:  # counting for an earlier one would register it again
                    commands.append(("HINCRBY", self.nodes_key, incarnation.node_id, 1))
                await self._store.run(*commands)
                incarnation.acknowledged += 1
                incarnation.claims.difference_update(numbers)
        except Exception:
            self._pending += removed  # Redis may come back with the records as they were before the removal
            raise

    async def _retry_removals(self) -> None:
        """Retry each pending removal once.

        Raises:
            StoreUnavailable: Redis failed or was too slow. Some removals are still pending.
        """
        pending, self._pending = self._pending, []
        failure = None
        for start in range(0, len(pending), BATCH_SIZE):
            batch = pending[start : start + BATCH_SIZE]
            results = await asyncio.gather(
                *(
                    self._remove(claim.record, claim.incarnation.node_id, claim.number, undo=undo)
                    for claim, undo in batch
                ),
                return_exceptions=True,
            )
            for (claim, undo), result in zip(batch, results, strict=True):
                if result is None:
                    self._removed.append((claim, undo))
                else:
                    self._pending.append((claim, undo))
                    if failure is None or isinstance(failure, StoreUnavailable):  # a defect comes first
                        failure = result
        if failure is not None:
            raise failure


def _fate(entry: Entry, undo: bool) -> str:
    """Return what a removal does to an entry on which no other claim is left."""
    if not entry.outlives:
        return "remove"
    return "undo" if undo else "keep"


def _stands(answer: Any) -> bool:
    if isinstance(answer, Exception) and not isinstance(answer, StoreUnavailable):
        raise answer
    return bool(answer)


def _formers(claim: Claim) -> Iterator[Claim]:
    """Yield the earlier claims that this claim replaces."""
    while claim.replaced is not None:
        claim = claim.replaced
        yield claim


def _pairs(answer: list[Any]) -> Iterator[tuple[str, str]]:
    """Return the fields and values of HRANDFIELD, which answers pairs or, in the older protocol, one flat list."""
    if answer and isinstance(answer[0], str):
        return zip(answer[::2], answer[1::2], strict=True)
    return ((field, value) for field, value in answer)
