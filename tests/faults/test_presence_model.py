"""Two nodes on one real Valkey against a model of who is where, and in which seat.

Through joins, moves, seats that are taken and left, crashes, losses and outages.

Time is driven by hand: heartbeats, checks of the records, sweeps of the seats and graces are rules. The rules do to the
nodes what production does; :meth:`Nodes.everything_settles` then says what must be true, whatever has happened before.
While nothing is out of order, it is true after every single rule.
"""

import asyncio
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from fakes import BreakableStore
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kept_seats import Holder, KeptSeats
from presences import GRACE, SHARED_KEYS, new_presence

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import claims as claims_module
from lesson_server.stores.redis import keys, removals
from lesson_server.stores.redis import nodes as nodes_module
from lesson_server.stores.redis.nodes import LOST, Node
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.stores.redis.seats import Seats

PARTICIPANTS = ["anna", "ben"]
TEACHERS = ["hill"]
LESSONS = {"1": 2, "2": 1}  # with their seats
NO_SEAT = 0  # what somebody asks for who leaves a seat, or joins and asks for none
JOIN: dict[str, Any] = {
    "where": st.integers(0, 1),
    "lesson": st.sampled_from(list(LESSONS)),
    "who": st.sampled_from(PARTICIPANTS + TEACHERS),
    "wanted": st.sampled_from([NO_SEAT, None, 1, 2]),
}
RETENTION = 3600
# Heartbeats of others after which a silent node is lost. So few that now and then one that lives is swept.
LOST_AFTER = 2


class Member:
    """One node, and its connections that have joined: their records, and the seats that they know."""

    def __init__(self, url):
        self.store = BreakableStore(url, "", 2.0, 4)
        self.presence = new_presence(self.store, RETENTION)
        self.seats = Seats(self.store, RETENTION, GRACE)
        self.connections = {}
        self.seat_of = {}
        # Redis has not lost what the others need in order to sweep the node: its index, its count.
        self.is_indexed = self.is_counted = True
        self.node = Node(self.store, self.presence, self.seats, self)

    # What a node asks of its connections

    def figures(self):
        return {"connections": len(self.connections), "guests": 0}

    def present(self):
        return list(self.connections)

    def seated(self):
        return {
            lesson_id: [sid for sid, record in self.connections.items() if record.lesson_id == lesson_id]
            for lesson_id in {record.lesson_id for record in self.connections.values()}
        }

    def holders(self):
        return {
            sid: (record.lesson_id, person_of(record)) for sid, record in self.connections.items() if self.seat_of[sid]
        }

    async def restore(self, sids):
        for sid in sids:
            record = self.connections[sid]
            person = person_of(record)
            seat = await self.seats.ensure_map(record.lesson_id, LESSONS[record.lesson_id], person)
            self.seat_of[sid] = seat or self.seat_of[sid]
            await self.presence.restore(record)
            if self.seat_of[sid]:
                self.seat_of[sid] = await self.seats.restore(record.lesson_id, person, self.seat_of[sid])
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

    @property
    def holder(self) -> Holder | None:
        """Who sits where, of a participant."""
        person = person_of(self.record)
        return (self.record.lesson_id, person) if person else None


def person_of(record: Record) -> str | None:
    return record.client_id if isinstance(record, ClientRecord) else None


