"""Reliable cancellation of asyncio tasks."""

import asyncio
from typing import Any

# Seconds between two cancellations of a task.
CANCEL_INTERVAL = 0.1


async def end(task: "asyncio.Task[Any] | None") -> None:
    """Cancel a task until it has ended.

    One cancellation may have no effect: redis-py uses ``asyncio.wait_for``, which on Python 3.11 drops a cancellation
    that arrives together with the awaited result.

    Args:
        task: the task; None: do nothing.
    """
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_INTERVAL)
