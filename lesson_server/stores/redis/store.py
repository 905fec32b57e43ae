"""What presence, seats and nodes use of Redis. :class:`~lesson_server.stores.redis.client.RedisStore` has it."""

from typing import Any, Protocol

from lesson_server.stores.redis.shard import Command


class Store(Protocol):
    """A Redis.

    Attributes:
        failures: how many round trips have failed. After each of them, Redis may differ from what has been written.
    """

    failures: int

    def key(self, name: str) -> str: ...
    async def run(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]: ...
