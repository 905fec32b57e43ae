"""What the tests of rooms and of the subscription share."""

import asyncio


async def until_echoed(server):
    """An echo that is sent between two subscriptions is lost; the next one is not."""
    async with asyncio.timeout(10):
        while True:
            try:
                async with asyncio.timeout(0.2):
                    return await server._subscription.ping()
            except TimeoutError:
                pass
