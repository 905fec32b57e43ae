"""The messages between nodes without Redis: each node of a bus receives what any of them publishes."""

from typing import Any

import orjson

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis.messages import Handler, Messages


class Bus:
    """Connects nodes. While it ``is_down``, nothing can be published; ``refused`` counts what was tried."""

    def __init__(self) -> None:
        self.nodes: list[BusNode] = []
        self.published: list[dict[str, Any]] = []
        self.is_down = False
        self.refused = 0

    def node(self) -> "BusNode":
        self.nodes.append(BusNode(self))
        return self.nodes[-1]

    def kinds(self) -> list[str]:
        return [message["kind"] for message in self.published]


class BusNode(Messages):
    """One node's messages."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._handlers: dict[str, Handler] = {}

    async def publish(self, kind: str, **data: object) -> None:
        if self._bus.is_down:
            self._bus.refused += 1
            raise StoreUnavailable("Redis", "the bus is down")
        text = orjson.dumps({"kind": kind, **data}).decode()
        self._bus.published.append(orjson.loads(text))
        for node in self._bus.nodes:
            await node._receive(text)
