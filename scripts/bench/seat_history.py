"""The check of a history of seats: what people attempted, what they were answered, and the changes that they saw.

Redis makes each attempt one atomic step, and publishes the changes in the order in which it makes them. So a history is
right if each attempt has a *place* in the order of the changes:

* an attempt that has changed the map has the place of its changes. The answers of a person, whose attempts follow one
  another, determine the person's changes. So each change must be the next one of exactly one person;
* any other attempt has a place between its start and its end at which its answer was true. If a person was told that
  the lesson is full, all seats were taken at one of these places.

The places between the start and the end of an attempt are known by the clock of the clients: a change that a client
had seen, or whose attempt had been answered, before the start comes before the attempt; a change whose attempt began
after the end comes after it.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

# What an attempt may want instead of the number of a seat.
ANY, LEAVE = 0, -1

FULL = "the lesson is full"


def taken(seat: int) -> str:
    """Return the refusal of a seat that somebody else has."""
    return f"seat {seat} is taken"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a person; the attempts of one person follow one another.

    Attributes:
        person: the person.
        wanted: the number of a seat, ANY or LEAVE.
        began: when the attempt was sent.
        ended: when its answer was read.
        seat: the seat in the answer; 0: none.
        refusal: the message of the refusal; empty: none.
    """

    person: str
    wanted: int
    began: float
    ended: float
    seat: int
    refusal: str


class Change(NamedTuple):
    """One change of the map: a person takes a seat, or a seat becomes free; and when the first client saw it."""

    seat: int
    person: str | None
    seen: float


class WrongHistory(Exception):
    """No order of the attempts explains the history; the message says what is wrong."""


SeatMap = tuple[str | None, ...]  # the holder of each seat; the first element is unused


def check_history(attempts: Sequence[Attempt], changes: Sequence[Change], seat_count: int) -> dict[int, str]:
    """Check a history that begins with an empty map.

    Returns:
        the seats that are taken at the end, each with its holder.

    Raises:
        WrongHistory: the history is wrong.
    """
    maps, actors = _replay(changes, seat_count)
    makers = _find_makers(attempts, changes, actors)
    _check_moves(makers)
    _check_order(makers, changes)
    _check_answers(attempts, makers, changes, maps)
    return _taken_seats(maps[-1])


def check_changes(changes: Sequence[Change], seat_count: int) -> dict[int, str]:
    """Check only that no seat ever has two holders, and that no person ever has two seats.

    Returns:
        the seats that are taken at the end, each with its holder.

    Raises:
        WrongHistory: the changes are wrong.
    """
    maps, _ = _replay(changes, seat_count)
    return _taken_seats(maps[-1])


def _taken_seats(seats: SeatMap) -> dict[int, str]:
    return {seat: person for seat, person in enumerate(seats) if person is not None}


def _replay(changes: Sequence[Change], seat_count: int) -> tuple[list[SeatMap], list[str]]:
    """Return the map before each change and after the last one, and the person who made each change."""
    seats: list[str | None] = [None] * (seat_count + 1)
    seat_of: dict[str, int] = {}
    maps, actors = [tuple(seats)], []
    for position, (seat, person, _) in enumerate(changes):
        holder = seats[seat]
        if person is None:
            if holder is None:
                raise WrongHistory(f"change {position}: seat {seat} becomes free, and was free")
            del seat_of[holder]
        else:
            if holder is not None:
                raise WrongHistory(f"change {position}: {person} takes seat {seat}, which {holder} has")
            if person in seat_of:
                raise WrongHistory(f"change {position}: {person} takes seat {seat}, and has seat {seat_of[person]}")
            seat_of[person] = seat
        seats[seat] = person
        actor = person or holder
        assert actor is not None
        actors.append(actor)
        maps.append(tuple(seats))
    return maps, actors


