"""The clock of an explored Redis: it goes on when told to. See explorer.py.

What a script does with the time of Redis must be the same in each run of a schedule. So where a script calls TIME, the
explorer puts a counter in Redis: each script that asks finds it a millisecond later than the one before, as long as
nobody tells it to go on. Redis sees a script that is otherwise the one of production, and the keys of the server are
those of production. The counter is one key more, which :func:`keys_of_server` leaves out.
"""

import re
from functools import cache
from typing import Any

import redis

from lesson_server.stores.redis.store import Command

# The key of the counter, of microseconds.
CLOCK = "the clock of the explorer"
# The time at which each world begins. Not 0, so that no time is taken for none.
BEGINNING = 1_000_000_000
# Microseconds from one script to the next: a new millisecond, for that is what the deadlines of seats count.
TICK = 1_000

_TIME = re.compile(r"(?:redis\.)?call\('TIME'\)")


class RedisClock:
    """The clock of the Redis of one world.

    Args:
        client: of the Redis, which has been emptied.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.set(BEGINNING)

    def now(self) -> int:
        """The time in microseconds."""
        text: Any = self._client.get(CLOCK)
        return int(text)

    def set(self, time: int) -> None:
        self._client.set(CLOCK, time)

    def execute(self, command: Command) -> Any:
        """Has a command carried out by Redis, with this clock."""
        if reads_clock(command):
            command = ("EVAL", _with_counter(str(command[1])), *command[2:])
        return self._client.execute_command(*command)


def reads_clock(command: Command) -> bool:
    """Whether what a command does depends on the time."""
    return command[0] == "EVAL" and "TIME" in str(command[1])


@cache
def _with_counter(script: str) -> str:
    text = _TIME.sub(f"{{0, redis.call('INCRBY', '{CLOCK}', {TICK})}}", script)
    if text.count("TIME") or text.count(CLOCK) != 1:
        raise TypeError(f"a script asks for the time in another way than once by call('TIME'):\n{script}")
    return text


def keys_of_server(client: redis.Redis, pattern: str = "*") -> list[str]:
    """The keys that nodes have written."""
    return [key for key in client.scan_iter(pattern) if key != CLOCK]
