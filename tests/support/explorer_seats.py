"""What happens to the seats of an explored world, and what must be true of them at any time. See explorer.py.

A :class:`SeatWatch` sees each command that is carried out, and hears what is published on the channels of the lessons,
as a node does. So it knows what each script found, and says what the script must do and tell (seat_model.py):

* a seat is given to one person at a time, and a person has one at most; whoever is refused a seat is refused rightly;
* what is told, applied in order to a map in which all seats are free, is the map: each change once, in order;
* a seat whose holder is gone is freed after the grace, and that of anybody else is not;
* a seat that Redis has lost is given again to its holder, and to nobody who has given it up;
* the seat map, its index, and its freed seats agree.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
import seat_model
from explorer_choices import Footprint, Touch
from explorer_clock import RedisClock
from explorer_scenarios import Scenario
from seat_model import SeatMap

from lesson_server.stores.redis import keys
from lesson_server.stores.redis import seats as seats_module
from lesson_server.stores.redis.seats import Taking
from lesson_server.stores.redis.store import Command

# A seat map, its index and its freed seats, in one round trip.
LOOK = """
return {
    redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]), redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES')
}
"""


class Violation(Exception):
    """A rule does not hold."""


class Listener:
    """A subscriber of what is told of the seats of some lessons."""

    MARK = "the explorer listens"  # a channel

    def __init__(self, client: redis.Redis, lesson_ids: Sequence[str]) -> None:
        self._client = client
        self._pubsub: Any = client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.ssubscribe(*(keys.room(keys.seat_map(lesson_id)) for lesson_id in lesson_ids))
        self._pubsub.subscribe(self.MARK)
        self._pubsub.get_message(timeout=5)
        self.read()

    def read(self) -> list[str]:
        """What has been told since the last time: what comes before a mark that is published now."""
        self._client.publish(self.MARK, "")
        told = []
        while True:
            message = self._pubsub.parse_response(timeout=5)
            kind, channel, data = message
            if channel == self.MARK and kind == "message":
                return told
            if kind == "smessage":
                told.append(data)

    def close(self) -> None:
        self._pubsub.close()


@contextmanager
def listening(client: redis.Redis, scenario: Scenario) -> Iterator[Listener]:
    """Subscribes to the lessons of a scenario."""
    listener = Listener(client, sorted({tab.lesson_id for tab in scenario.tabs}))
    try:
        yield listener
    finally:
        listener.close()


class SeatWatch:
    """The seats of one world.

    Args:
        client: of the Redis.
        clock: of the Redis.
        scenario: what happens.
        listener: to what is told of the seats.

    Attributes:
        maps: lesson → its seats, by what has been told since Redis was empty.
        told: the same, by all that has been told to the person: what a client that was there all the time shows.
        outcomes: event → what the last attempt to take a seat that it has made came to.
        lost: of the seats that FLUSHALL has taken, those that nobody has taken, moved from or left since.
        joined_before: the tabs that had written their presence before FLUSHALL.
    """

    def __init__(self, client: redis.Redis, clock: RedisClock, scenario: Scenario, listener: Listener) -> None:
        self._client = client
        self._clock = clock
        self._scenario = scenario
        self._listener = listener
        lesson_ids = {tab.lesson_id for tab in scenario.tabs}
        self._lessons = {keys.students(lesson_id): lesson_id for lesson_id in lesson_ids}
        self.maps: dict[str, SeatMap] = {lesson_id: {} for lesson_id in lesson_ids}
        self.told: dict[str, SeatMap] = {lesson_id: {} for lesson_id in lesson_ids}
        self.outcomes: dict[str, tuple[Taking, int]] = {}
        self.lost: dict[str, SeatMap] = {}
        self.joined_before: set[str] = set()
        # Who is in which lesson by Redis, when they last came and went, and when they last asked for a seat.
        self._here: set[tuple[str, str]] = set()
        self._came: dict[tuple[str, str], int] = {}
        self._went: dict[tuple[str, str], int] = {}
        self._asked: dict[tuple[str, str], int] = {}
        self._given_up: set[tuple[str, str, int]] = set()  # lesson, person, seat

    # What happens

    def forget(self, joined: set[str]) -> None:
        """FLUSHALL."""
        self.joined_before = joined
        self.lost = {lesson_id: dict(seats) for lesson_id, seats in self.maps.items()}
        for lesson_id, seats in self.maps.items():
            for person in seats.values():
                if (lesson_id, person) not in self._here:  # nobody is told that a seat in its grace is free
                    seat_model.leave(self.told[lesson_id], person)
            seats.clear()
        self._went |= dict.fromkeys(self._here, self._clock.now())
        self._here.clear()

    def sees(self, command: Command) -> Footprint:
        """What a rule reads when a command is carried out, besides what the command touches."""
        if command[:2] == ("EVAL", vars(seats_module)["FREE_IF_UNCHANGED"]):
            return (Touch(("key", keys.students(str(command[7]))), writes=False),)
        return ()

    def observe(self, origin: str, script: str, command: Command, answer: Any) -> None:
        """Notes what has been carried out.

        Raises:
            Violation: a script has done or told something else than it must.
        """
        module, _, name = script.partition(".")
        if module == "presence" and name != "CHECK" and command[3] in self._lessons:
            claim: Any = command[5]
            self._note_presence(self._lessons[str(command[3])], json.loads(claim)[1])
        elif module == "seats" and name in ("TAKE", "LEAVE", "RESTORE", "FREE_IF_UNCHANGED"):
            lesson_id, person, *words = map(str, (command[7], *command[10:]))
            expected = dict(self.maps[lesson_id])
            before = dict(expected)
            if name == "TAKE":
                self._take(origin, lesson_id, expected, person, words, answer)
            elif name == "LEAVE":
                self._leave(lesson_id, expected, person, answer)
            elif name == "RESTORE":
                self._restore(lesson_id, expected, person, int(words[0]), answer)
            else:
                self._free(lesson_id, expected, person, answer)
            self._hear()
            if self.maps[lesson_id] != expected:
                raise Violation(f"{script} has told {before} → {self.maps[lesson_id]}, and should tell {expected}")

    def _take(
        self, origin: str, lesson_id: str, seats: SeatMap, person: str, words: list[str], answer: list[Any]
    ) -> None:
        wanted = int(words[0]) if words[0] else None
        held = seat_model.seat_of(seats, person)
        outcome = seat_model.take(seats, self._scenario.seat_count, person, wanted)
        if tuple(answer) != outcome:
            raise Violation(f"{origin} came to {answer}, and should come to {outcome}: the seats were {seats}")
        self.outcomes[origin] = outcome
        _, seat = outcome
        if seat:
            self._asked[lesson_id, person] = self._clock.now()
            self._given_up.discard((lesson_id, person, seat))
            if held not in (0, seat):
                self._given_up.add((lesson_id, person, held))
            lost = self.lost.get(lesson_id, {})
            seat_model.leave(lost, person)
            lost.pop(seat, None)

    def _leave(self, lesson_id: str, seats: SeatMap, person: str, answer: int) -> None:
        seat = seat_model.leave(seats, person)
        if answer != seat:
            raise Violation(f"{person} has left seat {answer}, and had {seat}")
        # Of a seat that Redis has lost meanwhile, nobody is told but the person.
        seat = seat or seat_model.leave(self.told[lesson_id], person)
        if seat:
            self._given_up.add((lesson_id, person, seat))
        seat_model.leave(self.lost.get(lesson_id, {}), person)

    def _restore(self, lesson_id: str, seats: SeatMap, person: str, seat: int, answer: int) -> None:
        held = seat_model.seat_of(seats, person)
        if answer not in (0, held or seat):
            raise Violation(f"{person} got seat {answer} again, and had {held or seat}")
        if answer and not held:
            if seats.get(seat):
                raise Violation(f"{person} got seat {seat} again, which is {seats[seat]}'s")
            if (lesson_id, person, seat) in self._given_up:
                raise Violation(f"{person} got seat {seat} again, and had given it up")
            seats[seat] = person
        elif not held and seat not in seats and not any(who[:2] == (lesson_id, person) for who in self._given_up):
            raise Violation(f"{person} did not get seat {seat} again, which is free")
        if answer:
            self._asked[lesson_id, person] = self._clock.now()

    def _free(self, lesson_id: str, seats: SeatMap, person: str, answer: int) -> None:
        if answer < 1:
            return
        seat = seat_model.leave(seats, person)
        if answer != seat:
            raise Violation(f"seat {answer} of {person} is freed, who had {seat}")
        # A person may come back while the node that has found the person absent frees the seat.
        who = lesson_id, person
        since = max(self._went.get(who, 0), self._asked[who])
        until = self._came[who] if who in self._here else self._clock.now()
        # On a cluster a departure may be known later than the absence; see Seats.
        grace = 0 if self._scenario.cluster else self._scenario.grace * 1_000_000
        if until - since < grace:
            raise Violation(f"seat {seat} of {person} is freed after {until - since} µs of absence")

    def _note_presence(self, lesson_id: str, person: str) -> None:
        who = lesson_id, person
        is_here = self._client.hexists(keys.students(lesson_id), person)
        if is_here and who not in self._here:
            self._here.add(who)
            self._came[who] = self._clock.now()
        elif not is_here and who in self._here:
            self._here.remove(who)
            self._went[who] = self._clock.now()

    def _hear(self) -> None:
        """Notes what is told."""
        for text in self._listener.read():
            message = json.loads(text)
            (data,) = message.pop("data")
            lesson_id = message.pop("room")
            if message != {"method": "emit", "event": "seat_changed", "namespace": "/"}:
                raise Violation(f"{text} was published")
            seat, person = data["seat"], data["client_id"]
            try:
                seat_model.change(self.maps[lesson_id], seat, person)
            except ValueError as error:
                raise Violation(f"lesson {lesson_id}: {error}") from None
            told = self.told[lesson_id]
            told.pop(seat, None)
            if person is not None:
                seat_model.leave(told, person)
                told[seat] = person

    # What must be true at any time

    def check(self) -> None:
        """Compares what has been told with the maps, the indexes and the freed seats.

        Raises:
            Violation: they differ.
        """
        for lesson_id, seats in self.maps.items():
            key = keys.seat_map(lesson_id)
            found: Any = self._client.eval(LOOK, 3, key, keys.seat_index(key), keys.freed_seats(key))
            stored, index, freed = (dict(zip(words[::2], words[1::2], strict=True)) for words in found)
            occupied = {int(seat): person for seat, person in stored.items() if person}
            if occupied != seats:
                raise Violation(f"lesson {lesson_id}: the map is {occupied}, and what was told comes to {seats}")
            mark = int(index.pop("", "0 0").split()[0])
            seated = {int(value.split()[0]): person for person, value in index.items() if not value.startswith("0 ")}
            if seated != seats:
                raise Violation(f"lesson {lesson_id}: the index is {index}, and the map {seats}")
            free = {int(seat) for seat, person in stored.items() if not person and int(seat) <= mark}
            if set(map(int, freed)) != free:
                raise Violation(f"lesson {lesson_id}: up to {mark} the free seats are {free}, and listed {freed}")
