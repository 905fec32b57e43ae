"""What an explorer can choose, and which choices may be swapped. See explorer.py."""

from dataclasses import dataclass
from functools import lru_cache

from explorer_clock import reads_clock

from lesson_server.stores.redis.seat_scripts import READ_DUE
from lesson_server.stores.redis.store import Command


@dataclass(frozen=True, slots=True)
class Touch:
    """One thing that a choice reads or writes.

    Attributes:
        what: a key of Redis, a node, a step, …
        part: the fields of a key; None: all of it.
    """

    what: tuple[str, str]
    writes: bool
    part: frozenset[str] | None = None

    def conflicts(self, other: "Touch") -> bool:
        if self.what != other.what or not (self.writes or other.writes):
            return False
        return self.part is None or other.part is None or bool(self.part & other.part)


Footprint = tuple[Touch, ...]

DATA = ("all keys", "")
BUDGET = ("the budget of faults", "")
CLOCK = ("the clock of Redis", "")

READS = frozenset({"EXISTS", "HEXISTS", "HGET", "HGETALL", "HLEN", "HRANDFIELD", "HSCAN", "TTL"})
# What nodes ask all the time, and what a history leaves out once time passes.
ROUTINE = READS | {"EXPIRE", "HINCRBY", "HSETNX"}
# Scripts that change nothing.
READING_SCRIPTS = frozenset({READ_DUE})
KEYLESS = frozenset({"PING", "PUBLISH"})


def keys_of(command: Command) -> tuple[str, ...]:
    """The keys of a command."""
    if command[0] in KEYLESS:
        return ()
    if command[0] == "EVAL":
        return tuple(map(str, command[3 : 3 + int(command[2])]))
    return (str(command[1]),)


@lru_cache(10_000)  # each schedule of a scenario has nearly the same commands
def touches_of(command: Command) -> Footprint:
    """What a command touches in Redis."""
    name, *words = command
    part = None
    if name in ("HSET", "HINCRBY", "HSETNX", "HGET", "HEXISTS"):
        part = frozenset(map(str, words[1::2] if name == "HSET" else words[1:2]))
    elif name == "ZADD":
        part = frozenset(map(str, words[2::2]))
    elif name == "ZREM":
        part = frozenset(map(str, words[1:]))
    is_read = name in READS or (name == "EVAL" and words[0] in READING_SCRIPTS)
    touches = tuple(Touch(("key", key), not is_read, part) for key in keys_of(command))
    return (*touches, Touch(CLOCK, writes=False)) if reads_clock(command) else touches


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice that the explorer has.

    Attributes:
        name: the same in every schedule that has it.
        footprint: what it touches.
        of: the step or the actor whose next move it is.
        cause: how many choices had been made when it was first offered.
        is_fault: whether it uses up the budget.
        is_tried_everywhere: whether it is tried at every point that is reached, and not only where there is a race.
    """

    name: str
    footprint: Footprint
    of: str
    cause: int
    is_fault: bool = False
    is_tried_everywhere: bool = False

    def conflicts(self, other: "Choice") -> bool:
        return any(one.conflicts(two) for one in self.footprint for two in other.footprint)
