"""The connection to Redis: which server serves which command. The commands are in seats, presence, nodes, rooms."""

import asyncio
import contextlib
import logging
from typing import Any
from urllib.parse import unquote, urlsplit

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from lesson_server.errors import StoreUnavailable
from lesson_server.settings.schema import SettingsError
from lesson_server.stores.redis.shard import FAILURES, Command, Part, Redis, Shard, Step
from lesson_server.tasks import end

logger = logging.getLogger(__name__)

# Seconds after which an idle connection is asked whether it still lives before it is used.
HEALTH_CHECK_INTERVAL = 30
# Connections beside those of the round trips: the subscription of the rooms and its successor while it closes, a probe
# and its successor.
OTHER_CONNECTIONS = 4
# Commands that any server serves.
KEYLESS = ("PING", "PUBLISH")
SENTINEL_PORT = 26379


def connect(url: str, timeout: float, pool_size: int) -> Redis:
    """Return a redis-py client.

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
        "retry": _retry_once(),
        "decode_responses": True,
    }
    kind = urlsplit(url).scheme.partition("+")[2]
    if kind == "cluster":
        return aioredis.RedisCluster.from_url(url.replace("+cluster", "", 1), **options)
    if kind == "sentinel":
        return _connect_to_master(url, options)
    return aioredis.Redis.from_pool(aioredis.ConnectionPool.from_url(url, **options))


def _retry_once() -> Retry:
    """Once, and only where the connection broke, as each idle one has after a restart of Redis.

    Never after a timeout: there is no time left, and the first try may still be carried out.
    """
    return Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))


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
    """Redis, or a server that speaks like it; see :class:`~lesson_server.stores.redis.shard.Shard` for how it is asked.

    Each master of a Redis Cluster is asked by itself, so that one that fails or hangs fails only the steps that have a
    key there.

    Args:
        url: see :func:`connect`.
        key_prefix: stands before every key.
        timeout: seconds to connect, and for one answer.
        pool_size: round trips (to each master) that may be under way at once.

    Attributes:
        failures: how many round trips and probes have failed because of Redis. After each of them, Redis may differ
            from what has been written.
    """

    def __init__(self, url: str, key_prefix: str, timeout: float, pool_size: int) -> None:
        self._max_connections = pool_size + OTHER_CONNECTIONS
        try:
            self.client = connect(url, timeout, self._max_connections)
        except ValueError:  # its text would quote the URL, and the password with it
            raise SettingsError("redis.url (LESSON_REDIS_URL): should be a URL of Redis") from None
        self.failures = 0
        self._key_prefix = key_prefix
        self._pool_size = pool_size
        self._is_cluster = isinstance(self.client, aioredis.RedisCluster)
        self._shards: dict[str, Shard] = {}
        if not self._is_cluster:
            self._shards["Redis"] = Shard("Redis", self.client, pool_size, None, self._count_failure)
        self._refresh: asyncio.Task[None] | None = None

    def key(self, name: str) -> str:
        """Return the key of that name, as it stands in Redis."""
        return self._key_prefix + name

    async def run(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]:
        """Run the commands of one step in one round trip (to each master of a cluster), in their order.

        Args:
            commands: each the words of a command, e.g. ``("HGET", key, field)``.
            bookkeeping: commands that are sent before the others, and whose failure fails nobody: on a cluster, a
                master that has no key of the step must not keep it from being done.

        Returns:
            the answer to each, those of ``bookkeeping`` first; an exception in place of each of these that failed.

        Raises:
            StoreRefused: a key is of another type. The other commands have been carried out.
            StoreUnavailable: Redis failed or was too slow. Some of the commands may have been carried out.
        """
        all_commands = bookkeeping + commands
        if not all_commands:
            return []
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        step = Step(all_commands, len(bookkeeping), [None] * len(all_commands), done)
        for shard, part in await self._split(step) if self._is_cluster else self._whole(step):
            shard.submit(part)
        return await done

    async def ping(self) -> None:
        """Asks Redis for nothing but an answer.

        Raises:
            StoreUnavailable: there was none.
        """
        await self.run(("PING",))

    async def close(self) -> None:
        """Close the connections; round trips under way are cancelled."""
        await end(self._refresh)
        for shard in list(self._shards.values()):
            await shard.close()
        await self.client.aclose()

    def _count_failure(self) -> None:
        self.failures += 1

    def _whole(self, step: Step) -> list[tuple[Shard, Part]]:
        step.unanswered = 1
        return [(self._shards["Redis"], Part(step, range(len(step.commands))))]

    # Redis Cluster

    async def _split(self, step: Step) -> list[tuple[Shard, Part]]:
        """Return the parts of a step, by the master of each command's key."""
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
        """Return the shard of the command's key. A command without a key goes to any that answers."""
        if command[0] in KEYLESS:
            for node in self.client.get_primaries():
                shard = self._shard(node)
                with contextlib.suppress(StoreUnavailable):
                    shard.availability.require()
                    return shard
            return shard
        key = command[3] if command[0] == "EVAL" else command[1]
        return self._shard(self.client.get_node_from_key(key))

    def _shard(self, node: Any) -> Shard:
        shard = self._shards.get(node.name)
        if shard is None:
            pool = aioredis.ConnectionPool(
                connection_class=node.connection_class,
                **{**node.connection_kwargs, "max_connections": self._max_connections, "retry": _retry_once()},
            )
            client = aioredis.Redis.from_pool(pool)
            shard = self._shards[node.name] = Shard(
                f"Redis {node.name}", client, self._pool_size, self._redirect, self._fail_in_cluster
            )
        return shard

    async def _redirect(self, command: Command) -> Any:
        """Have redis-py find the master that serves the command now, and remember it."""
        return await self.client.execute_command(*command)

    def _fail_in_cluster(self) -> None:
        """Look for a replica that may have taken the place of the master that failed."""
        self.failures += 1
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._refresh_topology())

    async def _refresh_topology(self) -> None:
        with contextlib.suppress(*FAILURES):
            await self.client.nodes_manager.initialize()
            masters = {node.name for node in self.client.get_primaries()}
            for name in self._shards.keys() - masters:
                logger.warning("Redis %s is no master of the cluster any more", name)
                await self._shards.pop(name).close()
