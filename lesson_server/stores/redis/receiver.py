"""One connection to a Redis server that receives what is published on some channels, replaced when it is lost."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from redis.crc import key_slot
from redis.exceptions import MovedError

from lesson_server.errors import StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.stores.redis.pipelines import Redis
from lesson_server.stores.redis.shard import FAILURES
from lesson_server.tasks import end

logger = EventLogger(__name__)

# Seconds between two attempts to connect. The first attempt after the loss of a working connection is made at once.
RECONNECT_INTERVAL = 1.0
# Seconds without a message after which the server is pinged, and after which the connection is replaced.
PING_INTERVAL = 5.0
RECEIVE_TIMEOUT = 12.0
# Returns whether the server has sharded pub/sub: Redis 7 and later, and every Valkey.
HAS_SHARDED = "return redis.call('COMMAND', 'INFO', 'SPUBLISH')[1] and 1 or 0"


class Receiver:
    """Receives the messages on some channels of one Redis server.

    Args:
        server: the name of the server.
        connect: returns a new client of the server, for one connection that is not retried.
        on_message: called with the channel and the text of each message, one at a time; the next message waits.
        on_subscribed: called with each channel when the server has confirmed the subscription.
        on_lost: called when the connection is lost, and after each failed attempt to connect.
        on_moved: called with the channels that this server does not serve any more, because their slot of the cluster
            has moved to another server. They have been removed here.

    Attributes:
        channels: the channels, each with whether it is sharded where the server has sharded pub/sub.
        is_lost: whether the last connection, or the last attempt to connect, has failed.
    """

    def __init__(
        self,
        server: str,
        connect: Callable[[], Redis],
        on_message: Callable[[str, str], Awaitable[None]],
        on_subscribed: Callable[[str], None],
        on_lost: Callable[["Receiver"], Awaitable[None]],
        on_moved: Callable[[list[str]], None],
    ) -> None:
        self.server = server
        self.channels: dict[str, bool] = {}
        self.is_lost = False
        self._connect = connect
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._on_lost = on_lost
        self._on_moved = on_moved
        self._pubsub: Any = None
        self._has_sharded = False
        self._requested: dict[str, bool] = {}  # the channels of which the server has been told
        self._confirmed: set[str] = set()  # those of them that the server has confirmed
        self._unsubscribed = Counter[str]()  # sharded channels → the unsubscriptions that are not confirmed yet
        self._requests: asyncio.Task[None] | None = None
        self._has_channels = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop receiving messages."""
        await end(self._task)
        await end(self._requests)

    def add(self, channel: str, *, sharded: bool) -> None:
        """Receive the messages on a channel too."""
        self.channels[channel] = sharded
        if channel in self._confirmed:  # it has just been removed, and the server has not been told
            self._on_subscribed(channel)
        self._has_channels.set()
        self._request_soon()

    def remove(self, channel: str) -> None:
        """Receive the messages on a channel no more."""
        self.channels.pop(channel, None)
        if not self.channels:
            self._has_channels.clear()
        self._request_soon()

    async def _run(self) -> None:
        while True:
            await self._has_channels.wait()
            try:
                await self._receive()
            except (*FAILURES, StoreUnavailable):
                pass  # the round trips log an outage
            except Exception:
                logger.exception("subscription_failed", "a subscription to {server} failed", server=self.server)
            self.is_lost = True
            was_connected = bool(self._requested)
            self._requested = {}
            self._confirmed.clear()
            self._unsubscribed.clear()
            await self._on_lost(self)
            if not was_connected:
                await asyncio.sleep(RECONNECT_INTERVAL)

    async def _receive(self) -> None:
        """Receive messages until the connection is lost, or nothing arrives any more, not even the answer to a ping."""
        async with contextlib.aclosing(self._connect()) as client, client.pubsub() as pubsub:
            self._has_sharded = bool(await client.eval(HAS_SHARDED, 0))
            await pubsub.connect()
            self._pubsub = pubsub
            try:
                self._request_soon()
                await self._receive_from(pubsub)
            finally:
                self._pubsub = None

    async def _receive_from(self, pubsub: Any) -> None:
        clock = asyncio.get_running_loop().time
        last_received = clock()
        while clock() - last_received < RECEIVE_TIMEOUT:
            try:
                message = await pubsub.get_message(timeout=PING_INTERVAL)
            except MovedError as error:  # the answer to a request
                self._remove_slot(error.slot_id)
                continue
            if message is None:
                await pubsub.ping()
                continue
            last_received = clock()
            kind, channel = message["type"], message["channel"]
            if kind in ("message", "smessage"):
                await self._on_message(channel, message["data"])
            elif kind in ("subscribe", "ssubscribe"):
                self.is_lost = False
                if channel in self._requested and not self._unsubscribed[channel]:  # it has not been removed meanwhile
                    self._confirmed.add(channel)
                    self._on_subscribed(channel)
            elif kind == "sunsubscribe" and self._unsubscribed[channel]:
                self._unsubscribed[channel] -= 1
            elif kind == "sunsubscribe":  # by the server
                self._remove_slot(key_slot(channel.encode()))

    def _remove_slot(self, slot: int) -> None:
        """Remove the channels of a slot that has moved to another server; the other channels miss nothing."""
        moved = [name for name, sharded in self.channels.items() if sharded and key_slot(name.encode()) == slot]
        for channel in moved:
            del self.channels[channel]
            self._requested.pop(channel, None)
            self._confirmed.discard(channel)
        if moved:
            self._on_moved(moved)

    # Requests. Only one task sends them, so that the server gets them in order.

    def _request_soon(self) -> None:
        if self._requests is None or self._requests.done():
            self._requests = asyncio.create_task(self._request())

    async def _request(self) -> None:
        """Tell the server which channels have been added and removed."""
        # The connection is lost, which the receiving task notices too. redis-py raises AttributeError if the connection
        # is closed in the middle of a write.
        with contextlib.suppress(*FAILURES, AttributeError):
            while self._requested != self.channels and self._is_connected():
                # All at once, in the order in which they were added. One after the other, each would take redis-py two
                # turns of the event loop or more.
                changed = [channel for channel in self.channels if channel not in self._requested]
                changed += [channel for channel in self._requested if channel not in self.channels]
                await asyncio.gather(*map(self._change, changed))

    def _is_connected(self) -> bool:
        return self._pubsub is not None and self._pubsub.connection.is_connected

    async def _change(self, channel: str) -> None:
        if not self._is_connected():  # redis-py would connect again while the receiving task reads
            return
        # One command for each channel: on a cluster, a command may name only channels of one slot.
        if channel in self.channels and channel not in self._requested:
            sharded = self._requested[channel] = self.channels[channel]
            await (self._pubsub.ssubscribe if sharded and self._has_sharded else self._pubsub.subscribe)(channel)
        elif channel in self._requested and channel not in self.channels:
            self._confirmed.discard(channel)
            if self._requested.pop(channel) and self._has_sharded:
                self._unsubscribed[channel] += 1
                await self._pubsub.sunsubscribe(channel)
            else:
                await self._pubsub.unsubscribe(channel)
