"""The connection to Redis: its pool, its limits, the translation of its errors. The commands are in seats, presence."""

import asyncio
from collections import deque
from dataclasses import dataclass
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
from lesson_server.settings import SettingsError

# Seconds after which an idle connection is asked whether it still lives before it is used.
HEALTH_CHECK_INTERVAL = 30
# Connections beside those of the round trips: the subscription of the rooms, and what replaces it while it closes.
SUBSCRIPTIONS = 2
SENTINEL_PORT = 26379

# What redis-py raises when Redis does not serve. The exception of a cluster that is gone is no RedisError.
FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)

# Steps that share a round trip at most: a batch of them is answered in about 5 ms.
MAX_STEPS = 200

Command = tuple[str | bytes | int, ...]

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


@dataclass(slots=True)
class _Step:
    """The commands of one step, and who waits for their answers."""

    commands: tuple[Command, ...]
    answers: "asyncio.Future[list[Any]]"


class RedisStore:
    """Redis, or a server that speaks like it.

    Steps that ask in the same moment share a round trip: their commands are sent as one pipeline. At the start of a
    lesson that is what most of them do, and it costs a fifth of as many round trips.

    Args:
        url: see :func:`connect`.
        key_prefix: stands before every key.
        timeout: seconds to connect, and for one answer.
        pool_size: how many round trips may be under way at once; what comes meanwhile goes with the next one.
    """

    def __init__(self, url: str, key_prefix: str, timeout: float, pool_size: int) -> None:
        try:
            self.client = connect(url, timeout, pool_size + SUBSCRIPTIONS)
        except ValueError:  # its text would quote the URL, and the password with it
            raise SettingsError("redis.url (LESSON_REDIS_URL): should be a URL of Redis") from None
        self._key_prefix = key_prefix
        self._condition = Condition("Redis")
        self._pool_size = pool_size
        self._waiting: deque[_Step] = deque()
        self._round_trips: set[asyncio.Task[None]] = set()
        self._beginning = False  # the next round trip has been asked for, and begins in this turn of the loop

    def key(self, name: str) -> str:
        """The key of that name, as it stands in Redis."""
        return self._key_prefix + name

    async def run(self, *commands: Command) -> list[Any]:
        """Runs commands in their order, in one round trip.

        Args:
            commands: each the words of a command, e.g. ``("HGET", key, field)``.

        Returns:
            the answer to each.

        Raises:
            StoreUnavailable: Redis failed or was too slow. Some of the commands may have been carried out.
        """
        step = _Step(commands, asyncio.get_running_loop().create_future())
        self._waiting.append(step)
        self._begin_soon()
        return await step.answers

    async def ping(self) -> None:
        """Asks Redis for nothing but an answer.

        Raises:
            StoreUnavailable: there was none.
        """
        await self.run(("PING",))

    async def close(self) -> None:
        """Closes the connections; what is under way is given up."""
        for task in self._round_trips:
            task.cancel()
        if self._round_trips:
            await asyncio.wait(self._round_trips)
        await self.client.aclose()

    def _begin_soon(self) -> None:
        """Begins a round trip when all that is asked for in this turn of the loop has been asked for."""
        if not self._beginning and self._waiting and len(self._round_trips) < self._pool_size:
            self._beginning = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._beginning = False
        steps = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_STEPS))]
        # Who has given up meanwhile must not have it done: it has begun to give back.
        steps = [step for step in steps if not step.answers.done()]
        if steps:
            task = asyncio.create_task(self._round_trip(steps))
            self._round_trips.add(task)
            task.add_done_callback(self._ended)
        self._begin_soon()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._round_trips.discard(task)
        self._begin_soon()

    async def _round_trip(self, steps: list[_Step]) -> None:
        """All errors of redis-py are translated here. What one command of a step raises is no matter of the others."""
        try:
            async with self.client.pipeline(transaction=False) as pipe:
                for step in steps:
                    for command in step.commands:
                        pipe.execute_command(*command)
                answers = await pipe.execute(raise_on_error=False)
        except (*FAILURES, UnicodeDecodeError) as error:  # the last: somebody else's bytes in one of our keys
            answers = [error] * sum(len(step.commands) for step in steps)
        except Exception as error:  # a defect, which is for those who wait to tell
            self._give_up(steps, error)
            return
        except asyncio.CancelledError:
            self._give_up(steps, StoreUnavailable("Redis", "the server stops"))
            raise
        position = 0
        for step in steps:
            own = answers[position : position + len(step.commands)]
            position += len(step.commands)
            self._settle(step, own)

    @staticmethod
    def _give_up(steps: list[_Step], error: Exception) -> None:
        for step in steps:
            if not step.answers.done():
                step.answers.set_exception(error)

    def _settle(self, step: _Step, answers: list[Any]) -> None:
        error = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if error is None:
            self._condition.answered()
        else:
            cause = " ".join(str(error).split()) or type(error).__name__
            self._condition.failed(cause)
        if step.answers.done():
            return  # nobody waits any more
        if error is None:
            step.answers.set_result(answers)
        else:
            step.answers.set_exception(StoreUnavailable("Redis", cause))