def _find_makers(attempts: Sequence[Attempt], changes: Sequence[Change], actors: Sequence[str]) -> list[Attempt]:
    """Return the attempt that made each change."""
    expected: defaultdict[str, list[tuple[int, str | None, Attempt]]] = defaultdict(list)
    held: defaultdict[str, int] = defaultdict(int)
    for attempt in sorted(attempts, key=lambda attempt: attempt.began):
        held[attempt.person] = _expect(attempt, held[attempt.person], expected[attempt.person])
    makers = []
    next_of: defaultdict[str, int] = defaultdict(int)
    for position, ((seat, person, _), actor) in enumerate(zip(changes, actors, strict=True)):
        rest = expected[actor][next_of[actor] :][:1]
        if not rest or rest[0][:2] != (seat, person):
            raise WrongHistory(f"change {position}: seat {seat} → {person}, but {actor} should make {rest or 'none'}")
        next_of[actor] += 1
        makers.append(rest[0][2])
    for person, own in expected.items():
        if len(own) > next_of[person]:
            raise WrongHistory(f"{own[next_of[person]]} was answered, and the change was not published")
    return makers


def _expect(attempt: Attempt, held: int, changes: list[tuple[int, str | None, Attempt]]) -> int:
    """Add the changes that an attempt made, according to its answer, and return the seat that the person has then."""
    wanted, seat = attempt.wanted, attempt.seat
    if attempt.refusal:
        is_possible = (
            attempt.refusal == FULL and held == 0
            if wanted == ANY
            else wanted != LEAVE and attempt.refusal == taken(wanted) and held != wanted
        )
        seat = held
    else:
        is_possible = seat == 0 if wanted == LEAVE else seat == (wanted or held or seat) != 0
    if not is_possible:
        raise WrongHistory(f"the person has seat {held}, and the answer is impossible: {attempt}")
    if held != seat:
        if held:
            changes.append((held, None, attempt))
        if seat:
            changes.append((seat, attempt.person, attempt))
    return seat


def _check_moves(makers: Sequence[Attempt]) -> None:
    """Check that no other change is between the two changes of a move."""
    positions: defaultdict[int, list[int]] = defaultdict(list)
    for position, maker in enumerate(makers):
        positions[id(maker)].append(position)
    for first, *others in positions.values():
        if others not in ([], [first + 1]):
            raise WrongHistory(f"changes {first} and {others} are one move: {makers[first]}")


def _check_order(makers: Sequence[Attempt], changes: Sequence[Change]) -> None:
    """Check that no change comes after a change that was attempted when the former one had been answered."""
    for position, (earliest, known) in enumerate(zip(_earliest(makers), _known(makers, changes), strict=True)):
        if earliest > known:
            raise WrongHistory(f"change {position} had happened before an earlier one was attempted")


def _earliest(makers: Sequence[Attempt]) -> list[float]:
    """Return for each change a time before which it has not happened."""
    return list(accumulate((maker.began for maker in makers), max))


def _known(makers: Sequence[Attempt], changes: Sequence[Change]) -> list[float]:
    """Return for each change a time at which it has happened."""
    own = [min(maker.ended, change.seen) for maker, change in zip(makers, changes, strict=True)]
    return list(accumulate(reversed(own), min))[::-1]


def _check_answers(
    attempts: Sequence[Attempt], makers: Sequence[Attempt], changes: Sequence[Change], maps: Sequence[SeatMap]
) -> None:
    """Check the lowest free seat of each attempt without a number, and that each refusal was true at one place."""
    earliest, known = _earliest(makers), _known(makers, changes)
    free = [[seat for seat in range(1, len(seats)) if seats[seat] is None] for seats in maps]
    for position, maker in enumerate(makers):
        if maker.wanted == ANY and maker.seat != free[position][0]:
            raise WrongHistory(f"change {position}: seat {free[position][0]} was free: {maker}")
    for attempt in attempts:
        if attempt.refusal:
            first = bisect_left(known, attempt.began)
            last = bisect_right(earliest, attempt.ended)
            places = range(first, last + 1)  # a place inside a move makes no refusal true
            if attempt.refusal == FULL:
                is_true = any(not free[place] for place in places)
            else:
                is_true = any(maps[place][attempt.wanted] not in (None, attempt.person) for place in places)
            if not is_true:
                raise WrongHistory(f"at none of the places {first} to {last}, this answer was true: {attempt}")
