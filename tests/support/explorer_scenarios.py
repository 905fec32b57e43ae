"""What is explored: who joins, leaves and dies in which scenario. See explorer.py."""

import re
from dataclasses import dataclass

from lesson_server.stores.redis.claims import Claims
from lesson_server.stores.redis.records import ClientRecord, Record, TeacherRecord
from lesson_server.stores.redis.removals import Removals
from lesson_server.stores.redis.seat_deadlines import REPEAT_AFTER
from lesson_server.stores.redis.seats import Seats
from lesson_server.stores.redis.store import LATE_WRITE

# Kinds of faults; see explorer.py.
LOST, LATE, UNANSWERED, CRASH, FLUSH = "lost", "late", "unanswered", "crash", "flush"
FAULTS = (LOST, LATE, UNANSWERED, CRASH, FLUSH)


@dataclass(frozen=True, slots=True)
class Tab:
    """A tab of a browser, which connects to a node and joins a lesson. Its name is its sid."""

    sid: str
    node: str
    client: str
    subject: str
    lesson_id: str = "1"

    @property
    def auth(self) -> dict[str, str]:
        role = "teacher" if self.client == "teacher" else "student"
        return {"client": self.client, "lesson_id": self.lesson_id, "access_token": f"{role}:{self.subject}"}

    @property
    def lesson_key(self) -> str:
        return f"lesson_{'teacher' if self.client == 'teacher' else 'student'}_{self.lesson_id}"

    @property
    def record(self) -> Record:
        if self.client == "teacher":
            return TeacherRecord(self.sid, self.lesson_id, self.subject)
        return ClientRecord(self.sid, self.lesson_id, self.subject, "student")


# A verb and whom it concerns; see Scenario.actors.
Event = tuple[str, str]

# The Socket.IO events, by their verbs.
EVENTS_OF = {"join": "join_lesson", "take": "take_seat", "leave_seat": "leave_seat"}


def tab_of(who: str) -> str:
    """The tab, or the node, of the second half of an event."""
    return re.split("[@/]", who)[0]


def seat_in(who: str) -> int | None:
    """The seat that an event names, if it names one."""
    _, _, seat = who.partition("@")
    return int(seat) if seat else None


@dataclass(frozen=True)
class Scenario:
    """What happens, in any order.

    Attributes:
        name: one word for the command line.
        text: one line for people.
        tabs: the connections that there are.
        before: events that come first, each with all that follows from it.
        actors: the events of each actor. One begins when the one before it has begun, and need not have ended.
            ``("join", sid)``, ``("leave", sid)``; ``("take", sid)``, ``("take", "sid@seat")``, ``("leave_seat", sid)``;
            ``("tick", node)``: a heartbeat's time passes on a node; ``("check", node)``: all its records are to be
            checked; ``("sweep", node)``: it frees seats that are due; ``("pass", "time")``: so much time passes by the
            clock of Redis that everything is due. That is longer than a step waits, or a late write is on its way: it
            happens while nothing but sweeps of seats is under way.
        witness: nodes of which nothing happens, and that find out when another one dies.
        stalled: nodes that live and may be taken for lost: while they are being swept, their people are absent.
        faults: the kinds of faults that are injected. A kind that never happened is an error.
        max_faults: in one schedule.
        cluster: every key is on a master of its own, so that commands of one step have no order.
        seat_count: of each lesson.
        grace: seconds for which a seat outlives the last connection of its holder.
        claims: the class of the claims, for planted defects.
        removals, seats: likewise.
    """

    name: str
    text: str
    tabs: tuple[Tab, ...]
    actors: tuple[tuple[Event, ...], ...]
    before: tuple[Event, ...] = ()
    witness: tuple[str, ...] = ()
    stalled: tuple[str, ...] = ()
    faults: tuple[str, ...] = FAULTS
    max_faults: int = 1
    cluster: bool = False
    seat_count: int = 2
    grace: float = 0.0
    claims: type[Claims] = Claims
    removals: type[Removals] = Removals
    seats: type[Seats] = Seats

    @property
    def events(self) -> set[str]:
        """The names of the Socket.IO events that are sent: the charts of others would only cost time."""
        verbs = {verb for actor in (self.before, *self.actors) for verb, _ in actor}
        return {name for verb, name in EVENTS_OF.items() if verb in verbs}

    @property
    def nodes(self) -> tuple[str, ...]:
        named = {*self.witness, *(tab.node for tab in self.tabs)}
        events = [event for actor in (self.before, *self.actors) for event in actor]
        named |= {who for verb, who in events if verb in ("tick", "check", "sweep")}
        return tuple(sorted(named))

    @property
    def long_time(self) -> int:
        """Milliseconds after which everything that a node has written with a deadline is due."""
        return round(max(self.grace, LATE_WRITE) * 1_000) + REPEAT_AFTER + 1


