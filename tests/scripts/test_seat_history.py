"""seat_history.py: a right history passes, and each kind of wrong one is recognised."""

import pytest
from seat_history import ANY, FULL, LEAVE, Attempt, Change, WrongHistory, check_changes, check_history, taken

SEATS = 2

# A history: the attempts as (person, wanted, began, ended, seat or refusal), and the changes as (seat, person, seen).
ANN_TAKES_1 = ("ann", ANY, 0, 1, 1)
BEN_TAKES_2 = ("ben", ANY, 2, 3, 2)
ANN_IN_1, BEN_IN_2 = (1, "ann", 1), (2, "ben", 3)


def history(attempts, changes):
    made = [
        Attempt(person, wanted, began, ended, *((0, answer) if isinstance(answer, str) else (answer, "")))
        for person, wanted, began, ended, answer in attempts
    ]
    return made, [Change(*change) for change in changes]


RIGHT = {
    "two seats": ([ANN_TAKES_1, BEN_TAKES_2], [ANN_IN_1, BEN_IN_2]),
    "the seat that the person has": ([ANN_TAKES_1, ("ann", ANY, 2, 3, 1), ("ann", 1, 4, 5, 1)], [ANN_IN_1]),
    "a move": ([ANN_TAKES_1, ("ann", 2, 2, 3, 2)], [ANN_IN_1, (1, None, 3), (2, "ann", 3)]),
    "left twice": ([ANN_TAKES_1, ("ann", LEAVE, 2, 3, 0), ("ann", LEAVE, 4, 5, 0)], [ANN_IN_1, (1, None, 3)]),
    "full": ([ANN_TAKES_1, BEN_TAKES_2, ("eve", ANY, 4, 5, FULL)], [ANN_IN_1, BEN_IN_2]),
    "full while a change is under way": (
        [ANN_TAKES_1, BEN_TAKES_2, ("ann", LEAVE, 4, 9, 0), ("eve", ANY, 5, 6, FULL)],
        [ANN_IN_1, BEN_IN_2, (1, None, 7)],
    ),
    "taken": ([ANN_TAKES_1, ("eve", 1, 4, 5, taken(1))], [ANN_IN_1]),
    "attempts at once, in the other order": (
        [("ann", ANY, 0, 9, 2), ("ben", ANY, 1, 8, 1)],
        [(1, "ben", 9), (2, "ann", 9)],
    ),
}

WRONG = {
    "two holders": ([ANN_TAKES_1, ("ben", 1, 2, 3, 1)], [ANN_IN_1, (1, "ben", 3)], "which ann has"),
    "two seats": ([ANN_TAKES_1, ("ann", 2, 2, 3, 2)], [ANN_IN_1, (2, "ann", 3)], "and has seat 1"),
    "published twice": ([ANN_TAKES_1], [ANN_IN_1, ANN_IN_1], "which ann has"),
    "freed twice": (
        [ANN_TAKES_1, ("ann", LEAVE, 2, 3, 0)],
        [ANN_IN_1, (1, None, 3), (1, None, 3)],
        "becomes free, and was free",
    ),
    "not published": ([ANN_TAKES_1, BEN_TAKES_2], [ANN_IN_1], "was not published"),
    "never attempted": ([ANN_TAKES_1], [ANN_IN_1, BEN_IN_2], "ben should make none"),
    "another seat than answered": ([("ann", ANY, 0, 1, 2)], [ANN_IN_1], "ann should make"),
    "a move in two steps": (
        [ANN_TAKES_1, ("ann", 2, 2, 6, 2), ("ben", 1, 3, 5, 1)],
        [ANN_IN_1, (1, None, 4), (1, "ben", 4), (2, "ann", 6)],
        "are one move",
    ),
    "before an earlier change was attempted": (
        [("ann", 1, 4, 5, 1), ("ben", 2, 0, 1, 2)],
        [(1, "ann", 5), (2, "ben", 5)],
        "before an earlier one was attempted",
    ),
    "seen before an earlier change was attempted": (
        [("ann", 1, 4, 5, 1), ("ben", 2, 0, 9, 2)],
        [(1, "ann", 5), (2, "ben", 2)],
        "before an earlier one was attempted",
    ),
    "not the lowest": ([("ann", ANY, 0, 1, 2)], [(2, "ann", 1)], "seat 1 was free"),
    "full while a seat is free": ([ANN_TAKES_1, ("eve", ANY, 4, 5, FULL)], [ANN_IN_1], "this answer was true"),
    "full before it was full": (
        [ANN_TAKES_1, ("eve", ANY, 2, 3, FULL), ("ben", ANY, 4, 5, 2)],
        [ANN_IN_1, (2, "ben", 5)],
        "this answer was true",
    ),
    "full when it is full no more": (
        [ANN_TAKES_1, BEN_TAKES_2, ("ben", LEAVE, 4, 5, 0), ("eve", ANY, 6, 7, FULL)],
        [ANN_IN_1, BEN_IN_2, (2, None, 5)],
        "this answer was true",
    ),
    "taken while it is free": ([ANN_TAKES_1, ("eve", 2, 4, 5, taken(2))], [ANN_IN_1], "this answer was true"),
    "full, with a seat": ([ANN_TAKES_1, ("ann", ANY, 2, 3, FULL)], [ANN_IN_1], "the answer is impossible"),
    "the own seat is taken": ([ANN_TAKES_1, ("ann", 1, 2, 3, taken(1))], [ANN_IN_1], "the answer is impossible"),
    "another seat than wanted": ([("ann", 2, 0, 1, 1)], [ANN_IN_1], "the answer is impossible"),
    "a second seat without a number": ([ANN_TAKES_1, ("ann", ANY, 2, 3, 2)], [ANN_IN_1], "the answer is impossible"),
    "no seat": ([("ann", ANY, 0, 1, 0)], [], "the answer is impossible"),
    "another refusal": ([("ann", ANY, 0, 1, "internal error")], [], "the answer is impossible"),
    "refused to leave": ([("ann", LEAVE, 0, 1, "internal error")], [], "the answer is impossible"),
}


@pytest.mark.parametrize(("attempts", "changes"), RIGHT.values(), ids=RIGHT)
def test_a_right_history_passes(attempts, changes):
    made, seen = history(attempts, changes)
    assert check_history(made, seen, SEATS) == check_changes(seen, SEATS)


@pytest.mark.parametrize(("attempts", "changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_history_is_recognised(attempts, changes, message):
    made, seen = history(attempts, changes)
    with pytest.raises(WrongHistory, match=message):
        check_history(made, seen, SEATS)


def test_the_holders_at_the_end_are_returned():
    made, changes = history([ANN_TAKES_1, BEN_TAKES_2], [ANN_IN_1, BEN_IN_2])
    assert check_history(made, changes, SEATS) == {1: "ann", 2: "ben"}
