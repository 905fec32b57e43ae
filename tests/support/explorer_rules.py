"""What must be true of Redis and of the answers, whatever has happened: contract, section 5. See explorer.py."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from explorer_clock import keys_of_server
from explorer_scenarios import FLUSH, Tab
from explorer_seats import Violation
from explorer_world import World
from joins import join_of

from lesson_server.errors import StoreUnavailable
from lesson_server.gateway.handlers import Answer
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.records import decode

LESSONS = "lesson_node_lessons"
CLAIMS = "lesson_node_claims:"  # how the keys of the claims begin
SUCCESS: Answer = {"status": "SUCCESS", "data": {}}
UNAVAILABLE: Answer = {"status": "ERROR", "message": str(StoreUnavailable("", ""))}


def nobody_is_absent(world: World) -> None:
    """Whoever has a live, joined connection is told of: at any time, but after FLUSHALL or while the node is swept.

    Raises:
        Violation: somebody is not.
    """
    if FLUSH in world.injected:
        return
    for tab in world.tabs.values():
        if is_live(world, tab) and tab.node not in world.scenario.stalled and shown(world, tab) is None:
            raise Violation(f"{tab.subject} is in lesson {tab.lesson_id} by {tab.sid}, and Redis says: absent")


def violations(world: World) -> list[str]:
    """Everything that is wrong after all has settled."""
    return [*_defects(world), *_events(world), *_records(world), *_own_keys(world), *_reconnects(world)]


def is_live(world: World, tab: Tab) -> bool:
    """Whether the connection has joined and is there."""
    return tab.sid not in world.left and world.members[tab.node].alive and _has_joined(world, tab)


def shown(world: World, tab: Tab) -> str | None:
    """The sid by which Redis tells that the person of a tab is in its lesson."""
    found: Any = world.redis.hget(tab.lesson_key, tab.subject)
    sid: str | None = found
    return sid


def _answers(world: World, tab: Tab) -> list[Answer | None]:
    """The acknowledgements that the tab has got; None: its join ended with the connection."""
    joins = (begun for begun in world.begun if begun.event == ("join", tab.sid))
    return [join.task.result() for join in joins if join.task is not None and join.task.done()]


def _has_joined(world: World, tab: Tab) -> bool:
    return SUCCESS in _answers(world, tab)


def _defects(world: World) -> Iterator[str]:
    """Errors are logged only when something unforeseen has happened."""
    yield from (f"logged: {message}" for message in world.log.messages)
    for member in world.members.values():
        yield from (f"node {member.name}: {error}" for error in member.loop.errors)


def _events(world: World) -> Iterator[str]:
    """Every join is answered, and every end ends."""
    for begun in world.begun:
        verb, who = begun.event
        if begun.task is None or not world.members[world.node_of(begun.event)].alive:
            continue
        if not begun.task.done():
            yield f"{begun.label} has no end"
        elif verb == "join":
            tab = world.tabs[who]
            answer = begun.task.result()
            allowed = [SUCCESS, *([UNAVAILABLE] if world.injected else ()), *([None] if who in world.left else ())]
            if answer not in allowed:
                yield f"{begun.label} was answered {answer}"
            connection = world.members[tab.node].gateway.connections.get(who)
            if is_live(world, tab) and (connection is None or not join_of(connection).is_present):
                yield f"{who} has joined, and is {connection}"


def _newest(world: World, tabs: list[Tab]) -> list[Tab]:
    """Those of the tabs that may have joined last. One joined before another when its write came first on every key
    that both wrote to; where the keys differ in that, any of the two may be the last."""
    return [tab for tab in tabs if not any(_is_before(world, tab, other) for other in tabs)]


def _is_before(world: World, tab: Tab, other: Tab) -> bool:
    orders = []
    for sids in world.writes.values():
        last = {sid: position for position, sid in enumerate(sids)}
        if tab is not other and tab.sid in last and other.sid in last:
            orders.append(last[tab.sid] < last[other.sid])
    return bool(orders) and all(orders)


def _records(world: World) -> Iterator[str]:
    """The records tell who is there: contract, section 5."""
    people: dict[tuple[str, str], list[Tab]] = {}
    for tab in world.tabs.values():
        people.setdefault((tab.client, tab.subject), []).append(tab)
    for (client, _), tabs in people.items():
        yield from _lessons(world, tabs)
        yield from (_teacher if client == "teacher" else _participant)(world, tabs)
    for lesson_id in {tab.lesson_id for tab in world.tabs.values() if is_live(world, tab)}:
        if world.redis.hlen(f"lesson_seat_{lesson_id}") != world.scenario.seat_count:
            yield f"lesson {lesson_id} has no seat map"
    for key in keys_of_server(world.redis):
        if (not key.startswith("lesson_node_") or key in _keys_of_seats(world)) and world.redis.ttl(key) < 0:
            yield f"{key} has no TTL"


def _lessons(world: World, tabs: list[Tab]) -> Iterator[str]:
    """In each lesson the newest live connection of a person stands, or none."""
    for lesson_id in {tab.lesson_id for tab in tabs}:
        in_lesson = [tab for tab in tabs if tab.lesson_id == lesson_id]
        live = [tab for tab in in_lesson if is_live(world, tab)]
        right = [tab.sid for tab in _newest(world, live)] or [None]
        sid = shown(world, in_lesson[0])
        if sid not in right:
            yield f"{tabs[0].subject} in lesson {lesson_id}: {sid} stands, and should be {_any_of(right)}"


def _teacher(world: World, tabs: list[Tab]) -> Iterator[str]:
    """``{user_id}`` names the lesson of the newest live connection."""
    subject = tabs[0].subject
    right = [tab.lesson_id for tab in _newest(world, [tab for tab in tabs if is_live(world, tab)])] or [None]
    lesson_id = world.redis.hget(subject, "lesson_id")
    if lesson_id not in right:
        yield f"{subject} is told to be in lesson {lesson_id}, and should be in {_any_of(right)}"


def _participant(world: World, tabs: list[Tab]) -> Iterator[str]:
    """``{client_id}`` names the newest live connection, and the same as its lesson does; else one that has joined."""
    subject = tabs[0].subject
    record = world.redis.hgetall(subject)
    sid = record.get("sid")
    live = [tab for tab in tabs if is_live(world, tab)]
    right: list[str | None] = [tab.sid for tab in _newest(world, live)]
    for tab in live:
        if tab.sid == sid and (in_lesson := shown(world, tab)) != sid:
            yield f"{subject}: {sid} is the newest connection, and in its lesson {in_lesson} stands"
    if not live:
        joined = [tab.sid for tab in tabs if _has_joined(world, tab)]
        # Of a join that was cut off nobody knows whether it had succeeded.
        cut_off = [tab.sid for tab in tabs if not all(_answers(world, tab)) or not world.members[tab.node].alive]
        right = [*joined, *cut_off, *([] if joined and FLUSH not in world.injected else [None])]
    if sid not in right:
        yield f"{{client_id}} of {subject} names {sid}, and should name {_any_of(right)}"
    if record and record != {"sid": sid, "client_id": subject, "role": "student"}:
        yield f"{{client_id}} of {subject} is {record}"


def _own_keys(world: World) -> Iterator[str]:
    """The server's own keys hold what is there, and nothing of dead nodes or ended connections."""
    living = {member.presence.claims.incarnation.node_id: member for member in world.members.values() if member.alive}
    presence = next(iter(living.values())).presence
    known = set(world.redis.hkeys(presence.claims.nodes_key))
    if known != living.keys():
        yield f"the nodes are {sorted(living)}, and Redis knows {sorted(known)}"
    if (named := set(world.redis.hkeys(presence.claims.figures_key))) != living.keys():
        yield f"the nodes are {sorted(living)}, and Redis has the figures of {sorted(named)}"
    expected: dict[str, set[str]] = {}
    found: dict[str, set[str]] = {}
    claims: dict[str, str] = {}  # name of a claim → the sid of its record
    for node_id, member in living.items():
        index_key = presence.claims.index_key(node_id)
        index: dict[Any, Any] = world.redis.hgetall(index_key)
        for number, text in index.items():
            record = decode(text)
            sid = claims[f"{node_id}:{number}:{record.role}"] = record.sid
            found.setdefault(index_key, set()).add(sid)
        for tab in world.tabs.values():
            if tab.node == member.name and is_live(world, tab):
                expected.setdefault(index_key, set()).add(tab.sid)
                for entry in tab.record.entries():
                    claims_key = f"{CLAIMS}{entry.fields[0]}{{{entry.name}}}"
                    expected.setdefault(claims_key, set()).add(tab.sid)
    for key in keys_of_server(world.redis, "lesson_node_*"):
        if key.startswith(CLAIMS):
            shown_claims: Any = world.redis.zrange(key, 0, -1, withscores=True)
            for claim, order in shown_claims:
                if order:  # else it is what is known of an ended connection
                    name = json.loads(claim)[0]
                    found.setdefault(key, set()).add(claims.get(name, f"claim {name} of no index"))
        elif key not in (
            presence.claims.nodes_key,
            presence.claims.figures_key,
            LESSONS,
            *_keys_of_seats(world),
            *map(presence.claims.index_key, living),
        ):
            yield f"{key} belongs to nobody"
    listed = set(world.redis.zrange(LESSONS, 0, -1))
    # A lesson that a check has listed while its last person left is removed by its next reader.
    if missing := {tab.lesson_id for tab in world.tabs.values() if is_live(world, tab)} - listed:
        yield f"the list of lessons lacks {sorted(missing)}"
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key, set()) != found.get(key, set()):
            yield f"{key} holds {sorted(found.get(key, ()))}, and should hold {sorted(expected.get(key, ()))}"


def _keys_of_seats(world: World) -> set[str]:
    """The keys beside the seat maps. The deadlines are not among them: none is left when all has settled."""
    maps = {keys.seat_map(tab.lesson_id) for tab in world.tabs.values()}
    return {key_of(key) for key in maps for key_of in (keys.seat_index, keys.freed_seats)}


def _reconnects(world: World) -> Iterator[str]:
    """Of the connections of a client exactly one is the first, and all others are reconnects."""
    if world.injected or any(answer != SUCCESS for tab in world.tabs.values() for answer in _answers(world, tab)):
        return
    reported = Counter(client_id for member in world.members.values() for client_id, *_ in member.analytics.reconnects)
    joined = Counter(
        tab.subject for tab in world.tabs.values() if tab.client == "participant" and _has_joined(world, tab)
    )
    for client_id, count in joined.items():
        if reported[client_id] != count - 1:
            yield f"{client_id} has joined by {count} connections, and {reported[client_id]} reconnects were reported"


def _any_of(values: Sequence[str | None]) -> str:
    return " or ".join(map(str, values))
