"""Redis: who is in which lesson, by which sid.

A connection's record becomes entries in Redis (records.py), on which the connection holds a claim (claims.py). When the
connection ends, the claim is removed (removals.py).
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis.claims import Claim, Claims
from lesson_server.stores.redis.records import Record
from lesson_server.stores.redis.removals import Removals
from lesson_server.stores.redis.store import Store


class Presence:
    """The presence records of a node's connections in Redis.

    Args:
        store: the connection to Redis.
        claims: the claims of this node.
        removals: the removals of these claims.
    """

    def __init__(self, store: Store, claims: Claims, removals: Removals) -> None:
        self._store = store
        self.claims = claims
        self.removals = removals
        self._held: dict[str, Claim] = {}  # sid → the claim of that connection

    async def write(self, record: Record) -> bool:
        """Write the record of a connection, in one round trip.

        Source: Teacher App diagram, arrows 12 and 13; Participant diagram, the arrows after 11.

        Returns:
            whether this is a reconnect: the participant was known under another sid before.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the record may have been written nevertheless.
        """
        claim = self._held[record.sid] = self.claims.new(record)
        answers = await self.claims.write(claim)
        claim.order = max(order for order, _ in answers)
        return any(known for _, known in answers)

    async def restore(self, record: Record) -> None:
        """Write a record again that Redis has lost; newer connections of the same person keep precedence.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        claim = self._held[record.sid]
        if claim.incarnation is not self.claims.incarnation:
            replaced, claim = claim, self.claims.new(record)
            claim.order, claim.replaced = replaced.order, replaced
            self._held[record.sid] = claim
        await self.claims.restore(claim)
        claim.replaced = None

    async def remove(self, sid: str, *, undo: bool = False) -> None:
        """Remove what was written for this sid, at once or as soon as Redis answers.

        Never raises StoreUnavailable.

        Args:
            sid: of a connection that has, or may have, written its record; for any other sid, nothing is removed.
            undo: whether the join has failed: ``{client_id}`` is then restored to its state before the join. When a
                connection ends without undo, ``{client_id}`` stays for its 24 h.
        """
        claim = self._held.pop(sid, None)
        if claim is not None:
            await self.removals.remove(claim, undo=undo)

    async def check(self, sids: Sequence[str]) -> list[str]:
        """Return the sids whose records in Redis are missing or wrong, in one round trip.

        The TTLs of correct records are renewed. If Redis did not answer for a record, the record counts as correct:
        another check follows each failure of Redis.
        """
        held = [(sid, claim) for sid in sids if (claim := self._held.get(sid)) and self._is_current(claim)]
        if not held:
            return list(sids)
        checks = {sid: self.claims.checks(claim) for sid, claim in held}
        listing = self.claims.listing(claim for _, claim in held)
        _, *found = await self._store.execute(bookkeeping=(listing, *chain.from_iterable(checks.values())))
        answers = iter(found)
        correct = {
            sid for sid, commands in checks.items() if all(map(_is_correct, list(islice(answers, len(commands)))))
        }
        return [sid for sid in sids if sid not in correct]

    def _is_current(self, claim: Claim) -> bool:
        return claim.incarnation is self.claims.incarnation and claim.replaced is None


def _is_correct(answer: Any) -> bool:
    if isinstance(answer, Exception) and not isinstance(answer, StoreUnavailable):
        raise answer
    return bool(answer)
