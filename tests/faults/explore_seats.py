"""Defects of seats that only larger scenarios find: `make explore` runs these, and `make test` does not."""

from dataclasses import replace

import pytest
from explorer import Counterexample, replay
from explorer_checks import found_and_replayed
from explorer_seat_scenarios import SEAT_SCENARIOS
from planted import plant

from lesson_server.stores.redis import seat_scripts
from lesson_server.stores.redis.claims import Claims
from lesson_server.stores.redis.seats import Seats

LIMIT = 20_000


class ListsAfterwards(Seats):
    """Adds the deadline after the seat has been taken."""

    @plant(Seats.take)
    async def take(self, lesson_id, client_id, seat, seat_count):
        wanted = "" if seat is None else seat
        (outcome, taken), _ = await self._store.execute(
            self._script(seat_scripts.TAKE, lesson_id, client_id, wanted, seat_count),
            self.deadlines.addition(lesson_id, client_id, self._reminder),
        )
        return outcome, taken


class ForgetsWhatIsLate(Seats):
    """The deadline of a take passes before its script comes, if the grace is short."""

    @plant(Seats.__init__)
    def __init__(self, store, retention, grace, observe=lambda change: None):
        super().__init__(store, retention, grace, observe)
        assert self._reminder > self._grace
        self._reminder = self._grace


class DoesNotLookForTheHolder(Seats):
    """Frees a seat that is due, whether its holder is there or not."""

    @plant(Seats._free_if_due)
    async def _free_if_due(self, lesson_id, client_id):
        index_key = self._keys(lesson_id)[1]
        ((known, remaining),) = await self._store.execute(("EVAL", seat_scripts.READ_DUE, 1, index_key, client_id))
        if known and remaining <= 0:
            await self._store.execute(self._script(seat_scripts.FREE_IF_UNCHANGED, lesson_id, client_id, known))
        return max(remaining, 0)


class DoesNotLookAgain(Seats):
    """A seat whose index has changed while the sweep looked is not looked at again."""

    @plant(Seats._free_if_due)
    async def _free_if_due(self, lesson_id, client_id):
        milliseconds = await super()._free_if_due(lesson_id, client_id)
        return 0 if milliseconds == 1 else milliseconds


class DepartsWithoutAWord(Claims):
    """Removes a presence, and the grace of the seat does not begin."""

    @plant(Claims._departure)
    def _departure(self, record):
        return ()


@pytest.mark.parametrize(
    ("defect", "name", "needs"),
    [
        (ListsAfterwards, "swept-taker", ("crash",)),
        (ListsAfterwards, "two-faults-of-a-take", ("late", "crash")),
        (ForgetsWhatIsLate, "take-and-go", ("late",)),
        (DoesNotLookForTheHolder, "two-tabs", ()),
        (DoesNotLookAgain, "take-and-go", ("late",)),
        (DepartsWithoutAWord, "two-tabs", ()),
        (DepartsWithoutAWord, "grace", ()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_defect_is_found_and_its_schedule_can_be_replayed(client, defect, name, needs):
    scenario = replace(SEAT_SCENARIOS[name], faults=needs, max_faults=len(needs))
    planted = replace(scenario, **{"claims" if issubclass(defect, Claims) else "seats": defect})
    found_and_replayed(client, planted, LIMIT)
    assert not isinstance(replay(client, scenario, []), Counterexample)
