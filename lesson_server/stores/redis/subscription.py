"""The subscription of a node to channels in Redis: to some all the time, and to those of the lessons that it serves."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from functools import partial

from lesson_server.log import EventLogger
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.receiver import RECONNECT_INTERVAL, Receiver
from lesson_server.tasks import end

logger = EventLogger(__name__)

# ARGV[1] is a message for the channel KEYS[1]. A server without sharded pub/sub has no SPUBLISH.
PUBLISH_SHARDED = """
local answer = redis.pcall('SPUBLISH', KEYS[1], ARGV[1])
if type(answer) == 'table' then
    redis.call('PUBLISH', KEYS[1], ARGV[1])
end
"""

# Seconds that a caller waits until Redis has confirmed a subscription. Redis takes less than a millisecond. If it hangs
# or is slow, the round trips of a join must still fit into the deadline of the event.
CONFIRMATION_TIMEOUT = 0.2

# Seconds between two attempts to find the servers of channels that have moved: the masters need a moment to agree.
MOVE_INTERVAL = 0.1

Handler = Callable[[str], Awaitable[None]]


class Subscription:
    """Receives what is published on some channels, by one connection to Redis, or one to each master of a cluster.

    A *sharded* channel is served by one master of a cluster, like a key; every other channel by all masters. A server
    without sharded pub/sub, which is a Redis before 7, serves both kinds alike.

    Create it after the fork: each process needs a channel of its own for its echoes.

    Args:
        store: the Redis client; the subscription has connections of its own.

    Attributes:
        on_subscribed: called at each new subscription: the previous one was lost, and Redis may have lost its data at
            the same time.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._echo_channel = store.key(keys.echoes(secrets.token_hex(8)))
        self._handlers: dict[str, Handler] = {}
        self._sharded: set[str] = set()
        self._receivers: dict[str, Receiver] = {}  # server → its receiver
        self._receiver_of: dict[str, Receiver] = {}  # channel → the receiver of its messages
        self._moved: list[str] = []  # channels that have no receiver, because their slot has moved
        self._moving: asyncio.Task[None] | None = None
        self._unconfirmed: dict[str, tuple[asyncio.Event, asyncio.TimerHandle]] = {}  # channel → what callers wait for
        self._echoes: dict[str, asyncio.Future[None]] = {}
        self._subscribed = asyncio.Event()
        self._started = False
        self.on_subscribed: Callable[[], None] = lambda: None

    def room_channel(self, lesson_id: str) -> str:
        """Return the sharded channel of what is emitted to the room of a lesson."""
        return keys.room(self._store.key(keys.seat_map(lesson_id)))

    def on(self, channel: str, handler: Handler, *, sharded: bool = False) -> None:
        """Subscribe to a channel.

        Args:
            channel: a name of ``keys.py``.
            handler: called with each message, one at a time; the next message waits.
            sharded: whether the channel is sharded.
        """
        name = self._store.key(channel)
        self._handlers[name] = handler
        if sharded:
            self._sharded.add(name)
        if self._started:
            timer = asyncio.get_running_loop().call_later(CONFIRMATION_TIMEOUT, self._end_wait, name)
            self._unconfirmed[name] = asyncio.Event(), timer
            self._place(name)

    async def confirmed(self, channel: str) -> None:
        """Wait until Redis has confirmed the subscription to a channel: no later message is missed.

        Return after CONFIRMATION_TIMEOUT nevertheless, and at once while the connection to Redis is lost: messages are
        missed then, until the subscription is renewed.
        """
        unconfirmed = self._unconfirmed.get(self._store.key(channel))
        if unconfirmed is not None:
            await unconfirmed[0].wait()

    def off(self, channel: str) -> None:
        """End the subscription to a channel."""
        name = self._store.key(channel)
        del self._handlers[name]
        self._sharded.discard(name)
        self._end_wait(name)
        receiver = self._receiver_of.pop(name, None)
        if receiver is not None:
            receiver.remove(name)

    def start(self) -> None:
        """Subscribe, and receive messages until :meth:`close`."""
        self._started = True
        self._handlers[self._echo_channel] = self._receive_echo  # the last, so that an echo proves the others too
        for name in self._handlers:
            self._place(name)

    async def close(self) -> None:
        """Stop receiving messages."""
        self._started = False
        await end(self._moving)
        await asyncio.gather(*(receiver.close() for receiver in self._receivers.values()))

    async def publish(self, channel: str, text: str, *, sharded: bool = False) -> None:
        """Publish a message.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        name = self._store.key(channel)
        if sharded:
            await self._store.execute(("EVAL", PUBLISH_SHARDED, 1, name, text))
        else:
            await self._store.execute(("PUBLISH", name, text))

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

    # Receivers

    def _place(self, channel: str) -> None:
        """Give a channel to the receiver of the server that serves the channel now."""
        if channel not in self._handlers or not self._started:
            return
        server = self._store.server_of(channel, sharded=channel in self._sharded)
        if server is None:  # the master of the channel's slot has failed, and no replica has replaced it yet
            self._end_wait(channel)
            asyncio.get_running_loop().call_later(RECONNECT_INTERVAL, self._place, channel)
            return
        receiver = self._receivers.get(server)
        if receiver is None:
            connect = partial(self._store.new_client, server)
            receiver = Receiver(
                server, connect, self._handle, self._note_subscribed, self._move_channels, self._note_moved
            )
            self._receivers[server] = receiver
        former = self._receiver_of.get(channel)
        if former is not receiver:
            if former is not None:
                former.remove(channel)
            self._receiver_of[channel] = receiver
            receiver.add(channel, sharded=channel in self._sharded)
        if receiver.is_lost:
            self._end_wait(channel)

    def _end_wait(self, channel: str) -> None:
        """Let those go on who wait for the confirmation of a channel."""
        event, timer = self._unconfirmed.pop(channel, (None, None))
        if event is not None and timer is not None:
            event.set()
            timer.cancel()

    def _note_subscribed(self, channel: str) -> None:
        self._end_wait(channel)
        if channel == self._echo_channel:
            self._subscribed.set()
            self.on_subscribed()

    async def _move_channels(self, receiver: Receiver) -> None:
        """Move the channels of a receiver that has lost its connection to the servers that serve them now."""
        if self._echo_channel in receiver.channels:
            self._subscribed.clear()
        await self._store.find_servers()
        for channel in list(receiver.channels):
            self._place(channel)

    def _note_moved(self, channels: list[str]) -> None:
        for channel in channels:
            del self._receiver_of[channel]
        self._moved += channels
        if self._moving is None or self._moving.done():
            self._moving = asyncio.create_task(self._place_moved())

    async def _place_moved(self) -> None:
        """Give the channels whose slots have moved to the receivers of the servers that serve them now.

        A receiver whose server does not serve a channel gives it back.
        """
        while self._moved:
            await self._store.find_servers()
            moved, self._moved = self._moved, []
            for channel in moved:
                self._place(channel)
            await asyncio.sleep(MOVE_INTERVAL)

    async def _handle(self, channel: str, text: str) -> None:
        handler = self._handlers.get(channel)
        if handler is None:  # the last messages after the end of a subscription
            return
        try:
            await handler(text)
        except Exception:
            logger.exception("message_failed", "a message on {channel} could not be handled", channel=channel)

    async def _echo(self, echo: str) -> None:
        await self._store.execute(("PUBLISH", self._echo_channel, echo))

    async def _receive_echo(self, echo: str) -> None:
        awaited = self._echoes.get(echo)
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
