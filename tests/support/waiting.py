"""Waiting for what the server does by itself."""

import asyncio
import inspect
from collections.abc import Callable

LONG = 50.0  # seconds to wait for what always comes


async def until(condition: Callable[[], object], seconds: float = LONG) -> None:
    """Waits until a condition holds; its result may be awaitable."""
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if inspect.isawaitable(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.005)
