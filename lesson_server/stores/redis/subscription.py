"""The subscription of a node to channels in Redis, replaced when it breaks or when nothing arrives any more."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.shard import FAILURES
from lesson_server.tasks import end

logger = logging.getLogger(__name__)

# Seconds before the node subscribes again after the loss of a subscription.
RESUBSCRIBE_INTERVAL = 1.0
# Seconds without a message after which the node publishes an echo, and after which it replaces the subscription.
ECHO_INTERVAL = 5.0
SUBSCRIPTION_TIMEOUT = 12.0

Handler = Callable[[str], Awaitable[None]]


class Subscription:
    """One connection to Redis that receives what is published on some channels.

    Create it after the fork: each process needs a channel of its own for its echoes.

    Args:
        store: the Redis client; the subscription has one connection of its own.

    Attributes:
        on_subscribed: called at each new subscription: the previous one was lost, and Redis may have lost its data at
            the same time.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._echo_channel = store.key(keys.echoes(secrets.token_hex(8)))
        self._handlers: dict[str, Handler] = {self._echo_channel: self._receive_echo}
        self._echoes: dict[str, asyncio.Future[None]] = {}
        self._subscribed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.on_subscribed: Callable[[], None] = lambda: None

    def on(self, channel: str, handler: Handler) -> None:
        """Set the handler of the messages on a channel; call this before :meth:`start`.

        Args:
            channel: a name of ``keys.py``.
            handler: called with each message, one at a time; the next message waits.
        """
        self._handlers[self._store.key(channel)] = handler

    def start(self) -> None:
        """Subscribe, and receive messages until :meth:`close`."""
        self._task = asyncio.create_task(self._receive())

    async def close(self) -> None:
        """Stop receiving messages."""
        await end(self._task)

    async def publish(self, channel: str, text: str) -> None:
        """Publish a message.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        await self._store.execute(("PUBLISH", self._store.key(channel), text))

    async def ping(self) -> None:
        """Publish an echo, and wait without limit until this node receives it: so published messages arrive.

        Raises:
            StoreUnavailable: the echo could not be sent.
        """
        await self._subscribed.wait()  # an echo that is sent before would be lost
        echo = secrets.token_hex(8)
        received = self._echoes[echo] = asyncio.get_running_loop().create_future()
        try:
            await self._echo(echo)
            await received
        finally:
            del self._echoes[echo]

    async def _receive(self) -> None:
        """Receive messages without end.

        A subscription that does not even receive this node's own echo is replaced.
        """
        clock = asyncio.get_running_loop().time
        while True:
            # The round trips log an outage. A message that is not UTF-8 causes a new subscription.
            with contextlib.suppress(*FAILURES, StoreUnavailable):
                async with self._store.client.pubsub() as subscription:
                    await subscription.subscribe(*self._handlers)
                    last_received = clock()
                    while clock() - last_received < SUBSCRIPTION_TIMEOUT:
                        message = await subscription.get_message(timeout=ECHO_INTERVAL)
                        if message is None:
                            await self._echo("")
                            continue
                        last_received = clock()
                        if message["type"] == "message":
                            await self._handle(message["channel"], message["data"])
                        elif message["channel"] == self._echo_channel:  # the first channel of a subscription
                            self._subscribed.set()
                            self.on_subscribed()
            self._subscribed.clear()
            await asyncio.sleep(RESUBSCRIBE_INTERVAL)

    async def _handle(self, channel: str, text: str) -> None:
        try:
            await self._handlers[channel](text)
        except Exception:
            logger.exception("a message on %s could not be handled", channel)

    async def _echo(self, echo: str) -> None:
        await self._store.execute(("PUBLISH", self._echo_channel, echo))

    async def _receive_echo(self, echo: str) -> None:
        awaited = self._echoes.get(echo)
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
