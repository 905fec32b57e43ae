"""places.py: however many come and say nothing, whoever has just come has time to say what it wants."""

import pytest

from lesson_server.errors import ServiceBusy
from lesson_server.protocol.places import Places


class Guest:
    """Has one of the places, until a newcomer needs it."""

    def __init__(self, places):
        self.is_gone = False
        self.place = places.take(self.give_way)

    def give_way(self):
        self.is_gone = True


def gone(guests):
    """The numbers of the guests that have given way."""
    return [number for number, guest in enumerate(guests) if guest.is_gone]


def test_there_are_no_more_than_the_limit_and_the_oldest_gives_way():
    places = Places(3)
    guests = [Guest(places) for _ in range(3)]
    assert (len(places), gone(guests)) == (3, [])
    guests += [Guest(places) for _ in range(2)]
    assert (len(places), gone(guests)) == (3, [0, 1])


def test_a_place_that_is_kept_is_no_newcomer_s():
    places = Places(3)
    guests = [Guest(places) for _ in range(3)]
    guests[0].place.keep()
    guests[1].place.keep()
    guests += [Guest(places) for _ in range(2)]
    assert (len(places), gone(guests)) == (3, [2, 3])


def test_a_place_that_is_released_comes_after_those_that_wait_already():
    places = Places(3)
    guests = [Guest(places) for _ in range(3)]
    guests[0].place.keep()
    guests[0].place.release()
    guests += [Guest(places) for _ in range(2)]
    assert gone(guests) == [1, 2]
    guests += [Guest(places)]
    assert gone(guests) == [0, 1, 2]


def test_when_all_states_are_kept_there_is_none():
    places = Places(2)
    guests = [Guest(places) for _ in range(2)]
    for guest in guests:
        guest.place.keep()
    with pytest.raises(ServiceBusy):
        Guest(places)
    assert (len(places), gone(guests)) == (2, [])
    guests[1].place.leave()
    Guest(places)
    assert len(places) == 2


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_place_that_has_been_left_is_left_for_good(is_kept):
    places = Places(2)
    guest = Guest(places)
    if is_kept:
        guest.place.keep()
    guest.place.leave()
    assert len(places) == 0
    for late in (guest.place.leave, guest.place.keep, guest.place.release, lambda: guest.place.hand_over(pytest.fail)):
        late()
        assert len(places) == 0


@pytest.mark.parametrize("is_kept", [False, True])
def test_of_a_place_that_was_handed_over_the_new_owner_gives_way(is_kept):
    places = Places(1)
    first = Guest(places)
    if is_kept:
        first.place.keep()
    handed_over = []
    first.place.hand_over(lambda: handed_over.append(True))
    first.place.release()
    Guest(places)
    assert handed_over == [True]
    assert not first.is_gone


def test_who_gives_way_may_say_so_itself():
    """As a socket does that is closed."""
    places = Places(1)
    places.take(lambda: place.leave())
    place = next(iter(places.provisional))
    places.take(lambda: None)
    assert len(places) == 1
