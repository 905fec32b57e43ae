"""Redis: frees the seats that are due. Each node sweeps, so that the seats of a dead node are freed too."""

import asyncio
from collections.abc import Callable
from time import perf_counter

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.stores.redis.seat_deadlines import BATCH_SIZE
from lesson_server.stores.redis.seats import Seats
from lesson_server.tasks import end

logger = EventLogger(__name__)

# Seconds between two sweeps: how much longer than the grace a seat may be kept. A sweep costs a node one command, as
# long as no seat is due.
SWEEP_INTERVAL = 0.5


class SeatSweeper:
    """Sweeps the seats again and again.

    Args:
        seats: the seats.
        observe: called with the seconds that each sweep has taken until no seat was due; not after a failure.
    """

    def __init__(self, seats: Seats, observe: Callable[[float], None] = lambda seconds: None) -> None:
        self._seats = seats
        self._observe = observe
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sweep until :meth:`close`."""
        self._task = asyncio.create_task(self._sweep_repeatedly())

    async def close(self) -> None:
        """Stop."""
        await end(self._task)

    async def _sweep_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            started = perf_counter()
            try:
                while await self._seats.sweep() == BATCH_SIZE:
                    pass
                self._observe(perf_counter() - started)
            except StoreRefused as error:
                logger.error("seat_sweep_refused", "sweep of the seats refused: {cause}", cause=error.cause)
            except StoreUnavailable:
                pass  # the outage has been logged
            except Exception:
                logger.exception("seat_sweep_failed", "sweep of the seats failed")
