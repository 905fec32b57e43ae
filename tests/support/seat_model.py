"""What the seat scripts must do to a seat map, in plain Python: contract, section 12.

A map is the seats that are taken, ``seat number → person``; all others of the lesson are free.
"""

from lesson_server.stores.redis.seats import Taking

SeatMap = dict[int, str]


def seat_of(seats: SeatMap, person: str) -> int:
    """The seat of a person, or 0. A person who has two has none that could be told."""
    held = [seat for seat, occupant in seats.items() if occupant == person]
    assert len(held) < 2, f"{person} has the seats {held}"
    return held[0] if held else 0


def take(seats: SeatMap, count: int, person: str, wanted: int | None) -> tuple[Taking, int]:
    """Gives a person a seat of a lesson that has so many.

    Returns:
        the outcome, and the person's seat; 0 if the person did not get one.
    """
    held = seat_of(seats, person)
    if not count:
        return Taking.NO_SEATS, 0
    if wanted is None:
        wanted = held or next((seat for seat in range(1, count + 1) if seat not in seats), 0)
        if not wanted:
            return Taking.FULL, 0
    if not 1 <= wanted <= count:
        return Taking.NO_SUCH_SEAT, 0
    if seats.get(wanted, person) != person:
        return Taking.HELD_BY_ANOTHER, 0
    if held == wanted:
        return Taking.HELD, held
    leave(seats, person)
    seats[wanted] = person
    return Taking.TAKEN, wanted


def leave(seats: SeatMap, person: str) -> int:
    """Frees the seat of a person; returns it, or 0."""
    seat = seat_of(seats, person)
    seats.pop(seat, None)
    return seat


def change(seats: SeatMap, seat: int, person: str | None) -> None:
    """Does to a map what one ``seat_changed`` tells.

    Raises:
        ValueError: the map does not change, or somebody would lose a seat of which nothing was told.
    """
    occupant = seats.get(seat)
    if (person is None) is (occupant is None):
        raise ValueError(f"seat {seat} is told to be {person or 'free'}, and was {occupant or 'free'} before")
    if person is None:
        del seats[seat]
    else:
        seats[seat] = person
