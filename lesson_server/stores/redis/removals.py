"""Removals of claims: at once, again if Redis did not answer, and on behalf of lost nodes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from itertools import groupby
from operator import attrgetter
from typing import Any

from lesson_server.errors import StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.stores.redis.claims import Claim, Claims
from lesson_server.stores.redis.records import decode
from lesson_server.stores.redis.store import LATE_WRITE, Command, Store

logger = EventLogger(__name__)

# Seconds that a removal may delay an answer; after that, the removal is retried in the background.
REMOVAL_PATIENCE = 0.5
# Seconds between two attempts at a removal that Redis has not answered.
RETRY_INTERVAL = 1.0
# Seconds for which removed claims are collected, before one command deletes them from the index. No caller waits.
UNINDEX_INTERVAL = 0.1
# Maximum number of records that are removed concurrently, and of index entries read in one round trip.
BATCH_SIZE = 100


class Removals:
    """The removals of claims by one node.

    A removal that Redis does not answer is *pending*: it is retried until Redis answers.

    Args:
        store: the connection to Redis.
        claims: the claims of this node.

    Attributes:
        on_removed: called with a node id and the number of claims in its index that this node has removed. A claim that
            several nodes have removed at the same time is counted by one of them.
    """

    def __init__(self, store: Store, claims: Claims) -> None:
        self._store = store
        self._claims = claims
        self._pending: list[tuple[Claim, bool]] = []
        self._removed: list[tuple[Claim, bool]] = []  # still to be deleted from the index
        self._cleaner: asyncio.Task[None] | None = None
        self.on_removed: Callable[[str, int], None] = lambda node_id, count: None

    async def remove(self, claim: Claim, *, undo: bool) -> None:
        """Remove a claim and its predecessors, at once or as soon as Redis answers.

        Never raises StoreUnavailable.

        Args:
            claim: of a connection that has ended, or whose join has failed.
            undo: whether the join has failed.
        """
        for each in (claim, *claim.predecessors()):
            try:
                async with asyncio.timeout(REMOVAL_PATIENCE):
                    await self._remove(each, undo)
            except (StoreUnavailable, TimeoutError):
                self._pending.append((each, undo))
            else:
                self._removed.append((each, undo))
        if self._cleaner is None:
            self._cleaner = asyncio.create_task(self._clean())

    async def strays(self) -> AsyncIterator[int]:
        """Remove the records in this node's index that belong to no connection: late writes of failed joins.

        Yields:
            after each round trip, the number of records that were removed for good.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        incarnation = self._claims.incarnation
        now = asyncio.get_running_loop().time()
        cursor: str | int = 0
        while True:
            ((cursor, entries),) = await self._store.execute(
                ("HSCAN", self._claims.index_key(incarnation.node_id), cursor, "COUNT", BATCH_SIZE)
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
        (answer,) = await self._store.execute(("HRANDFIELD", self._claims.index_key(node_id), BATCH_SIZE, "WITHVALUES"))
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

    async def _remove(self, claim: Claim, undo: bool) -> None:
        await self._claims.remove(claim.record, claim.incarnation.node_id, claim.number, undo=undo)

    async def _remove_entries(
        self, node_id: str, entries: dict[int, str], *, undo: bool, kept: Collection[int] = ()
    ) -> int:
        """Remove claims that were read from an index, and then delete them from the index, except ``kept``."""
        results = await asyncio.gather(
            *(self._claims.remove(decode(text), node_id, number, undo=undo) for number, text in entries.items()),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors and len(errors) == len(entries):
            raise errors[0]
        removed = [
            number for number, result in zip(entries, results, strict=True) if result is None and number not in kept
        ]
        if removed:
            (deleted,) = await self._store.execute(("HDEL", self._claims.index_key(node_id), *removed))
            self.on_removed(node_id, deleted)
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
                    await self._store.execute(("HLEN", self._claims.index_key(self._claims.incarnation.node_id)))
                    await self._retry_removals()
                continue
            except StoreUnavailable:
                pass  # the outage has been logged
            except Exception:
                logger.exception("removals_failed", "removals failed")
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
                commands: list[Command] = [("HDEL", self._claims.index_key(incarnation.node_id), *numbers)]
                if incarnation is self._claims.incarnation:  # counting for an earlier one would register it again
                    commands.append(("HINCRBY", self._claims.nodes_key, incarnation.node_id, 1))
                await self._store.execute(*commands)
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
                *(self._remove(claim, undo) for claim, undo in batch), return_exceptions=True
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


def _pairs(answer: list[Any]) -> Iterator[tuple[str, str]]:
    """Return the fields and values of HRANDFIELD, which answers pairs or, in the older protocol, one flat list."""
    if answer and isinstance(answer[0], str):
        return zip(answer[::2], answer[1::2], strict=True)
    return ((field, value) for field, value in answer)
