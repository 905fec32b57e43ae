"""Redis: the seat map of a lesson, ``lesson_seat_{lesson_id}``: seat number → occupant, or "" for a free seat.

Every change of a map is one script (seat_scripts.py), which also publishes the change as ``seat_changed`` to the room
of the lesson. A person has one seat in a lesson at most.

A seat outlives the last connection of its holder by the grace. Each write that concerns a holder sets the time at which
the seat is due, and lists the holder in the deadlines (seat_deadlines.py), the list first. A node that finds the holder
absent from the lesson at that time frees the seat. So a seat whose holder is gone is freed, whatever has failed.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

from lesson_server.stores.redis import keys
from lesson_server.stores.redis.seat_deadlines import SeatDeadlines
from lesson_server.stores.redis.seat_scripts import (
    DEPART,
    ENSURE_SEAT_MAP,
    FREE,
    FREE_IF_UNCHANGED,
    LEAVE,
    READ_DUE,
    RESTORE,
    TAKE,
)
from lesson_server.stores.redis.store import LATE_WRITE, Command, Store


class Taking(StrEnum):
    """The outcome of an attempt to take a seat; the values are those of the script."""

    TAKEN = "taken"
    HELD = "held"  # the person has the seat already
    NO_SEATS = "no_seats"
    NO_SUCH_SEAT = "no_such_seat"
    HELD_BY_ANOTHER = "held_by_another"
    FULL = "full"


class Seats:
    """The seat maps in Redis.

    Args:
        store: the connection to Redis.
        retention: TTL in seconds of a seat map after the last join of its lesson (``presence.retention``).
        grace: seconds for which a seat outlives the last connection of its holder (``seats.grace``).
        observe: called with the kind of each change of a map: ``taken``, ``left``, ``freed``, ``restored``.
    """

    def __init__(
        self, store: Store, retention: int, grace: float, observe: Callable[[str], None] = lambda change: None
    ) -> None:
        self._store = store
        self._retention = retention
        self._grace = round(grace * 1000)
        # Of a seat that is taken, the deadline must not pass before Redis has executed the script.
        self._reminder = round(max(grace, LATE_WRITE) * 1000)
        self._observe = observe
        self.deadlines = SeatDeadlines(store)

    async def ensure_map(self, lesson_id: str, seat_count: int, client_id: str | None = None) -> int:
        """Create the seat map if there is none, and add the missing seats if the lesson has grown.

        One round trip, or none for a lesson without seats.

        Source: both diagrams, arrows 10 and 11.

        Returns:
            the seat that the person has; 0 for none, and without a person.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        if seat_count == 0:
            return 0
        (seat,) = await self._store.execute(
            ("EVAL", ENSURE_SEAT_MAP, 3, *self._keys(lesson_id), seat_count, self._retention, client_id or "")
        )
        return int(seat)

    async def take(self, lesson_id: str, client_id: str, seat: int | None, seat_count: int) -> tuple[Taking, int]:
        """Give a person a seat in place of the one that the person has, in one round trip.

        Source: contract, section 12.

        Args:
            lesson_id: the lesson.
            client_id: the person.
            seat: the number of the seat; None: the seat that the person has already, else the lowest free one.
            seat_count: the number of seats of the lesson.

        Returns:
            the outcome, and the person's seat; 0 if the person did not get one.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the seat may have been taken nevertheless.
        """
        wanted = "" if seat is None else seat
        _, (outcome, taken) = await self._store.execute(
            self.deadlines.addition(lesson_id, client_id, self._reminder),
            self._script(TAKE, lesson_id, client_id, wanted, seat_count),
        )
        if outcome == Taking.TAKEN:
            self._observe("taken")
        return Taking(outcome), taken

    async def leave(self, lesson_id: str, client_id: str) -> None:
        """Free the seat of a person in a lesson, if the person has one.

        Source: contract, section 12.

        Raises:
            StoreUnavailable: Redis failed or was too slow; the seat may be free nevertheless.
        """
        (seat,) = await self._store.execute(self._script(LEAVE, lesson_id, client_id))
        if seat:
            self._observe("left")

    async def restore(self, lesson_id: str, client_id: str, seat: int) -> int:
        """Give a person the seat again that Redis has lost.

        Args:
            lesson_id: the lesson.
            client_id: the person.
            seat: the seat that the person had.

        Returns:
            the seat that the person has; 0 if the person has left it, or if somebody else has it meanwhile.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        _, restored = await self._store.execute(
            self.deadlines.addition(lesson_id, client_id, self._reminder),
            self._script(RESTORE, lesson_id, client_id, seat),
        )
        if restored:
            self._observe("restored")
        return int(restored)

    async def free(self, lesson_id: str, client_id: str) -> None:
        """Free every seat of a person who is removed from a lesson.

        Source: contract, section 10.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        (count,) = await self._store.execute(self._script(FREE, lesson_id, client_id))
        for _ in range(count):
            self._observe("freed")

    async def missing(self, lesson_ids: Sequence[str]) -> list[str]:
        """Return the lessons without a seat map, and renew the TTLs of the other seat maps, in one round trip.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        all_keys = [key for lesson_id in lesson_ids for key in self._keys(lesson_id)]
        answers = await self._store.execute(*(("EXPIRE", key, self._retention) for key in all_keys))
        return [lesson_id for lesson_id, exists in zip(lesson_ids, answers[::3], strict=True) if not exists]

    async def lost(self, holders: Mapping[str, tuple[str, str]]) -> list[str]:
        """Return the connections of people whose seats Redis does not know any more, in one round trip.

        Args:
            holders: the connections of people who have a seat: sid → the lesson and the ``client_id``.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        indexes = ((self._keys(lesson_id)[1], client_id) for lesson_id, client_id in holders.values())
        known = await self._store.execute(*(("HEXISTS", *entry) for entry in indexes))
        return [sid for sid, is_known in zip(holders, known, strict=True) if not is_known]

    # The grace

    def departure(self, lesson_id: str, client_id: str) -> Command:
        """Return the command that begins the grace of a person's seat; its answer is whether Redis knows the person."""
        _, index_key, _ = self._keys(lesson_id)
        return ("EVAL", DEPART, 1, index_key, client_id, self._grace)

    async def list_departure(self, lesson_id: str, client_id: str) -> None:
        """List a person whose grace has begun in the deadlines.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        await self._store.execute(self.deadlines.addition(lesson_id, client_id, self._grace))

    async def sweep(self) -> int:
        """Free the seats that are due, and whose holders are not in their lessons.

        Any node may sweep, also several at once. A seat that a node has begun to sweep is not swept by another for a
        while.

        Returns:
            the number of deadlines that were due.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        return await self.deadlines.sweep(self._free_if_due)

    async def _free_if_due(self, lesson_id: str, client_id: str) -> int:
        """Free a person's seat if it is due, and the person is not in the lesson.

        Returns:
            the milliseconds until the seat is due; 0 when there is nothing more to do.
        """
        _, index_key, _ = self._keys(lesson_id)
        ((known, remaining),) = await self._store.execute(("EVAL", READ_DUE, 1, index_key, client_id))
        if not known or remaining > 0:
            return int(remaining)
        # A departure changes the index before the presence is removed. So if the person is absent, and the index is
        # still unchanged when the seat is freed, the person has been absent since before the seat was due.
        students = self._store.key(keys.students(lesson_id))
        (is_present,) = await self._store.execute(("HEXISTS", students, client_id))
        if is_present:
            return 0
        (seat,) = await self._store.execute(self._script(FREE_IF_UNCHANGED, lesson_id, client_id, known))
        if seat > 0:
            self._observe("freed")
        # A change need not be listed: a departure may have come to Redis late, after that of its retry was listed.
        return 1 if seat < 0 else 0

    # Commands

    def _keys(self, lesson_id: str) -> tuple[str, str, str]:
        """Return the keys of a lesson's seat map, of its index and of its freed seats."""
        map_key = self._store.key(keys.seat_map(lesson_id))
        return map_key, self._store.key(keys.seat_index(map_key)), self._store.key(keys.freed_seats(map_key))

    def _script(self, script: str, lesson_id: str, *arguments: str | int) -> Command:
        all_keys = self._keys(lesson_id)
        channel = self._store.key(keys.room(all_keys[0]))
        return ("EVAL", script, 3, *all_keys, channel, lesson_id, self._retention, self._grace, *arguments)