class Nodes(RuleBasedStateMachine):
    """The rules are what happens in production."""

    connections = Bundle("connections")
    injected = 0  # by all machines of a test

    def __init__(self, url, faults):
        super().__init__()
        self.faults = faults
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
        self.saved_at = 0.0
        self.seats = KeptSeats(self.redis, LESSONS, GRACE)
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

    # What happens. Rules that are much alike are one rule, so that people do more than faults

    @initialize(target=connections, **JOIN)
    def join_first(self, **details):
        """Nothing much happens in an empty lesson."""
        return self.join(**details)

    @initialize(target=connections, **JOIN)
    def join_second(self, **details):
        return self.join(**details)

    @rule(target=connections, **JOIN)
    def join(self, where, lesson, who, wanted):
        member, sid = self.members[where], f"sid{next(self.numbers)}"
        record = TeacherRecord(sid, lesson, who) if who in TEACHERS else ClientRecord(sid, lesson, who, "student")
        try:
            seat = self.do(member.seats.ensure_map(lesson, LESSONS[lesson], person_of(record)))
            is_reconnect = self.do(member.presence.write(record))
        except StoreUnavailable:
            self.in_order = False
            self.do(member.presence.remove(sid, undo=True))
            return None
        if who in PARTICIPANTS:
            # Of a join whose answer got lost, Redis may know until its removal has been retried.
            assert self.known[who] in (None, is_reconnect) or not self.in_order
            self.known[who] = True
        live = Live(record, member)
        if live.holder:
            self.seats.joined(live.holder, seat, doubled=live.holder in self.holders(), exact=self.in_order)
        member.connections[sid] = record
        member.seat_of[sid] = seat
        self.live.append(live)
        if wanted != NO_SEAT:
            self.take_seat(live, wanted)
        return live

    @rule(live=consumes(connections))
    def leave(self, live):
        if live in self.live:
            self.in_order &= not live.owner.store.fault
            del live.owner.connections[live.record.sid]
            self.end([live])
            self.do(live.owner.presence.remove(live.record.sid))

    def end(self, ended):
        self.live = [live for live in self.live if live not in ended]
        for holder in {live.holder for live in ended} - {None, *self.holders()}:
            self.seats.gone(holder)

    def holders(self):
        """The participants who are there."""
        return [live.holder for live in self.live if live.holder]

    @rule(live=connections, wanted=st.sampled_from([NO_SEAT, None, 1, 2]))
    def asks_for_seat(self, live, wanted):
        if wanted == NO_SEAT:
            self.leave_seat(live)
        else:
            self.take_seat(live, wanted)

    def take_seat(self, live, wanted):
        if live in self.live and live.holder:
            member, (lesson, person) = live.owner, live.holder
            try:
                answer = self.do(member.seats.take(lesson, person, wanted, LESSONS[lesson]))
            except StoreUnavailable:
                self.in_order = False
                self.seats.unanswered(live.holder)
            else:
                self.seats.took(live.holder, wanted, answer, exact=self.in_order)
                member.seat_of[live.record.sid] = answer[1] or member.seat_of[live.record.sid]

    def leave_seat(self, live):
        if live in self.live and live.holder:
            try:
                self.do(live.owner.seats.leave(*live.holder))
            except StoreUnavailable:
                self.in_order = False
                self.seats.unanswered(live.holder)
            else:
                self.seats.left_seat(live.holder)
                live.owner.seat_of[live.record.sid] = 0

    # No sum of these is 1: a seat is never due in just this moment.
    @rule(graces=st.sampled_from([1.1, 0.7, 0.4]), sweeper=st.sampled_from([0, 1, None]))
    def time_passes(self, graces, sweeper):
        self.seats.time_passes(graces * GRACE)
        if sweeper is not None:
            self.sweep(self.members[sweeper])

    @rule(where=st.integers(0, 1), work=st.sampled_from(["heartbeat", "check"]))
    def node_works(self, where, work):
        getattr(self, work)(self.members[where])

    def heartbeat(self, member):
        others = {other.presence.claims.incarnation.node_id for other in self.members if other is not member}
        self.do(member.beat())
        lost = {name for name in others if int(self.redis.hget("lesson_node_counts", name) or 0) <= 0}
        self.in_order &= not lost

    def check(self, member):
        self.do(member.check())

    def sweep(self, member):
        try:
            self.do(member.seats.sweep())
        except StoreUnavailable:
            self.in_order = False
        else:
            self.seats.swept()

    @precondition(lambda self: self.faults)
    @rule(
        what=st.sampled_from(
            ["crash", "taken_for_lost", "unreachable", "unanswered", "saved", "restarted", "emptied", "key", "seats"]
        ),
        where=st.integers(0, 1),
        key=st.integers(0, 30),
    )
    def fault(self, what, where, key):
        match what:
            case "crash":
                self.crash(where)
            case "taken_for_lost":
                self.taken_for_lost(where)
            case "unreachable" | "unanswered":
                self.begin_outage(self.members[where], what)
            case "saved":
                self.redis_is_saved()
            case "restarted":
                self.redis_is_restarted_from_what_was_saved()
            case "emptied":
                self.redis_loses_everything()
            case "key":
                self.a_key_is_lost(key)
            case "seats":
                self.seats_are_lost(list(LESSONS)[where])

    def begin_outage(self, member, fault):
        # What has been removed, and not yet from the index, is removed again: the grace of a seat begins anew.
        self.in_order &= member.presence.removals._cleaner is None
        member.store.fault = fault

    @precondition(lambda self: any(member.store.fault for member in self.members))
    @rule()
    def outages_end(self):
        for member in self.members:
            member.store.fault = None

    def crash(self, where):
        """kill -9, and another process takes its place."""
        dead = self.members[where]
        assume(dead.is_indexed and dead.is_counted)  # two faults at nearly the same time; see docs/faults.md
        self.retire(dead)
        self.in_order &= not dead.connections
        self.end([live for live in self.live if live.owner is dead])
        self.members[where] = self.new_member()

    def taken_for_lost(self, where):
        """The node was stopped for longer than the others wait. It is alive, and is swept."""
        self.in_order = False
        self.redis.hset("lesson_node_counts", self.members[where].presence.claims.incarnation.node_id, LOST)

    def redis_loses_everything(self):
        self.in_order = False
        self.redis.flushall()
        here = {live.record.client_id for live in self.live if isinstance(live.record, ClientRecord)}
        self.known = {who: None if who in here else False for who in PARTICIPANTS}

    def redis_is_saved(self):
        # What a master has lost is not lost a second time, by a restart with data that lack it.
        assume(all(member.is_counted and member.is_indexed for member in self.members))
        self.snapshot = {key: self.raw.dump(key) for key in self.raw.scan_iter()}
        self.saved_at = self.seats.now

    def redis_is_restarted_from_what_was_saved(self):
        for member in self.members:  # a restart ends connections, and with them what is under way
            if member.store.fault is None:
                self.do(member.presence.removals.settled())
        self.redis.flushall()
        for key, value in self.snapshot.items():
            self.raw.restore(key, 0, value)
        self.seats.age(self.seats.now - self.saved_at)
        self.seats.rewound()
        self.in_order = False
        self.known = dict.fromkeys(PARTICIPANTS, None)

    def a_key_is_lost(self, key):
        """One master of a cluster has come back empty."""
        found = sorted(key for key in self.redis.scan_iter() if "lesson_seat_" not in key)
        if found:
            lost = found[key % len(found)]
            living = {member.presence.claims.incarnation.node_id for member in self.members}
            assume(lost not in self.indexes() - {f"lesson_node_{node_id}" for node_id in living})  # as in crash()
            assume(lost != "lesson_node_counts" or set(self.redis.hkeys(lost)) <= living)
            # A seat in its grace is then kept until its holder comes back; see docs/faults.md.
            assume(lost != keys.SEAT_DEADLINES or not self.seats.somebody_is_gone(self.holders()))
            self.redis.delete(lost)
            for member in self.members:
                member.is_indexed &= lost != f"lesson_node_{member.presence.claims.incarnation.node_id}"
                member.is_counted &= lost != "lesson_node_counts"
            self.in_order = False
            self.known = dict.fromkeys(PARTICIPANTS, None)

    def seats_are_lost(self, lesson):
        """One master of a cluster has come back empty: the keys of a lesson's seats are in one slot."""
        seat_map = keys.seat_map(lesson)
        self.redis.delete(seat_map, keys.seat_index(seat_map), keys.freed_seats(seat_map))
        self.in_order = False

    # What must be true

    @invariant()
    def in_order_redis_tells_the_truth(self):
        if self.in_order:
            self.redis_tells_who_is_there()
            self.seats.are_exact()

    @precondition(lambda self: not self.in_order)
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
        self.seats.nobody_has_lost_one(self.holders())
        for _ in range(2):  # what a node has begun, and has not ended in the first, another one ends in the second
            self.seats.time_passes(self.seats.longer_than_any_grace())
            for member in self.members:
                self.do(member.seats.sweep())
        self.seats.nobody_keeps_one(self.holders())
        self.seats.are_in_order()
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
        return {key for key in self.redis.scan_iter("lesson_node_*") if "{" not in key} - SHARED_KEYS

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


# Most of what people do finds its way into the stories without faults: a fault is as likely as all that people do.
@pytest.mark.without_coverage
@pytest.mark.parametrize(
    ("steps", "faults"), [(15, True), (50, True), (50, False)], ids=["short stories", "long stories", "without faults"]
)
def test_after_anything_redis_tells_who_is_in_a_lesson(stores, monkeypatch, steps, faults):
    monkeypatch.setattr(removals, "RETRY_INTERVAL", 0)
    monkeypatch.setattr(removals, "UNINDEX_INTERVAL", 0)
    monkeypatch.setattr(removals, "LATE_WRITE", 0)  # nothing is late here: commands are carried out at once
    monkeypatch.setattr(nodes_module, "LOST_AFTER", LOST_AFTER)
    monkeypatch.setattr(Nodes, "injected", 0)
    monkeypatch.setattr(claims_module, "secrets", SimpleNamespace())
    run_state_machine_as_test(
        lambda: Nodes(stores.redis_url, faults),  # type: ignore[arg-type]
        settings=settings(
            max_examples=2000 // steps,
            stateful_step_count=steps,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),  # not "explain", which traces every line
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Nodes.injected > 0 or not faults, "no outage has ever made a command fail"
