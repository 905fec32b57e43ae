"""seat_sweeper.py: sweeps again and again, whatever fails."""

import asyncio

import pytest
from waiting import until

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.redis import seat_sweeper
from lesson_server.stores.redis.seat_deadlines import BATCH_SIZE
from lesson_server.stores.redis.seat_sweeper import SeatSweeper

# The pauses of the sweeper so far.
PAUSES: list[float] = []


class FakeSeats:
    """Seats whose sweeps have these outcomes, and none after that."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.pauses_before = []  # for each sweep

    async def sweep(self):
        self.pauses_before.append(len(PAUSES))
        if not self.outcomes:
            return 0
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def sweep_all(seats, observed=None):
    sweeper = SeatSweeper(seats, [].append if observed is None else observed.append)
    await sweeper.close()  # nothing to close
    sweeper.start()
    await until(lambda: not seats.outcomes and len(seats.pauses_before) > 3)
    await sweeper.close()


@pytest.mark.gen_test
async def test_as_long_as_there_is_more_it_goes_on_without_a_pause(monkeypatch):
    sleep = asyncio.sleep

    async def pause(seconds):
        if seconds == seat_sweeper.SWEEP_INTERVAL:
            PAUSES.append(seconds)
        await sleep(0)

    PAUSES.clear()
    monkeypatch.setattr("lesson_server.stores.redis.seat_sweeper.asyncio.sleep", pause)
    seats = FakeSeats(BATCH_SIZE, BATCH_SIZE, 1)
    await sweep_all(seats)
    assert seats.pauses_before[:4] == [1, 1, 1, 2]


@pytest.mark.gen_test
async def test_a_sweep_is_observed_when_no_seat_is_due_any_more_and_not_when_it_failed(monkeypatch):
    monkeypatch.setattr(seat_sweeper, "SWEEP_INTERVAL", 0.0)
    failed = [BATCH_SIZE, BATCH_SIZE, StoreUnavailable("Redis", "away")]
    seats = FakeSeats(*failed, BATCH_SIZE, BATCH_SIZE, 1)
    # A clock that advances by a second with each command.
    monkeypatch.setattr(seat_sweeper, "perf_counter", lambda: float(len(seats.pauses_before)))
    observed = []
    await sweep_all(seats, observed)
    assert observed[0] == 3.0
    assert set(observed[1:]) <= {1.0}


@pytest.mark.gen_test
async def test_it_goes_on_after_each_failure_and_logs_what_nobody_else_logs(monkeypatch, caplog):
    monkeypatch.setattr(seat_sweeper, "SWEEP_INTERVAL", 0.0)
    await sweep_all(
        FakeSeats(StoreUnavailable("Redis", "away"), StoreRefused("Redis", "WRONGTYPE"), RuntimeError("a defect"), 1)
    )
    assert [record.getMessage() for record in caplog.records] == [
        "sweep of the seats refused: Redis: WRONGTYPE",
        "sweep of the seats failed",
    ]
