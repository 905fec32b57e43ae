"""The connection to Redis, and the choice of the server for each command.

The commands are in seats, presence, nodes and rooms.
"""

import asyncio
import contextlib
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from lesson_server.errors import StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.settings.schema import SettingsError
from lesson_server.status import Status
from lesson_server.stores.redis.pipelines import Redis
from lesson_server.stores.redis.shard import FAILURES, Part, Shard, Step
from lesson_server.stores.redis.store import Command
from lesson_server.tasks import end

logger = EventLogger(__name__)

# Seconds after which an idle connection is checked with PING before it is used.
HEALTH_CHECK_INTERVAL = 30
# Connections in addition to those of the round trips: one for a probe, and a successor that opens while the old
# connection closes.
OTHER_CONNECTIONS = 2
# Commands that any server can serve.
KEYLESS = ("PING", "PUBLISH")
SENTINEL_PORT = 26379
# The name of a server that is not part of a cluster.
REDIS = "Redis"


def connect(url: str, timeout: float, pool_size: int, retries: int = 1) -> Redis:
    """Return a redis-py client.

    Args:
        url: one of

            * ``redis://``, ``rediss://`` (TLS) or ``unix://``, as in redis-py;
            * ``redis+cluster://`` or ``rediss+cluster://``, with the address of any node of a Redis Cluster;
            * ``redis+sentinel://[[user]:password@]host[:port],host[:port].../database/service``, as in
              python-socketio: the addresses of the sentinels, and the service name of the master.
        timeout: seconds to connect, and to wait for one answer.
        pool_size: maximum number of connections (to each node of a cluster).
        retries: how often a command is sent again after its connection broke.
    """
    options: dict[str, Any] = {
        "max_connections": pool_size,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "health_check_interval": HEALTH_CHECK_INTERVAL,
        "retry": _retry(retries),
        "decode_responses": True,
    }
    kind = urlsplit(url).scheme.partition("+")[2]
    if kind == "cluster":
        return aioredis.RedisCluster.from_url(url.replace("+cluster", "", 1), **options)
    if kind == "sentinel":
        return _connect_to_master(url, options)
    return aioredis.Redis.from_pool(aioredis.ConnectionPool.from_url(url, **options))


def _retry(retries: int) -> Retry:
    """Return a policy that retries only if the connection broke, as idle ones do when Redis restarts.

    It does not retry after a timeout: no time is left, and Redis may still execute the first attempt.
    """
    # redis-py connects again even if nothing is left to retry: a subscription would be renewed, and lost again at once.
    return Retry(NoBackoff(), retries, supported_errors=(RedisConnectionError,) if retries else ())


def _connect_to_master(url: str, options: dict[str, Any]) -> Redis:
    parts = urlsplit(url)
    credentials, _, addresses = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    database, _, service = parts.path.strip("/").partition("/")
    sentinels = []
    for address in addresses.split(","):
        host, _, port = address.partition(":")
        sentinels.append((host, int(port or SENTINEL_PORT)))
    login = {"username": unquote(user), "password": unquote(password)}
    sentinel = Sentinel(sentinels, **login, **options)  # type: ignore[no-untyped-call]
    return sentinel.master_for(service, db=int(database))


