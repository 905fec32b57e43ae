"""Waiting for what the server does by itself."""

import asyncio
from collections.abc import Callable

LONG = 20.0  # seconds to wait for what always comes


async def until(condition: Callable[[], object]) -> None:
    """Waits for what always comes."""
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.001)
