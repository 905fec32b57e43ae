"""Messages between nodes, as JSON objects on one channel of Redis. A node receives its own messages too."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from lesson_server.log import EventLogger
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.subscription import Subscription

logger = EventLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[None]]


class Messages:
    """The messages between the nodes on one Redis.

    Args:
        subscription: the subscription of this node; not started yet.
    """

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._handlers: dict[str, Handler] = {}
        subscription.on(keys.MESSAGES, self._receive)

    def on(self, kind: str, handler: Handler) -> None:
        """Set the handler of one kind of messages."""
        self._handlers[kind] = handler

    async def publish(self, kind: str, **data: object) -> None:
        """Publish a message.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        await self._subscription.publish(keys.MESSAGES, orjson.dumps({"kind": kind, **data}).decode())

    async def _receive(self, text: str) -> None:
        try:
            message = orjson.loads(text)
            handler = self._handlers.get(message.pop("kind"))
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
            logger.warning("message_invalid", "a message on {channel} is none of a node's", channel=keys.MESSAGES)
            return
        if handler is not None:
            await handler(message)
