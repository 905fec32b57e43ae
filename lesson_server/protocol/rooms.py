"""Rooms across nodes: an emit to a room is published in Redis, and every node delivers it to its clients.

python-socketio's own Redis manager logs every retry, waits up to a minute before the next retry, and opens a connection
for each concurrent emit. This manager publishes the same messages on its own channel, so another program may emit with
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

# Seconds before the node subscribes again after the loss of a subscription.
RESUBSCRIBE_INTERVAL = 1.0
# Seconds without a message after which the node publishes an echo, and after which it replaces the subscription.
ECHO_INTERVAL = 5.0
SUBSCRIPTION_TIMEOUT = 12.0
# The prefix of an echo; no message of python-socketio has this prefix.
ECHO = "echo:"


class Rooms(AsyncPubSubManager, LocalRooms):  # type: ignore[misc]
    """The rooms of this node, and the Redis channel that connects them to the rooms of the other nodes.

    Create it after the fork: nodes with the same ``host_id`` would ignore each other.

    Args:
        store: the Redis client; the subscription has one connection of its own.
    """

    name = "rooms"

    def __init__(self, store: RedisStore) -> None:
        super().__init__(channel=store.key(keys.ROOMS))
        self._store = store
        self._echoes: dict[str, asyncio.Future[None]] = {}
        self._subscribed = asyncio.Event()
        # Called at each new subscription: the previous one was lost, and Redis may have lost its data at the same time.
        self.on_subscribed: Callable[[], None] = lambda: None
        self.thread: asyncio.Task[None] | None = None

    async def ping(self) -> None:
        """Publish an echo, and wait without limit until this node receives it: so published messages arrive.

        Raises:
            StoreUnavailable: the echo could not be sent.
        """
        await self._subscribed.wait()  # an echo that is sent before would be lost
        echo = ECHO + uuid.uuid4().hex
        received = self._echoes[echo] = asyncio.get_running_loop().create_future()
        try:
            await self._send(echo)
            await received
        finally:
            del self._echoes[echo]

    async def close(self) -> None:
        """Stop listening."""
        await end(self.thread)

    # A client is only in rooms of its own node. For a client that is just disconnecting, the library would publish the
    # call, so that another node could execute it.

    async def enter_room(self, sid: str, namespace: str, room: str, eio_sid: str | None = None) -> None:
        await LocalRooms.enter_room(self, sid, namespace, room)

    async def leave_room(self, sid: str, namespace: str, room: str) -> None:
        await LocalRooms.leave_room(self, sid, namespace, room)

    # Called by python-socketio

    async def _publish(self, data: dict[str, Any]) -> None:
        with contextlib.suppress(StoreUnavailable):  # the local clients got the message, and the failure is logged
            await self._send(orjson.dumps(data).decode())

    async def _listen(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of all nodes, without end.

        A subscription that does not even receive this node's own echo is replaced.
        """
        clock = asyncio.get_running_loop().time
        while True:
            # The round trips log an outage. A message that is not UTF-8 causes a new subscription.
            with contextlib.suppress(*FAILURES, StoreUnavailable):
                async with self._store.client.pubsub() as subscription:
                    await subscription.subscribe(self.channel)
                    last_received = clock()
                    while clock() - last_received < SUBSCRIPTION_TIMEOUT:
                        message = await subscription.get_message(timeout=ECHO_INTERVAL)
                        if message is None:
                            await self._send(ECHO)
                            continue
                        last_received = clock()
                        if message["type"] == "subscribe":
                            self._subscribed.set()
                            self.on_subscribed()
                        elif message["type"] == "message" and not self._take_echo(message["data"]):
                            with contextlib.suppress(orjson.JSONDecodeError):
                                data = orjson.loads(message["data"])
                                if isinstance(data, dict):  # anything else would raise in the library
                                    yield data
            self._subscribed.clear()
            await asyncio.sleep(RESUBSCRIBE_INTERVAL)

    async def _send(self, text: str) -> None:
        await self._store.execute(("PUBLISH", self.channel, text))

    def _take_echo(self, text: str) -> bool:
        awaited = self._echoes.get(text)
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
        return text.startswith(ECHO)
