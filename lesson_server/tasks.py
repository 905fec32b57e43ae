"""Tasks of asyncio that are to end."""

import asyncio
from typing import Any

# Seconds before a task is cancelled once more.
CANCEL_INTERVAL = 0.1


async def end(task: "asyncio.Task[Any] | None") -> None:
    """Cancel a task until it has ended.

    One cancellation may have no effect: redis-py waits by ``asyncio.wait_for``, which on Python 3.11 drops a
    cancellation that arrives together with its result.

    Args:
        task: None for none.
    """
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_INTERVAL)
