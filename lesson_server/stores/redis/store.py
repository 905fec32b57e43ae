"""What presence, seats and nodes use of Redis. :class:`~lesson_server.stores.redis.client.RedisStore` has it."""

from typing import Any, Protocol

# Seconds after which Redis no longer executes a write that it has not answered: the timeout of the write, plus the time
# of TCP retransmissions.
LATE_WRITE = 10.0

# The words of a command, e.g. ("HGET", key, field).
Command = tuple[str | bytes | int, ...]


class Store(Protocol):
    """A Redis.

    Attributes:
        failures: how many round trips have failed. After each of them, Redis may differ from what has been written.
    """

    failures: int

    def key(self, name: str) -> str: ...
    async def execute(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]: ...
