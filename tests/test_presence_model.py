"""Two nodes on one real Valkey against a model of who is where, through joins, moves, crashes, losses and outages.

Time is driven by hand: a node's heartbeat is a rule, and so is that its lease runs out. The rules do to the nodes what
production does; :meth:`Nodes.everything_settles` then says what must be true, whatever has happened before.

What the diagrams' records can't tell, the model does not ask for: they hold one sid for each person in a lesson. When
the later of two tabs ends, the earlier one is there and not told of, until it joins again or is restored.
"""

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from redis.exceptions import ConnectionError as RedisConnectionError

from lesson_server import presence as presence_module
from lesson_server.errors import StoreUnavailable
from lesson_server.nodes import Node
from lesson_server.presence import ClientRecord, Presence, TeacherRecord
from lesson_server.redis_store import RedisStore

PARTICIPANTS = ["anna", "ben"]
TEACHERS = ["hill"]
LESSONS = ["1", "2"]
LONG_AGO = 1  # ms, on Redis' clock
# Heartbeats after which nothing is left to do: one to notice, one to be sure, one after somebody else's sweep.
ENOUGH_BEATS = 4


class UnansweredRedis:
    """Redis does what it is told, and its answer gets lost."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        async def unanswered(*args, **kwargs):
            await getattr(self._client, name)(*args, **kwargs)
            raise RedisConnectionError("the answer got lost")

        return unanswered

    def pipeline(self, **kwargs):
        pipe = self._client.pipeline(**kwargs)
        execute = pipe.execute

        async def unanswered():
            await execute()
            raise RedisConnectionError("the answer got lost")

        pipe.execute = unanswered
        return pipe


class FaultyStore(RedisStore):
    """A connection to Redis that a test may break: ``unreachable`` or ``unanswered``."""

    fault = None

    @contextlib.asynccontextmanager
    async def round_trip(self):
        if self.fault == "unreachable":
            raise StoreUnavailable("Redis", "unreachable")
        async with super().round_trip() as client:
            yield UnansweredRedis(client) if self.fault == "unanswered" else client


class Member:
    """One node, and the connections that it holds: sid → record, None for one whose join has failed."""

    def __init__(self, node_id, url):
        self.node_id = node_id
        self.store = FaultyStore(url, "", 2.0, 4)
        self.presence = Presence(self.store, 3600, node_id)
        self.connections = {}
        self.complete = True
        self.may_be_swept = False  # its lease has run out, and it has not noticed yet
        self.node = Node(node_id, self.store, self.presence, self)

    # What a node asks of its connections

    def holds(self, sid):
        return sid in self.connections

    def may_be_present(self, sid):
        return self.connections.get(sid) is not None

    async def restore(self, indexed):
        for sid, record in reversed(list(self.connections.items())):
            if record is not None and sid not in indexed:
                await self.presence.restore(record)

    async def beat(self):
        """One heartbeat, as the node's own loop does it."""
        try:
            self.complete = await self.node._beat(self.complete)
        except StoreUnavailable:
            self.complete = False
        await asyncio.gather(*self.node._sweeps.values(), return_exceptions=True)
        self.may_be_swept = self.may_be_swept and not self.complete

    async def close(self):
        payer = self.presence._payer
        await self.presence.close()
        if payer is not None:
            await asyncio.wait([payer])
        await self.store.close()


@dataclass
class Place:
    """A person in a lesson: the live connections, in the order of their joins, and which of them Redis names."""

    live: list = field(default_factory=list)
    named: str | None = None  # None: one of them, the model can't know which
    untold: bool = False  # the named one has ended, and Redis may name none of those that are left


