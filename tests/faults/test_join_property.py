"""Any interleaving of joins, second joins, disconnects and failing stores ends in a state that the chart allows, with
Redis agreeing.

Nothing runs by itself here: every await of the services waits until the schedule lets it go on or makes it fail. So
each schedule that Hypothesis draws is one exact interleaving, and a failing one is replayed and shrunk.
"""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass

import pytest
from fakes import Faults, Hold, World, run, settle, store_down
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lesson_server.events.join_lesson import Join as JoinRegion
from lesson_server.gateway.handlers import Answer
from lesson_server.stores.redis.records import Entry

# A connection that has not joined is nothing yet. So a cast with somebody in it twice is also one who comes back.
PEOPLE = [
    {"client": "teacher", "lesson_id": "1", "access_token": "teacher:t-1"},
    {"client": "teacher", "lesson_id": "2", "access_token": "teacher:t-1"},
    {"client": "participant", "lesson_id": "1", "access_token": "student:p-1"},
    {"client": "participant", "lesson_id": "2", "access_token": "student:p-1"},
    {"client": "participant", "lesson_id": "1"},
]
casts = st.lists(st.sampled_from(PEOPLE), min_size=1, max_size=4)


@dataclass(frozen=True)
class Join:
    """A connection sends ``join_lesson``, whatever is under way."""

    connection: int


@dataclass(frozen=True)
class Disconnect:
    connection: int


@dataclass(frozen=True)
class Proceed:
    """What a connection waits for comes, and so do the next ones."""

    connection: int
    awaits: int


@dataclass(frozen=True)
class Fail:
    """The next store that a connection waits for raises: before the effect, or when it is done and can't say so."""

    connection: int


Action = Join | Disconnect | Proceed | Fail


connections = st.integers(0, 3)  # of a smaller cast, the number modulo its size
joins, failures, ends = (st.builds(kind, connections) for kind in (Join, Fail, Disconnect))
proceedings = st.builds(Proceed, connections, st.integers(1, 10))
# What ends a connection for good is the rarest, or little would happen. (``one_of`` knows no weights.)
actions = st.sampled_from([joins] * 4 + [proceedings] * 8 + [failures] * 3 + [ends]).flatmap(lambda action: action)
schedules = st.lists(actions, min_size=15, max_size=60)

# Whose work a task is; a task inherits it from what starts it.
acting: ContextVar[int] = ContextVar("acting")


