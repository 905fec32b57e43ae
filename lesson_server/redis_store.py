"""The connection to Redis: its pool, its limits, the translation of its errors. The commands are in seats, presence."""

import contextlib
from collections.abc import AsyncIterator

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from lesson_server.errors import StoreUnavailable
from lesson_server.health import Condition

# Seconds after which an idle connection is asked whether it still lives before it is used.
HEALTH_CHECK_INTERVAL = 30


class RedisStore:
    """Redis, or a server that speaks like it.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        key_prefix: stands before every key.
        timeout: seconds to connect, and for one answer.
        pool_size: how many round trips may be under way at once; further ones wait, as long as their callers let them.
    """

    def __init__(self, url: str, key_prefix: str, timeout: float, pool_size: int) -> None:
        self._key_prefix = key_prefix
        self._condition = Condition("Redis")
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            max_connections=pool_size,
            timeout=None,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            health_check_interval=HEALTH_CHECK_INTERVAL,
            # Once, and only where the connection broke, as each idle one has after a restart of Redis. Never after a
            # timeout: there is no time left, and the first try may still be carried out.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            decode_responses=True,
        )
        self.client = aioredis.Redis.from_pool(pool)

    def key(self, name: str) -> str:
        """The key of that name, as it stands in Redis."""
        return self._key_prefix + name

    @contextlib.asynccontextmanager
    async def round_trip(self) -> AsyncIterator[aioredis.Redis]:
        """Encloses one round trip.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        try:
            yield self.client
        except (RedisError, OSError, TimeoutError) as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            self._condition.failed(cause)
            raise StoreUnavailable("Redis", cause) from error
        self._condition.answered()

    async def ping(self) -> None:
        """Asks Redis for nothing but an answer.

        Raises:
            StoreUnavailable: there was none.
        """
        async with self.round_trip() as redis:
            await redis.ping()

    async def close(self) -> None:
        """Closes the connections."""
        await self.client.aclose()
