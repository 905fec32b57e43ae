"""Rooms that reach across nodes: what is emitted to a room is published in Redis, and every node delivers it.

python-socketio's own Redis manager logs every retry, waits up to a minute before the next one, and opens a connection
for each concurrent emit. This one speaks the same messages on a channel of its own name, so another program may emit by
``socketio.RedisManager(url, channel="lesson_node_rooms", write_only=True)``.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from socketio.async_pubsub_manager import AsyncPubSubManager

from lesson_server.errors import StoreUnavailable
from lesson_server.protocol.local_rooms import LocalRooms
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.shard import FAILURES
from lesson_server.tasks import end

# Seconds before a lost subscription is tried again.
RESUBSCRIBE_INTERVAL = 1.0
# Seconds of silence after which the node sends itself an echo, and after which it takes the subscription for deaf.
ECHO_INTERVAL = 5.0
DEAF_AFTER = 12.0
# How an echo begins; no message of python-socketio does.
ECHO = "echo:"


class Rooms(AsyncPubSubManager, LocalRooms):  # type: ignore[misc]
    """The rooms of this node, and the channel that joins them to those of the other nodes.

    Made after a fork: nodes that share a ``host_id`` would ignore each other.

    Args:
        store: the connection to Redis; the subscription keeps one connection of its own.
    """

    name = "rooms"

    def __init__(self, store: RedisStore) -> None:
        super().__init__(channel=store.key(keys.ROOMS))
        self._store = store
        self._echoes: dict[str, asyncio.Future[None]] = {}
        self._subscribed = asyncio.Event()
        # Called at each new subscription: the one before was lost, and what has been written may be lost with it.
        self.on_subscribed: Callable[[], None] = lambda: None
        self.thread: asyncio.Task[None] | None = None

    async def ping(self) -> None:
        """Prove that what is published is received: send this node a message, and wait for it as long as it takes.

        Raises:
            StoreUnavailable: it could not be sent.
        """
        await self._subscribed.wait()  # what is sent before is heard by nobody
        echo = ECHO + uuid.uuid4().hex
        heard = self._echoes[echo] = asyncio.get_running_loop().create_future()
        try:
            await self._send(echo)
            await heard
        finally:
            del self._echoes[echo]

    async def close(self) -> None:
        """Stop listening."""
        await end(self.thread)

    # A connection is in rooms of its own node only. The library would publish the wish of one that is just ending, for
    # some other node to enter it.

    async def enter_room(self, sid: str, namespace: str, room: str, eio_sid: str | None = None) -> None:
        await LocalRooms.enter_room(self, sid, namespace, room)

    async def leave_room(self, sid: str, namespace: str, room: str) -> None:
        await LocalRooms.leave_room(self, sid, namespace, room)

    # What the library asks of a manager

    async def _publish(self, data: dict[str, Any]) -> None:
        with contextlib.suppress(StoreUnavailable):  # the local clients have been served, and the log has been told
            await self._send(orjson.dumps(data).decode())

    async def _listen(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what the nodes publish, without end.

        A subscription that hears not even this node's own echo is replaced.
        """
        clock = asyncio.get_running_loop().time
        while True:
            # The round trips tell the log of an outage. A message that is no UTF-8 costs a new subscription.
            with contextlib.suppress(*FAILURES, StoreUnavailable):
                async with self._store.client.pubsub() as subscription:
                    await subscription.subscribe(self.channel)
                    heard = clock()
                    while clock() - heard < DEAF_AFTER:
                        message = await subscription.get_message(timeout=ECHO_INTERVAL)
                        if message is None:
                            await self._send(ECHO)
                            continue
                        heard = clock()
                        if message["type"] == "subscribe":
                            self._subscribed.set()
                            self.on_subscribed()
                        elif message["type"] == "message" and not self._take_echo(message["data"]):
                            with contextlib.suppress(orjson.JSONDecodeError):
                                data = orjson.loads(message["data"])
                                if isinstance(data, dict):  # the library would stumble over anything else
                                    yield data
            self._subscribed.clear()
            await asyncio.sleep(RESUBSCRIBE_INTERVAL)

    async def _send(self, text: str) -> None:
        await self._store.run(("PUBLISH", self.channel, text))

    def _take_echo(self, text: str) -> bool:
        awaited = self._echoes.get(text)
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
        return text.startswith(ECHO)
