"""admission.py: how much one process takes on. The clock is the test's own."""

import pytest

from lesson_server.errors import ServiceBusy
from lesson_server.gateway import admission as admission_module
from lesson_server.gateway.admission import BURST, Admission, RateLimit
from lesson_server.protocol.places import Places


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1_000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(admission_module, "time", clock)
    return clock


def let_in(limit, tries):
    """How many of so many at once are let in."""
    count = 0
    for _ in range(tries):
        try:
            limit.take()
        except ServiceBusy:
            continue
        count += 1
    return count


def test_a_burst_is_let_in_after_a_quiet_time_and_then_the_rate(clock):
    limit = RateLimit(10)
    assert let_in(limit, 100) == 10 * BURST
    for _ in range(5):
        clock.now += 1
        assert let_in(limit, 100) == 10


def test_quiet_hours_save_up_no_more_than_a_burst(clock):
    limit = RateLimit(10)
    clock.now += 3_600
    assert let_in(limit, 100) == 10 * BURST


def test_the_refused_cost_nothing(clock):
    """A storm that keeps knocking must not lock out those whom the rate allows."""
    limit = RateLimit(1)
    let_in(limit, 10_000)
    clock.now += 1
    assert let_in(limit, 1) == 1


def test_a_rate_below_one_lets_somebody_in_from_time_to_time(clock):
    limit = RateLimit(0.1)
    assert let_in(limit, 5) == 1
    clock.now += 9.9
    assert let_in(limit, 5) == 0
    clock.now += 0.2
    assert let_in(limit, 5) == 1


def test_no_rate_is_no_limit(clock):
    assert let_in(RateLimit(0), 100_000) == 100_000


def test_connections_are_bounded_by_their_number_and_their_rate(clock):
    admission = Admission(max_connections=3, connect_rate=1, event_rates={})
    admission.admit_connection(held=2)
    with pytest.raises(ServiceBusy):
        admission.admit_connection(held=3)
    admission.admit_connection(held=0)  # the one that was too many has cost nothing
    with pytest.raises(ServiceBusy):
        admission.admit_connection(held=0)


def test_each_event_has_a_rate_of_its_own(clock):
    admission = Admission(max_connections=1, connect_rate=0.1, event_rates={"join_lesson": 1, "take_seat": 1})
    admission.admit_connection(held=0)
    admission.admit_event("join_lesson")
    admission.admit_event("join_lesson")
    with pytest.raises(ServiceBusy, match="the lesson service is busy, try again"):
        admission.admit_event("join_lesson")
    admission.admit_event("take_seat")


# Places


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
