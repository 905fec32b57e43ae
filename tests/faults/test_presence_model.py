"""Two nodes on one real Valkey against a model of who is where, through joins, moves, crashes, losses and outages.

Time is driven by hand: heartbeats and checks of the records are rules. The rules do to the nodes what production does;
:meth:`Nodes.everything_settles` then says what must be true, whatever has happened before. While nothing is out of
order, it is true after every single rule.
"""

import asyncio
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import redis
from fakes import BreakableStore
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from presences import GRACE, SHARED_KEYS, new_presence

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import claims as claims_module
from lesson_server.stores.redis import nodes as nodes_module
from lesson_server.stores.redis import removals
from lesson_server.stores.redis.nodes import LOST, Node
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.stores.redis.seats import Seats

PARTICIPANTS = ["anna", "ben"]
TEACHERS = ["hill"]
LESSONS = ["1", "2"]
RETENTION = 3600
# Heartbeats of others after which a silent node is lost. So few that now and then one that lives is swept.
LOST_AFTER = 2


class Member:
    """One node, and the records of its connections that have joined."""

    def __init__(self, url):
        self.store = BreakableStore(url, "", 2.0, 4)
        self.presence = new_presence(self.store, RETENTION)
        self.connections = {}
        # Redis has not lost what the others need in order to sweep the node: its index, its count.
        self.is_indexed = self.is_counted = True
        self.node = Node(self.store, self.presence, Seats(self.store, RETENTION, GRACE), self)

    # What a node asks of its connections

    def figures(self):
        return {"connections": len(self.connections), "guests": 0}

    def present(self):
        return list(self.connections)

    def seated(self):
        return {}

    async def restore(self, sids):
        for sid in sids:
            await self.presence.restore(self.connections[sid])
        return len(sids)

    # What the node's own loops do

    async def beat(self):
        try:
            await self.node.beat()
            self.is_counted = True
            await asyncio.gather(*self.node._sweeps.values())
        except StoreUnavailable:
            pass

    async def check(self):
        try:
            await self.node.check_records()
            self.is_indexed = True
        except StoreUnavailable:
            pass

    async def close(self):
        cleaner = self.presence.removals._cleaner
        await self.presence.removals.close()
        if cleaner is not None:
            await asyncio.wait([cleaner])
        await self.store.close()


@dataclass
class Live:
    """A connection that has joined."""

    record: Record
    owner: Member


