"""The connection to Redis: its pool, its limits, the translation of its errors. The commands are in seats, presence."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote, urlsplit

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError

from lesson_server.errors import StoreUnavailable
from lesson_server.health import Condition

# Seconds after which an idle connection is asked whether it still lives before it is used.
HEALTH_CHECK_INTERVAL = 30
# Connections beside those of the round trips: the subscription of the rooms, and what replaces it while it closes.
SUBSCRIPTIONS = 2
SENTINEL_PORT = 26379

# What redis-py raises when Redis does not serve. The exception of a cluster that is gone is no RedisError.
FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)

# A redis-py client; that of Redis Cluster has the same commands, but no common class.
Redis = Any


def connect(url: str, timeout: float, pool_size: int) -> Redis:
    """A redis-py client.

    Args:
        url: one of

            * ``redis://``, ``rediss://`` (TLS) or ``unix://``, as redis-py has them;
            * ``redis+cluster://`` or ``rediss+cluster://``, with the address of any node of a Redis Cluster;
            * ``redis+sentinel://[[user]:password@]host[:port],host[:port].../database/service``, as python-socketio has
              it: the addresses of the sentinels, and the name under which they know the master.
        timeout: seconds to connect, and for one answer.
        pool_size: connections at most (to each node of a cluster).
    """
    options: dict[str, Any] = {
        "max_connections": pool_size,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "health_check_interval": HEALTH_CHECK_INTERVAL,
        # Once, and only where the connection broke, as each idle one has after a restart of Redis. Never after a
        # timeout: there is no time left, and the first try may still be carried out.
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        "decode_responses": True,
    }
    kind = urlsplit(url).scheme.partition("+")[2]
    if kind == "cluster":
        return aioredis.RedisCluster.from_url(url.replace("+cluster", "", 1), **options)
    if kind == "sentinel":
        return _connect_to_master(url, options)
    return aioredis.Redis.from_pool(aioredis.ConnectionPool.from_url(url, **options))


def _connect_to_master(url: str, options: dict[str, Any]) -> Redis:
    parts = urlsplit(url)
    credentials, _, addresses = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    database, _, service = parts.path.strip("/").partition("/")
    sentinels = []
    for address in addresses.split(","):
        host, _, port = address.partition(":")
        sentinels.append((host, int(port or SENTINEL_PORT)))
    login = {"username": unquote(user) or None, "password": unquote(password) or None}
    timeouts = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout")}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        sentinels, sentinel_kwargs={**timeouts, "decode_responses": True}, **login, **options
    )
    return sentinel.master_for(service, db=int(database or 0))


class RedisStore:
    """Redis, or a server that speaks like it.

    Args:
        url: see :func:`connect`.
        key_prefix: stands before every key.
        timeout: seconds to connect, and for one answer.
        pool_size: how many round trips may be under way at once; further ones wait, as long as their callers let them.
    """

    def __init__(self, url: str, key_prefix: str, timeout: float, pool_size: int) -> None:
        self.client = connect(url, timeout, pool_size + SUBSCRIPTIONS)
        self._key_prefix = key_prefix
        self._condition = Condition("Redis")
        # Makes every kind of pool one that waits; those of a cluster and of sentinels would raise an error.
        self._turns = asyncio.Semaphore(pool_size)

    def key(self, name: str) -> str:
        """The key of that name, as it stands in Redis."""
        return self._key_prefix + name

    @contextlib.asynccontextmanager
    async def round_trip(self) -> AsyncIterator[Redis]:
        """Encloses one round trip.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        async with self._turns:
            try:
                yield self.client
            except FAILURES as error:
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
