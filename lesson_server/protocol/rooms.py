"""Rooms across nodes: an emit to a room is published in Redis, and the nodes deliver it to their clients.

Each room has a channel in Redis, to which a node is subscribed while a client of the node is in the room. So an emit
reaches only the nodes that have somebody there. All nodes are subscribed to one more channel, because another program
may emit with ``socketio.RedisManager(url, channel="lesson_node_rooms", write_only=True)``.

python-socketio's own Redis manager has only that one channel, logs every retry, waits up to a minute before the next
retry, and opens a connection for each concurrent emit. The messages here are those of python-socketio.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from socketio.async_pubsub_manager import AsyncPubSubManager

from lesson_server.errors import StoreUnavailable
from lesson_server.protocol.local_rooms import LocalRooms
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.subscription import Subscription
from lesson_server.tasks import end

# Messages that wait for the library, which handles them one at a time; further ones wait in Redis.
MAX_WAITING_MESSAGES = 100


class Rooms(AsyncPubSubManager, LocalRooms):  # type: ignore[misc]
    """The rooms of this node, and the Redis channels that connect them to the rooms of the other nodes.

    Create it after the fork: nodes with the same ``host_id`` would ignore each other.

    Args:
        subscription: the subscription of this node; not started yet.
    """

    name = "rooms"

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(channel=keys.ROOMS)
        self._subscription = subscription
        self._messages = asyncio.Queue[dict[str, Any]](MAX_WAITING_MESSAGES)
        self.thread: asyncio.Task[None] | None = None
        subscription.on(keys.ROOMS, self._receive)

    async def close(self) -> None:
        """Stop handling messages of other nodes."""
        await end(self.thread)

    # A client is only in rooms of its own node. For a client that is just disconnecting, the library would publish the
    # call, so that another node could execute it.

    async def enter_room(self, sid: str, namespace: str, room: str, eio_sid: str | None = None) -> None:
        await LocalRooms.enter_room(self, sid, namespace, room)
        # Nothing that is emitted to the room after the client has entered may be missed.
        await self._subscription.confirmed(self._subscription.room_channel(room))

    async def leave_room(self, sid: str, namespace: str, room: str) -> None:
        await LocalRooms.leave_room(self, sid, namespace, room)

    def room_opened(self, room: str) -> None:
        self._subscription.on(self._subscription.room_channel(room), self._receive, sharded=True)

    def room_closed(self, room: str) -> None:
        self._subscription.off(self._subscription.room_channel(room))

    # Called by python-socketio

    async def _publish(self, data: dict[str, Any]) -> None:
        room: Any = data.get("room")
        text = orjson.dumps(data).decode()
        with contextlib.suppress(StoreUnavailable):  # the local clients got the message, and the failure is logged
            if data["method"] == "emit" and self.has_room(room):
                await self._subscription.publish(self._subscription.room_channel(room), text, sharded=True)
            else:  # to a client, or to a room in which nobody of this node is
                await self._subscription.publish(keys.ROOMS, text)

    async def _listen(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of all nodes, without end."""
        while True:
            yield await self._messages.get()

    async def _receive(self, text: str) -> None:
        with contextlib.suppress(orjson.JSONDecodeError):
            data = orjson.loads(text)
            if isinstance(data, dict):  # anything else would raise in the library
                await self._messages.put(data)
