"""The model of the seats in test_presence_model.py: who has which seat, and until when. Contract, section 12."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import redis
import seat_model
from seat_model import SeatMap

from lesson_server.stores.redis import keys
from lesson_server.stores.redis.seat_deadlines import REPEAT_AFTER
from lesson_server.stores.redis.seats import Taking

Holder = tuple[str, str]  # lesson, person


class KeptSeats:
    """The seats of some lessons.

    As long as nothing is out of order, the seat maps are exactly those of the model. Whatever has happened, nobody who
    is there has lost a seat for good, and nobody who is gone keeps one for good.

    Args:
        client: of the Redis; decodes its answers.
        counts: lesson → the number of its seats.
        grace: in seconds.
    """

    def __init__(self, client: redis.Redis, counts: dict[str, int], grace: float) -> None:
        self._client: Any = client
        self._counts = counts
        self._grace = grace
        self._maps: dict[str, SeatMap] = {lesson_id: {} for lesson_id in counts}
        self._graces: dict[Holder, float] = {}  # of those who are gone: when the grace ends
        # The seat that each has been told to have; None: unknown. Of people with two connections in a lesson, one may
        # not know the seat that Redis loses (docs/faults.md).
        self._told: defaultdict[Holder, int | None] = defaultdict(int)
        self._doubled: set[Holder] = set()
        self.now = 0.0

    # What happens. With `exact`, nothing is out of order

    def joined(self, holder: Holder, seat: int, *, doubled: bool, exact: bool) -> None:
        """A person has joined, and has found a seat, or 0."""
        lesson_id, person = holder
        assert not exact or seat == seat_model.seat_of(self._maps[lesson_id], person)
        self._graces.pop(holder, None)
        self._told[holder] = seat
        if doubled:
            self._doubled.add(holder)

    def took(self, holder: Holder, wanted: int | None, answer: tuple[Taking, int], *, exact: bool) -> None:
        """A person has tried to take a seat."""
        lesson_id, person = holder
        if exact:
            assert answer == seat_model.take(self._maps[lesson_id], self._counts[lesson_id], person, wanted)
        outcome, seat = answer
        if outcome in (Taking.TAKEN, Taking.HELD):
            self._told[holder] = seat

    def left_seat(self, holder: Holder) -> None:
        lesson_id, person = holder
        seat_model.leave(self._maps[lesson_id], person)
        self._told[holder] = 0

    def unanswered(self, holder: Holder) -> None:
        """Nobody knows what has become of a person's last event."""
        self._told[holder] = None

    def gone(self, holder: Holder) -> None:
        """The last connection of a person in a lesson has ended."""
        self._graces[holder] = self.now + self._grace
        self._told.pop(holder, None)
        self._doubled.discard(holder)

    def swept(self) -> None:
        """A node has freed what is due."""
        for (lesson_id, person), end in list(self._graces.items()):
            if end <= self.now:
                seat_model.leave(self._maps[lesson_id], person)
                del self._graces[lesson_id, person]

    def rewound(self) -> None:
        """Redis has an older state: whoever changed the seat since then does not have what they were told."""
        self._told = defaultdict(int, dict.fromkeys(self._told))

    # Time. In place of a clock that goes on, the times in Redis go back

    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.age(seconds)

    def age(self, seconds: float) -> None:
        """Makes what is in Redis older."""
        milliseconds = round(seconds * 1000)
        for entry in self._client.zrange(keys.SEAT_DEADLINES, 0, -1):
            self._client.zincrby(keys.SEAT_DEADLINES, -milliseconds, entry)
        for lesson_id in self._counts:
            index = keys.seat_index(keys.seat_map(lesson_id))
            for person, value in self._client.hgetall(index).items():
                if person:
                    seat, due = value.split()
                    self._client.hset(index, person, f"{seat} {int(due) - milliseconds}")

    def longer_than_any_grace(self) -> float:
        """Seconds after which whatever waits in Redis is due, also what a node has begun to free and has not."""
        return self._grace + REPEAT_AFTER / 1000 + 1

    # What must be true

    def seat_map(self, lesson_id: str) -> SeatMap:
        """The seats of Redis that somebody has."""
        stored = self._client.hgetall(keys.seat_map(lesson_id))
        assert not stored or stored.keys() == {str(seat) for seat in range(1, self._counts[lesson_id] + 1)}
        seats = {int(seat): person for seat, person in stored.items() if person}
        assert len(set(seats.values())) == len(seats), f"somebody has two seats: {seats}"
        return seats

    def are_exact(self) -> None:
        assert {lesson_id: self.seat_map(lesson_id) for lesson_id in self._counts} == self._maps

    def nobody_has_lost_one(self, here: Collection[Holder]) -> None:
        """Who is there has a seat, unless somebody else has taken it when Redis did not know."""
        for lesson_id, person in here:
            told = self._told[lesson_id, person]
            seats = self.seat_map(lesson_id)
            if told and (lesson_id, person) not in self._doubled and person not in seats.values():
                assert told in seats, f"{person} has lost seat {told} of lesson {lesson_id}"

    def somebody_is_gone(self, here: Collection[Holder]) -> bool:
        """Whether Redis has a seat, or the memory of one, of somebody who is gone."""
        return any(self._known(lesson_id) - {"", *_people(here, lesson_id)} for lesson_id in self._counts)

    def nobody_keeps_one(self, here: Collection[Holder]) -> None:
        """Once every grace has ended, Redis knows nobody of those who are gone, and waits for nothing."""
        for lesson_id in self._counts:
            live = _people(here, lesson_id)
            assert set(self.seat_map(lesson_id).values()) <= live
            assert self._known(lesson_id) <= {"", *live}
        assert not self._client.zcard(keys.SEAT_DEADLINES)

    def _known(self, lesson_id: str) -> set[str]:
        return set(self._client.hkeys(keys.seat_index(keys.seat_map(lesson_id))))

    def are_in_order(self) -> None:
        """From now on, the model is what Redis has."""
        self._maps = {lesson_id: self.seat_map(lesson_id) for lesson_id in self._counts}
        self._graces.clear()


def _people(here: Collection[Holder], lesson_id: str) -> set[str]:
    return {person for lesson, person in here if lesson == lesson_id}