class Nodes(RuleBasedStateMachine):
    """The rules are what happens in production."""

    connections = Bundle("connections")
    injected = 0  # by all machines of a test

    def __init__(self, url):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.url = url
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self.raw = redis.Redis.from_url(url)
        self.redis.flushall()
        self.numbers = itertools.count(1)
        # The order of the keys must not depend on chance, or Hypothesis could not replay a story.
        vars(claims_module)["secrets"].token_hex = lambda size: f"{next(self.numbers):04}"
        self.live: list[Live] = []  # in the order of joining
        self.known = dict.fromkeys(PARTICIPANTS, False)  # whether a join is a reconnect; None: the model can't know
        self.in_order = True  # nothing has happened after which Redis may tell the truth only later
        self.snapshot = {}
        self.members = [self.new_member(), self.new_member()]

    def teardown(self):
        try:
            self.settle()
        finally:
            for member in self.members:
                self.retire(member)
            self.loop.close()
            self.redis.close()
            self.raw.close()

    def retire(self, member):
        Nodes.injected += member.store.injected
        self.do(member.close())

    def do(self, work):
        return self.loop.run_until_complete(work)

    def new_member(self):
        member = Member(self.url)
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
        record = TeacherRecord(sid, lesson, who) if who in TEACHERS else ClientRecord(sid, lesson, who, "student")
        try:
            is_reconnect = self.do(member.presence.write(record))
        except StoreUnavailable:
            self.in_order = False
            self.do(member.presence.remove(sid, undo=True))
            return None
        if who in PARTICIPANTS:
            # Of a join whose answer got lost, Redis may know until its removal has been retried.
            assert self.known[who] in (None, is_reconnect) or not self.in_order
            self.known[who] = True
        member.connections[sid] = record
        live = Live(record, member)
        self.live.append(live)
        return live

    @rule(live=consumes(connections))
    def leave(self, live):
        if live in self.live:
            self.in_order &= not live.owner.store.fault
            del live.owner.connections[live.record.sid]
            self.live.remove(live)
            self.do(live.owner.presence.remove(live.record.sid))

    @rule(where=st.integers(0, 1))
    def crash(self, where):
        """kill -9, and another process takes its place."""
        dead = self.members[where]
        assume(dead.is_indexed and dead.is_counted)  # two faults at nearly the same time; see docs/faults.md
        self.retire(dead)
        self.in_order &= not dead.connections
        self.live = [live for live in self.live if live.owner is not dead]
        self.members[where] = self.new_member()

    @rule(where=st.integers(0, 1))
    def taken_for_lost(self, where):
        """The node was stopped for longer than the others wait. It is alive, and is swept."""
        self.in_order = False
        self.redis.hset("lesson_node_counts", self.members[where].presence.claims.incarnation.node_id, LOST)

    @rule()
    def redis_loses_everything(self):
        self.redis.flushall()
        self.redis_forgets()

    def redis_forgets(self):
        self.in_order = False
        here = {live.record.client_id for live in self.live if isinstance(live.record, ClientRecord)}
        self.known = {who: None if who in here else False for who in PARTICIPANTS}

    @rule()
    def redis_is_saved(self):
        # What a master has lost is not lost a second time, by a restart with data that lack it.
        assume(all(member.is_counted and member.is_indexed for member in self.members))
        self.snapshot = {key: self.raw.dump(key) for key in self.raw.scan_iter()}

    @rule()
    def redis_is_restarted_from_what_was_saved(self):
        for member in self.members:  # a restart ends connections, and with them what is under way
            if member.store.fault is None:
                self.do(member.presence.removals.settled())
        self.redis.flushall()
        for key, value in self.snapshot.items():
            self.raw.restore(key, 0, value)
        self.in_order = False
        self.known = dict.fromkeys(PARTICIPANTS, None)

    @rule(key=st.integers(0, 30))
    def a_key_is_lost(self, key):
        """One master of a cluster has come back empty."""
        keys = sorted(self.redis.scan_iter())
        if keys:
            lost = keys[key % len(keys)]
            living = {member.presence.claims.incarnation.node_id for member in self.members}
            assume(lost not in self.indexes() - {f"lesson_node_{node_id}" for node_id in living})  # as in crash()
            assume(lost != "lesson_node_counts" or set(self.redis.hkeys(lost)) <= living)
            self.redis.delete(lost)
            for member in self.members:
                member.is_indexed &= lost != f"lesson_node_{member.presence.claims.incarnation.node_id}"
                member.is_counted &= lost != "lesson_node_counts"
            self.in_order = False
            self.known = dict.fromkeys(PARTICIPANTS, None)

    @rule(where=st.integers(0, 1), fault=st.sampled_from(["unreachable", "unanswered"]))
    def outage(self, where, fault):
        self.members[where].store.fault = fault

    @rule(where=st.integers(0, 1))
    def outage_ends(self, where):
        self.members[where].store.fault = None

    @rule(where=st.integers(0, 1))
    def heartbeat(self, where):
        others = {
            member.presence.claims.incarnation.node_id for member in self.members if member is not self.members[where]
        }
        self.do(self.members[where].beat())
        lost = {name for name in others if int(self.redis.hget("lesson_node_counts", name) or 0) <= 0}
        self.in_order &= not lost

    @rule(where=st.integers(0, 1))
    def check(self, where):
        self.do(self.members[where].check())

    # What must be true

    @invariant()
    def in_order_redis_tells_the_truth(self):
        if self.in_order:
            self.redis_tells_who_is_there()

    @rule()
    def everything_settles(self):
        self.settle()

    def settle(self):
        """The outages end, pending removals are carried out, and the nodes have had their heartbeats and checks."""
        for member in self.members:
            member.store.fault = None
        for member in self.members:
            self.do(member.presence.removals.settled())
        for _ in range(2):
            # One node may have taken the other for lost; and what is lost is swept before it is checked.
            for _ in range(LOST_AFTER + 2):
                for member in self.members:
                    self.do(member.beat())
            for member in self.members:
                self.do(member.check())
        self.redis_tells_who_is_there()
        self.nobody_else_is_known()
        self.in_order = True
        for who in PARTICIPANTS:
            self.known[who] = self.redis.hexists(who, "sid")

    def redis_tells_who_is_there(self):
        newest = {}
        for live in self.live:
            for entry in live.record.entries():
                newest[entry.name, entry.fields[0]] = entry.fields[1]
        for lesson, who in itertools.product(LESSONS, PARTICIPANTS):
            key = f"lesson_student_{lesson}"
            assert self.redis.hget(key, who) == newest.get((key, who))
        for lesson, who in itertools.product(LESSONS, TEACHERS):
            key = f"lesson_teacher_{lesson}"
            assert self.redis.hget(key, who) == newest.get((key, who))
        for who in TEACHERS:
            assert self.redis.hget(who, "lesson_id") == newest.get((who, "lesson_id"))
        for who in PARTICIPANTS:
            sid = self.redis.hget(who, "sid")
            if (who, "sid") in newest:
                assert sid == newest[who, "sid"]
            assert self.known[who] in (None, sid is not None)

    def indexes(self):
        return {key for key in self.redis.scan_iter("lesson_node_*") if "claims" not in key} - SHARED_KEYS

    def nobody_else_is_known(self):
        node_ids = {member.presence.claims.incarnation.node_id for member in self.members}
        assert set(self.redis.hkeys("lesson_node_counts")) == node_ids
        assert self.indexes() <= {f"lesson_node_{node_id}" for node_id in node_ids}
        for member in self.members:
            node_id = member.presence.claims.incarnation.node_id
            assert self.redis.hlen(f"lesson_node_{node_id}") == len(member.connections)
        # A lesson that a restore of older data has listed is removed by its next reader.
        assert set(self.redis.zrange("lesson_node_lessons", 0, -1)) >= {live.record.lesson_id for live in self.live}
        claims = {(entry.name, entry.fields[0]): 0 for live in self.live for entry in live.record.entries()}
        for live in self.live:
            for entry in live.record.entries():
                claims[entry.name, entry.fields[0]] += 1
        stored = {key: self.redis.zcount(key, 1, "+inf") for key in self.redis.scan_iter("lesson_node_claims*")}
        assert stored == {f"lesson_node_claims:{field}{{{name}}}": count for (name, field), count in claims.items()}


@pytest.mark.parametrize("steps", [15, 50], ids=["short stories", "long stories"])
def test_after_anything_redis_tells_who_is_in_a_lesson(stores, monkeypatch, steps):
    monkeypatch.setattr(removals, "RETRY_INTERVAL", 0)
    monkeypatch.setattr(removals, "UNINDEX_INTERVAL", 0)
    monkeypatch.setattr(removals, "LATE_WRITE", 0)  # nothing is late here: commands are carried out at once
    monkeypatch.setattr(nodes_module, "LOST_AFTER", LOST_AFTER)
    monkeypatch.setattr(Nodes, "injected", 0)
    monkeypatch.setattr(claims_module, "secrets", SimpleNamespace())
    run_state_machine_as_test(
        lambda: Nodes(stores.redis_url),  # type: ignore[arg-type]
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
    assert Nodes.injected > 0, "no outage has ever made a command fail"