class RedisStore:
    """Redis, or a server with the same protocol.

    :class:`~lesson_server.stores.redis.shard.Shard` sends the commands. Each master of a Redis Cluster has its own
    shard, so that a master that fails or hangs fails only the steps that have a key on it.

    Args:
        url: see :func:`connect`.
        key_prefix: the prefix of every key.
        timeout: seconds to connect, and to wait for one answer.
        pool_size: maximum number of concurrent round trips (to each master).

    Attributes:
        failures: number of round trips and probes that have failed because of Redis. After each failure, Redis may
            differ from what has been written.
    """

    def __init__(self, url: str, key_prefix: str, timeout: float, pool_size: int) -> None:
        self._max_connections = pool_size + OTHER_CONNECTIONS
        self._connect = partial(connect, url, timeout)
        try:
            self.client = self._connect(self._max_connections)
        except ValueError:  # the error text would quote the URL, including the password
            raise SettingsError("redis.url (LESSON_REDIS_URL): should be a URL of Redis") from None
        self.failures = 0
        self._key_prefix = key_prefix
        self._pool_size = pool_size
        self._is_cluster = isinstance(self.client, aioredis.RedisCluster)
        self._shards: dict[str, Shard] = {}
        if not self._is_cluster:
            self._shards[REDIS] = Shard(REDIS, self.client, pool_size, None, self._count_failure)
        self._refresh: asyncio.Task[None] | None = None

    def key(self, name: str) -> str:
        """Return the key for a name, with the prefix."""
        return self._key_prefix + name

    async def execute(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]:
        """Run the commands of one step in order, in one round trip (to each master of a cluster).

        Args:
            commands: each is a tuple of a command's words, e.g. ``("HGET", key, field)``.
            bookkeeping: commands that are sent before ``commands``, and whose failure does not fail the step: on a
                cluster, the step must not depend on a master that holds none of the keys of ``commands``.

        Returns:
            the answer to each command, ``bookkeeping`` first; an exception for each failed ``bookkeeping`` command.

        Raises:
            StoreRefused: a key is of another type. The other commands have been executed.
            StoreUnavailable: Redis failed or was too slow. Some of the commands may have been executed.
        """
        all_commands = bookkeeping + commands
        if not all_commands:
            return []
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        step = Step(all_commands, len(bookkeeping), [None] * len(all_commands), done)
        for shard, part in await self._split(step) if self._is_cluster else self._whole(step):
            shard.submit(part)
        return await done

    @property
    def status(self) -> Status:
        """How Redis is doing: of the masters of a cluster, the one that is down, or that failed last."""
        statuses = [shard.availability.status for shard in self._shards.values()]
        return max(statuses, key=lambda status: (status.status == "down", status.failed_at or 0), default=Status("up"))

    async def ping(self) -> None:
        """Check that Redis answers.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        await self.execute(("PING",))

    async def close(self) -> None:
        """Cancel the round trips in progress, and close the connections."""
        await end(self._refresh)
        for shard in list(self._shards.values()):
            await shard.close()
        await self.client.aclose()
        # The library's client of a master leaves the connections to the sentinels open.
        if isinstance(pool := getattr(self.client, "connection_pool", None), SentinelConnectionPool):
            for sentinel in pool.sentinel_manager.sentinels:
                await sentinel.aclose()

    def _count_failure(self) -> None:
        self.failures += 1

    def _whole(self, step: Step) -> list[tuple[Shard, Part]]:
        step.unanswered = 1
        return [(self._shards[REDIS], Part(step, range(len(step.commands))))]

    # Pub/sub

    def server_of(self, channel: str, *, sharded: bool) -> str | None:
        """Return the name of a server that serves a channel; None while no master of a cluster does.

        A sharded channel is served by the master of its slot, any other channel by all masters.
        """
        if not self._is_cluster:
            return REDIS
        with contextlib.suppress(*FAILURES):
            node = self.client.get_node_from_key(channel) if sharded else self._available_master()
            return str(node.name)
        return None

    def new_client(self, server: str) -> Redis:
        """Return a new client of a server, for one connection that is not retried.

        Raises:
            StoreUnavailable: the server is not part of the cluster any more.
        """
        if not self._is_cluster:
            return self._connect(1, retries=0)
        node = self.client.get_node(node_name=server)
        if node is None:
            raise StoreUnavailable(server, "not part of the cluster")
        return self._client_of(node, 1, 0)

    async def find_servers(self) -> None:
        """Find the masters of a cluster again, because one of them may have been replaced."""
        if self._is_cluster:
            await self._refresh_topology()

    # Redis Cluster

    async def _split(self, step: Step) -> list[tuple[Shard, Part]]:
        """Return the parts of a step: one for each master that serves some of its commands."""
        parts: dict[Shard, Part] = {}
        try:
            if not self.client.get_primaries():
                await self.client.initialize()
            for position, command in enumerate(step.commands):
                parts.setdefault(self._shard_of(command), Part(step, [])).positions.append(position)  # type: ignore[union-attr]
        except FAILURES as error:
            self._fail_in_cluster()
            raise StoreUnavailable("Redis", " ".join(str(error).split()) or type(error).__name__) from error
        step.unanswered = len(parts)
        return list(parts.items())

    def _shard_of(self, command: Command) -> Shard:
        """Return the shard of the command's key, or any available shard for a command without a key."""
        if command[0] in KEYLESS:
            return self._shard(self._available_master())
        key = command[3] if command[0] == "EVAL" else command[1]
        return self._shard(self.client.get_node_from_key(key))

    def _available_master(self) -> Any:
        """Return a master of the cluster that is available, or any if none is."""
        masters = self.client.get_primaries()
        for node in masters:
            with contextlib.suppress(StoreUnavailable):
                self._shard(node).availability.require()
                return node
        return masters[0]

    def _shard(self, node: Any) -> Shard:
        shard = self._shards.get(node.name)
        if shard is None:
            client = self._client_of(node, self._max_connections, 1)
            shard = self._shards[node.name] = Shard(
                f"Redis {node.name}", client, self._pool_size, self._redirect, self._fail_in_cluster
            )
        return shard

    @staticmethod
    def _client_of(node: Any, max_connections: int, retries: int) -> Redis:
        options = {**node.connection_kwargs, "max_connections": max_connections, "retry": _retry(retries)}
        return aioredis.Redis.from_pool(aioredis.ConnectionPool(connection_class=node.connection_class, **options))

    async def _redirect(self, command: Command) -> Any:
        """Execute a command by redis-py, which finds and remembers the master that serves the command now."""
        return await self.client.execute_command(*command)

    def _fail_in_cluster(self) -> None:
        """Count the failure, and look for a replica that may have replaced the failed master."""
        self.failures += 1
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._refresh_topology())

    async def _refresh_topology(self) -> None:
        with contextlib.suppress(*FAILURES):
            await self.client.nodes_manager.initialize()
            masters = {node.name for node in self.client.get_primaries()}
            for name in self._shards.keys() - masters:
                logger.warning("redis_master_lost", "Redis {server} is no master of the cluster any more", server=name)
                await self._shards.pop(name).close()
