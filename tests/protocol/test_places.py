"""places.py: however many clients connect and send nothing, the newest have time for their handshake."""

import pytest

from lesson_server.errors import ServiceBusy
from lesson_server.protocol.places import Places


class Holder:
    """Holds a place until it is evicted."""

    def __init__(self, places):
        self.is_evicted = False
        self.place = places.take(self.on_evicted)

    def on_evicted(self):
        self.is_evicted = True


def evicted(holders):
    """The numbers of the evicted holders."""
    return [number for number, holder in enumerate(holders) if holder.is_evicted]


def test_there_are_no_more_than_the_limit_and_the_oldest_is_evicted():
    places = Places(3)
    holders = [Holder(places) for _ in range(3)]
    assert (len(places), evicted(holders)) == (3, [])
    holders += [Holder(places) for _ in range(2)]
    assert (len(places), evicted(holders)) == (3, [0, 1])


def test_the_holder_of_a_kept_place_is_not_evicted():
    places = Places(3)
    holders = [Holder(places) for _ in range(3)]
    holders[0].place.keep()
    holders[1].place.keep()
    holders += [Holder(places) for _ in range(2)]
    assert (len(places), evicted(holders)) == (3, [2, 3])


def test_a_place_that_is_kept_no_longer_is_evicted_after_the_others():
    places = Places(3)
    holders = [Holder(places) for _ in range(3)]
    holders[0].place.keep()
    holders[0].place.allow_eviction()
    holders += [Holder(places) for _ in range(2)]
    assert evicted(holders) == [1, 2]
    holders += [Holder(places)]
    assert evicted(holders) == [0, 1, 2]


def test_when_all_places_are_kept_there_is_none():
    places = Places(2)
    holders = [Holder(places) for _ in range(2)]
    for holder in holders:
        holder.place.keep()
    with pytest.raises(ServiceBusy):
        Holder(places)
    assert (len(places), evicted(holders)) == (2, [])
    holders[1].place.free()
    Holder(places)
    assert len(places) == 2


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_place_that_has_been_freed_stays_free(is_kept):
    places = Places(2)
    holder = Holder(places)
    if is_kept:
        holder.place.keep()
    holder.place.free()
    assert len(places) == 0
    for late in (
        holder.place.free,
        holder.place.keep,
        holder.place.allow_eviction,
        lambda: holder.place.transfer(pytest.fail),
    ):
        late()
        assert len(places) == 0


@pytest.mark.parametrize("is_kept", [False, True])
def test_of_a_place_that_was_transferred_the_new_holder_is_evicted(is_kept):
    places = Places(1)
    first = Holder(places)
    if is_kept:
        first.place.keep()
    transferred = []
    first.place.transfer(lambda: transferred.append(True))
    first.place.allow_eviction()
    Holder(places)
    assert transferred == [True]
    assert not first.is_evicted


def test_an_evicted_holder_may_free_its_place():
    """As a connection does that is closed."""
    places = Places(1)
    places.take(lambda: place.free())
    place = next(iter(places.provisional))
    places.take(lambda: None)
    assert len(places) == 1