class Nodes(RuleBasedStateMachine):
    """The rules are what happens in production."""

    connections = Bundle("connections")

    def __init__(self, url):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.url = url
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self.redis.flushall()
        self.numbers = itertools.count(1)
        self.places = {(lesson, who): Place() for lesson in LESSONS for who in PARTICIPANTS + TEACHERS}
        self.known = dict.fromkeys(PARTICIPANTS, False)  # whether a join is a reconnect; None: the model can't know
        self.members = [self.new_member(), self.new_member()]

    def teardown(self):
        try:
            self.settle()
        finally:
            for member in self.members:
                self.do(member.close())
            self.loop.close()
            self.redis.close()

    def do(self, work):
        return self.loop.run_until_complete(work)

    def new_member(self):
        member = Member(f"node{next(self.numbers)}", self.url)
        self.do(member.beat())
        return member

    # What happens

    @rule(
        target=connections,
        where=st.integers(0, 1),
        lesson=st.sampled_from(LESSONS),
        who=st.sampled_from(PARTICIPANTS + TEACHERS),
    )
    def join(self, where, lesson, who):
        member, sid = self.members[where], f"sid{next(self.numbers)}"
        if who in TEACHERS:
            record, write = TeacherRecord(sid, lesson, who), member.presence.set_teacher
        else:
            record, write = ClientRecord(sid, lesson, who, "student"), member.presence.set_client
        place = self.places[lesson, who]
        member.connections[sid] = record
        try:
            is_reconnect = self.do(write(record))
        except StoreUnavailable:
            member.connections[sid] = None
            self.do(member.presence.remove(record, forget=True))
            if member.store.fault == "unanswered":  # it took the others' place, and was taken back
                place.named, place.untold = None, True
                self.known[who] = None
            return member, record
        if who in PARTICIPANTS:
            assert self.known[who] in (None, is_reconnect)
            self.known[who] = True
        place.live.append(sid)
        place.named, place.untold = None if member.may_be_swept else sid, False
        return member, record

    @rule(connection=consumes(connections))
    def leave(self, connection):
        member, record = connection
        if member not in self.members:
            return  # it crashed meanwhile
        if member.connections.pop(record.sid) is not None:
            self.do(member.presence.remove(record))
            self.ends(record)

    def ends(self, record):
        owner = record.user_id if isinstance(record, TeacherRecord) else record.client_id
        place = self.places[record.lesson_id, owner]
        place.live.remove(record.sid)
        if place.named in (None, record.sid):
            place.named, place.untold = None, bool(place.live)

    @rule(where=st.integers(0, 1))
    def crash(self, where):
        """kill -9; its lease runs out, and another process takes its place."""
        dead = self.members[where]
        # Not proven: a join between FLUSHALL and its node's next heartbeat, and the node dies before that too. Nobody
        # knows of its index then; see docs/faults.md.
        assume(self.redis.hexists("lesson_nodes", dead.node_id))
        self.do(dead.close())
        for record in filter(None, dead.connections.values()):
            self.ends(record)
        self.lease_runs_out(where)
        self.members[where] = self.new_member()

    @rule(where=st.integers(0, 1))
    def lease_runs_out(self, where):
        """The node was stopped for longer than its lease, or was cut off. It is alive, and may be swept."""
        member = self.members[where]
        if self.redis.hexists("lesson_nodes", member.node_id):
            member.may_be_swept = True
            self.redis.hset("lesson_nodes", member.node_id, LONG_AGO)
        for record in filter(None, member.connections.values()):
            owner = record.user_id if isinstance(record, TeacherRecord) else record.client_id
            self.places[record.lesson_id, owner].named = None

    @rule()
    def redis_loses_everything(self):
        self.redis.flushall()
        for place in self.places.values():
            place.named = None
        self.known = {who: None if self.is_anywhere(who) else False for who in PARTICIPANTS}

    def is_anywhere(self, who):
        """Whether a connection, or something owed to Redis, may still write of a person."""
        return any(self.places[lesson, who].live for lesson in LESSONS)

    @rule(where=st.integers(0, 1), fault=st.sampled_from(["unreachable", "unanswered"]))
    def outage(self, where, fault):
        self.members[where].store.fault = fault

    @rule(where=st.integers(0, 1))
    def outage_ends(self, where):
        self.members[where].store.fault = None

    @rule(where=st.integers(0, 1))
    def heartbeat(self, where):
        self.do(self.members[where].beat())

    # What must be true

    @invariant()
    def redis_names_only_those_who_have_been_there(self):
        for (lesson, who), place in self.places.items():
            if place.named is not None and not any(member.store.fault for member in self.members):
                assert self.told(lesson, who) == place.named

    @rule()
    def everything_settles(self):
        self.settle()

    def settle(self):
        """The outages end, what is owed is paid, and the nodes have had their heartbeats."""
        for member in self.members:
            member.store.fault = None
        for member in self.members:
            self.do(member.presence.settled())
        self.unfinished_sweeps_are_overdue()
        for _ in range(ENOUGH_BEATS):
            for member in self.members:
                self.do(member.beat())
        self.redis_tells_who_is_there()
        self.nobody_else_is_known()

    def unfinished_sweeps_are_overdue(self):
        for name in self.redis.hkeys("lesson_nodes"):
            if name.startswith("lost:"):
                self.redis.hset("lesson_nodes", name, LONG_AGO)

    def redis_tells_who_is_there(self):
        for (lesson, who), place in self.places.items():
            told = self.told(lesson, who)
            if place.named is not None:
                assert told == place.named
            elif place.live and not place.untold:
                assert told in place.live
            else:
                assert told is None or told in place.live
        for teacher in TEACHERS:
            lesson = self.redis.hget(teacher, "lesson_id")
            assert lesson is None or self.places[lesson, teacher].live, f"{teacher} is not in lesson {lesson}"

    def nobody_else_is_known(self):
        assert set(self.redis.hkeys("lesson_nodes")) == {member.node_id for member in self.members}
        indexes = {member.node_id: set(self.redis.hkeys(f"lesson_node_{member.node_id}")) for member in self.members}
        assert indexes == {
            member.node_id: {sid for sid, record in member.connections.items() if record} for member in self.members
        }
        assert set(self.redis.keys("lesson_node_*")) <= {f"lesson_node_{node_id}" for node_id in indexes}

    def told(self, lesson, who):
        """The sid by which Redis tells that somebody is in a lesson."""
        kind = "teacher" if who in TEACHERS else "student"
        return self.redis.hget(f"lesson_{kind}_{lesson}", who)


@pytest.mark.parametrize("steps", [15, 50], ids=["short stories", "long stories"])
def test_after_anything_redis_tells_who_is_in_a_lesson(stores, monkeypatch, steps):
    monkeypatch.setattr(presence_module, "RETRY_INTERVAL", 0)
    run_state_machine_as_test(
        lambda: Nodes(stores.redis_url),
        settings=settings(
            max_examples=1500 // steps,
            stateful_step_count=steps,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),  # not "explain", which traces every line
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