class Director(Faults):
    """Faults by which every await waits for its turn."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[int, str, Hold]] = []

    async def point(self, name: str) -> None:
        turn = (acting.get(), name, Hold())
        self._waiting.append(turn)
        try:
            await turn[2].wait()
        finally:
            self._waiting.remove(turn)

    def proceed(self, number: int, error: Exception | None = None) -> None:
        """What a connection waits for comes, or raises."""
        for connection, _, hold in self._waiting:
            if connection == number:
                hold.release(error)
                return

    def waits_for(self, number: int) -> str:
        """The point that a connection waits at, if any."""
        return next((name for connection, name, _ in self._waiting if connection == number), "")

    def who_waits(self) -> list[int]:
        return [number for number, *_ in self._waiting]


class Play:
    """One schedule, acted by a world."""

    def __init__(self) -> None:
        self.director = Director()
        self.world = World(faults=self.director)
        self.cast: list[JoinRegion] = []
        self.gone: set[int] = set()
        self.joins: list[tuple[int, asyncio.Task[Answer | None]]] = []
        self.ends: list[asyncio.Task[None]] = []

    async def act(self, cast: list[dict[str, str]], schedule: list[Action]) -> None:
        self.cast = [await self.world.connect(f"sid-{number}", auth) for number, auth in enumerate(cast)]
        for action in schedule:
            await self.take(action)
        while waiting := self.director.who_waits():
            await self.take(Proceed(waiting[0], 1))
        self.world.presence.retry()  # Redis is back
        self.check_rest()
        for task in self.ends:
            await task

    async def take(self, action: Action) -> None:
        number = action.connection % len(self.cast)
        acting.set(number)
        match action:
            case Join() if number not in self.gone:
                self.joins.append((number, asyncio.create_task(self.world.join(self.cast[number].connection.sid))))
            case Disconnect() if number not in self.gone:
                self.gone.add(number)
                self.ends.append(asyncio.create_task(self.world.disconnect(self.cast[number].connection.sid)))
            case Proceed():
                for _ in range(action.awaits):
                    self.director.proceed(number)
                    await settle()
            case Fail():
                while self.director.waits_for(number).startswith("sockets."):
                    self.director.proceed(number)
                    await settle()
                self.director.proceed(number, store_down())
        await settle()
        assert all(region.state in region.CHART.STATES for region in self.cast)
        if not self.director.who_waits():
            self.check_rest()

    # What must be so whenever nothing is under way

    def check_rest(self) -> None:
        self.check_states()
        self.check_rooms_and_sessions()
        if not self.world.presence.pending:
            self.check_presence()

    def check_states(self) -> None:
        """Every connection is where its joins and its end have led it, and holds what that state says."""
        for number, region in enumerate(self.cast):
            answers = [join.result() for owner, join in self.joins if owner == number]
            if number in self.gone:
                expected = "disconnected"
            elif {"status": "SUCCESS", "data": {}} in answers:
                expected = "registered" if region.has_access_token() else "seated"
            else:
                assert None not in answers
                expected = "connected"
            assert region.state == expected
        assert self.world.gateway.connections.keys() == {
            region.connection.sid for number, region in enumerate(self.cast) if number not in self.gone
        }

    def check_rooms_and_sessions(self) -> None:
        joined = [region for region in self.cast if region.state in ("seated", "registered")]
        rooms: dict[str, set[str]] = {}
        for region in joined:
            rooms.setdefault(region.connection.handshake.lesson_id, set()).add(region.connection.sid)
        assert self.world.sockets.rooms == rooms
        seated = {sid for sid, session in self.world.sockets.sessions.items() if session}
        assert seated == {region.connection.sid for region in joined}

    def check_presence(self) -> None:
        """Each entry tells of the registered connection that wrote it last, and there is nothing else.

        ``{client_id}`` outlives the last connection that was registered, but not a join that failed.
        """
        by_sid = {region.connection.sid: region for region in self.cast}
        shown: dict[tuple[str, str], Entry] = {}
        live: set[tuple[str, str]] = set()
        for record in self.world.presence.written:
            region = by_sid[record.sid]
            for entry in record.entries():
                name = entry.name, entry.fields[0]
                if region.state == "registered":
                    shown[name] = entry
                    live.add(name)
        for record in self.world.presence.ended:
            for entry in record.entries():
                if entry.outlives and (entry.name, entry.fields[0]) not in live:
                    shown[entry.name, entry.fields[0]] = entry
        expected: dict[str, dict[str, str]] = {}
        for entry in shown.values():
            expected.setdefault(entry.name, {}).update(zip(entry.fields[::2], entry.fields[1::2], strict=True))
        hashes = self.world.redis.hashes
        assert {key: fields for key, fields in hashes.items() if not key.startswith("lesson_seat_")} == expected


# Who comes back while its other connection, which has ended since, is known; the join fails.
TWICE = [{"client": "participant", "lesson_id": "1", "access_token": "student:p-1"}] * 2
COMES_BACK_AND_FAILS = [Join(0), Join(1), Proceed(1, 7), Disconnect(1), Proceed(0, 8), Fail(0)]


# Whose first join did not reach Redis, and whose removal Redis did not answer; it joins again, and ends.
FAILS_AND_COMES_BACK = [Join(0), Proceed(0, 6), Fail(0), Fail(0), Join(0), Proceed(0, 7), Disconnect(0)]

# The answer to its removal is lost, and the removal is repeated when the other connection has ended too.
IS_REMOVED_TWICE = [
    Join(0),
    Join(1),
    Proceed(0, 9),
    Proceed(1, 7),
    Disconnect(0),
    Proceed(0, 2),
    Fail(0),
    Disconnect(1),
]


@pytest.mark.without_coverage
@settings(max_examples=500, deadline=None)
@given(casts, schedules)
@example(TWICE[:1], FAILS_AND_COMES_BACK)
@example(TWICE, COMES_BACK_AND_FAILS)
@example(TWICE, IS_REMOVED_TWICE)
def test_any_interleaving_ends_in_a_state_that_the_chart_allows_with_redis_agreeing(cast, schedule):
    run(Play().act(cast, schedule))
