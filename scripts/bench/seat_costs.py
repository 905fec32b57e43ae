"""The scripts on the seat map of a large lesson: their time in Redis, and how many commands they call there.

The time is that of SLOWLOG: the script itself, without the client and the network. The commands are those of
``commandstats``. A script that read the whole map would call HGETALL, or thousands of other commands.
"""

import statistics
import time
from itertools import count
from typing import Any, NamedTuple

import redis

from lesson_server.stores.redis.seats import Seats
from lesson_server.stores.redis.store import Command

SEATS = 10_000
REPEATS = 100
# Seconds after which a full map is searched for a free seat again, and some more.
SEARCH_PAUSE = 1.1
LESSON = "large"
MAP = f"lesson_seat_{LESSON}"
# The commands of the measurement itself.
OWN = {"evalsha", "info", "script|load", "slowlog|get", "slowlog|reset"}

Row = tuple[str, ...]


class Cost(NamedTuple):
    """The cost of one script: its time in Redis, the commands that it has called, and how many of them were HGETALL."""

    microseconds: int
    calls: int
    reads_of_all: int


class MeasuringStore:
    """A store that executes scripts one by one, and measures those on seat maps.

    Attributes:
        costs: the cost of each script.
        is_measuring: whether to measure.
    """

    failures = 0

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self._digests: dict[Any, str] = {}
        self.costs: list[Cost] = []
        self.is_measuring = True
        client.config_set("slowlog-log-slower-than", 0)

    def key(self, name: str) -> str:
        """Return the name: there is no prefix."""
        return name

    async def execute(self, *commands: Command, bookkeeping: tuple[Command, ...] = ()) -> list[Any]:
        """Execute scripts."""
        return [self._execute(command) for command in bookkeeping + commands]

    def _execute(self, command: Command) -> Any:
        name, script, keys, *words = command
        assert name == "EVAL"
        digest = self._digests.get(script)
        if digest is None:
            digest = self._digests[script] = self._client.script_load(str(script))
        if not self.is_measuring or keys == 1:  # the deadlines
            return self._client.evalsha(digest, int(keys), *words)
        before = self._calls()
        self._client.slowlog_reset()
        answer = self._client.evalsha(digest, int(keys), *words)
        (entry,) = [entry for entry in self._client.slowlog_get() if "EVALSHA" in str(entry["command"])]
        calls = {name: number - before.get(name, 0) for name, number in self._calls().items()}
        self.costs.append(Cost(entry["duration"], sum(calls.values()), calls.get("hgetall", 0)))
        return answer

    def _calls(self) -> dict[str, int]:
        stats = {name.removeprefix("cmdstat_"): stat for name, stat in self._client.info("commandstats").items()}
        return {name: stat["calls"] for name, stat in stats.items() if name not in OWN}


class Costs:
    """The scripts that are measured, on one map after the other.

    Args:
        client: the client of the Redis, whose data is deleted; it decodes responses.
    """

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self._store = MeasuringStore(client)
        self._seats = Seats(self._store, retention=3600, grace=60)
        self._names = count()
        self._rows: list[Row] = []

    async def measure(self) -> list[Row]:
        """Return for each script the state of the map, the call, the time in µs, the commands, and the HGETALLs."""
        await self._make_map()
        await self._take("empty", "take", repeats=1)
        await self._take_and_leave("empty")
        await self._fill(SEATS // 2)
        await self._take_and_leave("half full")
        await self._fill(SEATS)
        time.sleep(SEARCH_PAUSE)
        await self._take("full", "take, refused, once a second", repeats=1)
        await self._take("full", "take, refused")
        await self._take("full", "take a number, refused", first=1)
        await self._make_map()
        await self._fill(SEATS // 2, by_number=True)
        await self._take("half full, by number", "take", repeats=1)
        await self._take("half full, by number", "take, again")
        self._client.flushdb()
        for seat in range(1, SEATS + 1):
            self._client.hset(MAP, str(seat), f"other{seat}" if seat % 2 else "")
        await self._take("half full, by another program", "take", repeats=1)
        await self._take("half full, by another program", "take, again")
        return self._rows

    async def _make_map(self) -> None:
        self._client.flushdb()
        for call, repeats in (("join, the first", 1), ("join", REPEATS)):
            for _ in range(repeats):
                await self._seats.ensure_map(LESSON, SEATS, self._person())
            self._note("", call)

    async def _fill(self, seats: int, *, by_number: bool = False) -> None:
        """Let people take seats until this number of seats are taken."""
        self._store.is_measuring = False
        for seat in range(1, seats + 1):
            await self._seats.take(LESSON, f"filler{seat}", seat if by_number else None, SEATS)
        self._store.is_measuring = True

    async def _take_and_leave(self, state: str) -> None:
        await self._take(state, "take, again")
        people = await self._take(state, "take a number", first=SEATS - REPEATS)
        for position, person in enumerate(people):
            await self._seats.take(LESSON, person, SEATS - 2 * REPEATS + position, SEATS)
        self._note(state, "take another number")
        for person in people:
            await self._seats.leave(LESSON, person)
        self._note(state, "leave")

    async def _take(self, state: str, call: str, first: int | None = None, repeats: int = REPEATS) -> list[str]:
        """Let people take seats, and return the people.

        Args:
            state: the state of the map, for the table.
            call: the name of the call, for the table.
            first: the number of the first seat; None: without a number.
            repeats: the number of people.
        """
        people = [self._person() for _ in range(repeats)]
        for position, person in enumerate(people):
            await self._seats.take(LESSON, person, None if first is None else first + position, SEATS)
        self._note(state, call)
        return people

    def _person(self) -> str:
        return f"p{next(self._names)}"

    def _note(self, state: str, call: str) -> None:
        """Add a row with the medians of what has been measured."""
        columns = zip(*self._store.costs, strict=True)
        self._rows.append((state, call, *(f"{statistics.median(column):,.0f}" for column in columns)))
        self._store.costs.clear()