def participant(sid: str, node: str, subject: str = "anna", lesson_id: str = "1") -> Tab:
    return Tab(sid, node, "participant", subject, lesson_id)


def teacher(sid: str, node: str, subject: str = "hill", lesson_id: str = "1") -> Tab:
    return Tab(sid, node, "teacher", subject, lesson_id)


PRESENCE_SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "join",
            "one join and its end",
            tabs=(participant("1", "a"),),
            witness=("b",),
            actors=((("join", "1"), ("leave", "1")),),
        ),
        Scenario(
            "again",
            "a join, which is tried again, and its end",
            tabs=(participant("1", "a"),),
            witness=("b",),
            actors=((("join", "1"), ("join", "1"), ("leave", "1")),),
        ),
        Scenario(
            "twice",
            "one person joins twice, on two nodes",
            tabs=(participant("1", "a"), participant("2", "b")),
            actors=((("join", "1"),), (("join", "2"),)),
        ),
        Scenario(
            "teacher",
            "one teacher joins twice, on two nodes",
            tabs=(teacher("1", "a"), teacher("2", "b")),
            actors=((("join", "1"),), (("join", "2"),)),
        ),
        Scenario(
            "tabs",
            "the later of two tabs ends while the earlier one joins",
            tabs=(participant("1", "a"), participant("2", "b")),
            before=(("join", "2"),),
            actors=((("join", "1"),), (("leave", "2"),)),
        ),
        Scenario(
            "move",
            "a teacher moves between lessons",
            tabs=(teacher("1", "a"), teacher("2", "b", lesson_id="2")),
            before=(("join", "1"),),
            actors=((("join", "2"),), (("leave", "1"),)),
        ),
        Scenario(
            "sweep",
            "a join against a sweep of its node, which lives and was silent",
            tabs=(participant("1", "a"), participant("2", "a", "ben")),
            before=(("join", "1"), ("tick", "b")),
            actors=((("join", "2"),), (("tick", "b"),)),
            stalled=("a",),
        ),
        Scenario(
            "comeback",
            "a node that was silent comes back while it is being swept",
            tabs=(participant("1", "a"),),
            before=(("join", "1"), ("tick", "b")),
            actors=((("tick", "a"),), (("tick", "b"),)),
            stalled=("a",),
        ),
        Scenario(
            "sweepers",
            "two nodes sweep a third one",
            tabs=(participant("1", "a"),),
            before=(("join", "1"), ("tick", "b"), ("tick", "c")),
            actors=((("tick", "b"),), (("tick", "c"),)),
            stalled=("a",),
        ),
        Scenario(
            "check",
            "a join against a check of all records",
            tabs=(participant("1", "a"), participant("2", "a")),
            before=(("join", "1"),),
            witness=("b",),
            actors=((("join", "2"),), (("check", "a"),)),
        ),
        Scenario(
            "cluster",
            "one join and its end, on a cluster of as many masters as there are keys",
            tabs=(participant("1", "a"),),
            witness=("b",),
            actors=((("join", "1"), ("leave", "1")),),
            # Not CRASH: a node that dies when one master has its record and another has not yet its index leaves a
            # ghost. Nor LATE, for then there is no order between a write and its removal on two masters.
            faults=(LOST, UNANSWERED, FLUSH),
            cluster=True,
        ),
        Scenario(
            "two-faults",
            "one join and its end, and two faults",
            tabs=(participant("1", "a"),),
            witness=("b",),
            actors=((("join", "1"), ("leave", "1")),),
            # Not FLUSH: between two commands of a write, it takes the index and leaves the record. Should the node die
            # before its next heartbeat, nobody knows of that.
            faults=(LOST, UNANSWERED, CRASH),
            max_faults=2,
        ),
    )
}
