"""roster.py: who is in which lesson, read from a real Valkey."""

import asyncio

import orjson
import pytest
from fakes import BreakableStore
from node_keys import House

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import roster as roster_module
from lesson_server.stores.redis.nodes import LOST_AFTER
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord
from lesson_server.stores.redis.roster import LessonCounts, LessonRoster, NodeFigures, Person, Roster

LIST = "lesson_node_lessons"


class Busy:
    """A server that is answering events for some time."""

    def __init__(self):
        self.times = 0
        self.looks = 0

    def __call__(self):
        self.looks += 1
        return self.looks <= self.times


@pytest.fixture
def busy():
    return Busy()


@pytest.fixture
def open_roster(io_loop, stores, busy):
    opened = []

    def open_roster(key_prefix=""):
        opened.append(BreakableStore(stores.redis_url, key_prefix, 5.0, 4))
        return Roster(opened[-1], busy)

    yield open_roster
    for store in opened:
        io_loop.run_sync(store.close)


@pytest.fixture
def roster(open_roster):
    return open_roster()


def fill(redis_client, *lesson_ids):
    """Writes lessons with one participant each, as another program might."""
    with redis_client.pipeline() as pipeline:
        for lesson_id in lesson_ids:
            pipeline.zadd(LIST, {lesson_id: 0})
            pipeline.hset(f"lesson_student_{lesson_id}", "p1", "sid")
        pipeline.execute()


async def pages(roster, limit):
    """The lesson ids on each page."""
    found, after = [], None
    while page := await roster.lessons(after, limit):
        found.append([lesson.lesson_id for lesson in page])
        after = found[-1][-1]
    return found


# The lessons


@pytest.mark.gen_test
async def test_lessons_are_counted_with_their_seats(roster, a: House, b: House, redis_client):
    await a.join(TeacherRecord("1", "2", "t1"), ClientRecord("2", "2", "p1", "student"))
    await b.join(TeacherRecord("3", "2", "t2"), ClientRecord("4", "2", "p1", "student"))  # p1 once more
    await b.join(ClientRecord("5", "1", "p2", "student"))
    redis_client.hset("lesson_seat_2", mapping={"1": "", "2": "p1", "3": "", "4": "p9"})
    assert await roster.lessons(None, 10) == [LessonCounts("1", 0, 1, 0, 0), LessonCounts("2", 2, 1, 4, 2)]


@pytest.mark.gen_test
async def test_nobody_is_nowhere(roster):
    assert await roster.lessons(None, 10) == []
    assert await roster.lesson("1") is None
    assert await roster.nodes() == []


@pytest.mark.gen_test
async def test_every_lesson_is_on_one_page_in_order(roster, redis_client, monkeypatch):
    monkeypatch.setattr(roster_module, "LESSONS_AT_ONCE", 4)
    ids = sorted(f"lesson-{number}" for number in range(25))
    fill(redis_client, *ids)
    for limit in (1, 3, 4, 5, 24, 25, 26):
        found = await pages(roster, limit)
        assert [lesson_id for page in found for lesson_id in page] == ids
        assert {len(page) for page in found[:-1]} <= {limit}


@pytest.mark.gen_test
async def test_a_page_is_full_also_when_empty_lessons_are_among_them(roster, redis_client, monkeypatch):
    monkeypatch.setattr(roster_module, "LESSONS_AT_ONCE", 3)
    fill(redis_client, "b", "e", "h")
    redis_client.zadd(LIST, dict.fromkeys("acdfgij", 0))
    assert await pages(roster, 2) == [["b", "e"], ["h"]]
    assert redis_client.zrange(LIST, 0, -1) == ["b", "e", "h"]


@pytest.mark.gen_test
async def test_a_lesson_that_vanishes_or_comes_between_two_pages_moves_no_other(roster, redis_client):
    fill(redis_client, "a", "c", "e", "g")
    first = await roster.lessons(None, 2)
    assert [lesson.lesson_id for lesson in first] == ["a", "c"]
    redis_client.delete("lesson_student_c", "lesson_student_e")
    redis_client.zrem(LIST, "c")
    fill(redis_client, "b", "d")
    assert [lesson.lesson_id for lesson in await roster.lessons("c", 10)] == ["d", "g"]


@pytest.mark.gen_test
async def test_a_stale_entry_is_removed_by_a_reader(roster, redis_client):
    redis_client.zadd(LIST, {"1": 0, "2": 0})
    redis_client.hset("lesson_seat_1", "1", "")
    fill(redis_client, "2")
    assert [lesson.lesson_id for lesson in await roster.lessons(None, 10)] == ["2"]
    assert redis_client.zrange(LIST, 0, -1) == ["2"]
    redis_client.delete("lesson_student_2")
    assert [part async for part in roster.all_lessons()] == [[]]
    assert not redis_client.exists(LIST)


@pytest.mark.gen_test
async def test_two_thousand_lessons_are_all_there(roster, redis_client):
    ids = sorted(f"{number:04}" for number in range(2000))
    fill(redis_client, *ids)
    parts = [part async for part in roster.all_lessons()]
    assert [lesson.lesson_id for part in parts for lesson in part] == ids
    assert max(map(len, parts)) == roster_module.LESSONS_AT_ONCE
    assert [len(page) for page in await pages(roster, 500)] == [500] * 4


# A lesson


@pytest.mark.gen_test
async def test_each_person_stands_once_by_the_newest_connection(roster, a, b, redis_client):
    await a.join(TeacherRecord("a-t", "1", "t2"), ClientRecord("a-p", "1", "p1", "student"))
    await b.join(ClientRecord("b-p", "1", "p1", "assistant"), TeacherRecord("b-t", "1", "t1"))
    seconds, microseconds = redis_client.time()
    found = await roster.lesson("1")
    assert [(one.id, one.sid, one.role, one.node) for one in found.teachers] == [
        ("t1", "b-t", "teacher", b.node_id),
        ("t2", "a-t", "teacher", a.node_id),
    ]
    (participant,) = found.participants
    assert (participant.id, participant.sid, participant.role, participant.node) == (
        *("p1", "b-p", "assistant"),
        b.node_id,
    )
    assert all(0 <= seconds + microseconds / 1e6 - one.since < 20 for one in (*found.teachers, participant))
    await b.leave(ClientRecord("b-p", "1", "p1", "assistant"))
    (participant,) = (await roster.lesson("1")).participants
    assert (participant.sid, participant.role, participant.node) == ("a-p", "student", a.node_id)


@pytest.mark.gen_test
async def test_a_role_may_be_any_that_a_token_has(roster, a):
    await a.join(ClientRecord("sid", "1", "a:b.c@d-e_f", "Co-Teacher_2"))
    (participant,) = (await roster.lesson("1")).participants
    assert (participant.id, participant.role, participant.node) == ("a:b.c@d-e_f", "Co-Teacher_2", a.node_id)


@pytest.mark.gen_test
async def test_of_whom_another_program_has_written_only_the_sid_is_known(roster, a, redis_client):
    await a.join(ClientRecord("sid", "1", "p2", "student"))
    redis_client.hset("lesson_student_1", "p1", "a sid")
    redis_client.hset("lesson_teacher_1", "", "another")
    found = await roster.lesson("1")
    assert found.participants[0] == Person("p1", "a sid", None, None, None)
    assert found.participants[1].node == a.node_id
    assert found.teachers == [Person("", "another", None, None, None)]


@pytest.mark.gen_test
async def test_seats_are_in_the_order_of_their_numbers(roster, redis_client):
    redis_client.hset("lesson_seat_1", mapping={"10": "p1", "9": "", "1": "", "100": "", "front": "p2"})
    found = await roster.lesson("1")
    assert found == LessonRoster("1", {"front": "p2", "1": "", "9": "", "10": "p1", "100": ""}, [], [])
    assert list(found.seats) == ["front", "1", "9", "10", "100"]


@pytest.mark.gen_test
async def test_ten_thousand_people_and_seats_are_all_there(roster, redis_client):
    people = {f"p{number:05}": f"sid-{number}" for number in range(10_000)}
    seats = {str(number): f"p{number:05}" if number % 2 else "" for number in range(10_000)}
    with redis_client.pipeline() as pipeline:
        pipeline.hset("lesson_student_1", mapping=people)
        pipeline.hset("lesson_seat_1", mapping=seats)
        pipeline.zadd(LIST, {"1": 0})
        for number, (person, sid) in enumerate(people.items()):
            claim = orjson.dumps([f"node:{number}:student", person, sid])
            pipeline.zadd(f"lesson_node_claims:{person}{{lesson_student_1}}", {claim: 1_000_000 * (number + 1)})
        pipeline.execute()
    found = await roster.lesson("1")
    assert found.seats == seats
    assert list(found.seats) == [str(number) for number in range(10_000)]
    assert found.participants == [
        Person(person, sid, "student", "node", float(number + 1)) for number, (person, sid) in enumerate(people.items())
    ]
    assert await roster.lessons(None, 1) == [LessonCounts("1", 0, 10_000, 10_000, 5_000)]


@pytest.mark.gen_test
async def test_who_joins_or_leaves_while_the_lesson_is_read_changes_nothing_for_the_rest(
    roster, redis_client, monkeypatch
):
    people = {f"p{number}": "sid" for number in range(1000)}
    redis_client.hset("lesson_student_1", mapping=people)
    monkeypatch.setattr(roster_module, "PEOPLE_AT_ONCE", 100)
    execute = roster._store.execute
    reads = []

    async def change(*commands, bookkeeping=()):
        if commands[0][0] == "EVAL":
            reads.append(commands)
            redis_client.hset("lesson_student_1", mapping={f"new{len(reads)}-{n}": "sid" for n in range(50)})
            redis_client.hdel("lesson_student_1", f"p{len(reads)}")
        return await execute(*commands, bookkeeping=bookkeeping)

    monkeypatch.setattr(roster._store, "execute", change)
    found = await roster.lesson("1")
    ids = [person.id for person in found.participants]
    assert len(reads) > 5
    assert len(set(ids)) == len(ids)
    left = {f"p{number}" for number in range(1, len(reads) + 1)}
    assert people.keys() - left <= set(ids)


# Who holds a person


@pytest.mark.gen_test
async def test_connections_of_a_person_are_those_that_have_a_claim_and_the_one_that_is_shown(
    roster, a, b, redis_client
):
    assert await roster.connections("lesson_student_1", "p1") == {}
    await a.join(ClientRecord("a-p", "1", "p1", "student"))
    await b.join(ClientRecord("b-p", "1", "p1", "a:b"))
    expected = {"b-p": (b.node_id, 1, "a:b"), "a-p": (a.node_id, 1, "student")}
    assert await roster.connections("lesson_student_1", "p1") == expected
    redis_client.hset("lesson_student_1", "p1", "foreign")
    assert await roster.connections("lesson_student_1", "p1") == {"foreign": None, **expected}
    assert await roster.connections("lesson_teacher_1", "p1") == {}


# The nodes


@pytest.mark.gen_test
async def test_nodes_that_live_say_what_they_hold(roster, a, b, redis_client):
    await a.join(ClientRecord("1", "1", "p1", "student"), ClientRecord("2", "1", "p2", "student"))
    await a.beat()
    nodes = await roster.nodes()
    assert [(node.node, node.connections, node.guests) for node in nodes] == sorted(
        [(a.node_id, 2, 0), (b.node_id, 0, 0)]
    )
    await b.beat(LOST_AFTER + 2)
    assert [node.node for node in await roster.nodes()] == [b.node_id]
    assert redis_client.hkeys("lesson_node_figures") == [b.node_id]


@pytest.mark.gen_test
async def test_a_node_of_another_version_may_say_more_or_nothing(roster, a, redis_client):
    redis_client.hset("lesson_node_counts", mapping={"newer": 1, "silent": 1, "lost": -5})
    said = {"connections": 3, "guests": 1, "heard_of": 7.0}
    redis_client.hset("lesson_node_figures", "newer", orjson.dumps({**said, "seats": 9}))
    redis_client.hset("lesson_node_figures", "lost", orjson.dumps(said))
    redis_client.hset("lesson_node_figures", "forgotten", orjson.dumps(said))
    assert NodeFigures("newer", 3, 1, 7.0) in await roster.nodes()
    assert {node.node for node in await roster.nodes()} == {"newer", a.node_id}


# In general


@pytest.mark.parametrize("prefix", ["school:", "{tag}", "a b"])
@pytest.mark.gen_test
async def test_all_is_read_with_the_prefix_of_all_keys(open_roster, open_presence, redis_client, prefix):
    presence, roster = open_presence(key_prefix=prefix), open_roster(prefix)
    await presence.write(ClientRecord("sid-p", "1", "p1", "student"))
    redis_client.hset(f"{prefix}lesson_seat_1", "1", "p1")
    fill(redis_client, "1", "2")
    assert await roster.lessons(None, 10) == [LessonCounts("1", 0, 1, 1, 1)]
    found = await roster.lesson("1")
    assert (found.seats, found.participants[0].role) == ({"1": "p1"}, "student")
    assert list(await roster.connections("lesson_student_1", "p1")) == ["sid-p"]
    assert await roster.lesson("2") is None


@pytest.mark.gen_test
async def test_a_reader_waits_while_events_are_answered_but_not_for_ever(roster, redis_client, busy, monkeypatch):
    fill(redis_client, "1")
    monkeypatch.setattr(roster_module, "BUSY_PATIENCE", 10.0)
    busy.times = 3
    assert len(await roster.lessons(None, 1)) == 1
    assert busy.looks > 3
    monkeypatch.setattr(roster_module, "BUSY_PATIENCE", 0.01)
    busy.times = 10**9
    assert (await roster.lesson("1")).participants


@pytest.mark.gen_test
async def test_an_outage_is_no_empty_lesson(roster, redis_client):
    fill(redis_client, "1")
    roster._store.fault = "unreachable"
    reads = [
        lambda: roster.lessons(None, 10),
        lambda: roster.lesson("1"),
        lambda: roster.connections("lesson_student_1", "p1"),
        roster.nodes,
    ]
    for read in reads:
        with pytest.raises(StoreUnavailable):
            await read()
    assert roster._store.injected == len(reads)


@pytest.mark.gen_test
async def test_a_key_of_another_type_hides_no_other_lesson(roster, redis_client):
    """An operator sees the lesson without what can't be read."""
    fill(redis_client, "1", "2")
    redis_client.set("lesson_seat_1", "not a map")
    redis_client.set("lesson_teacher_1", "nobody")
    assert await roster.lessons(None, 10) == [LessonCounts("1", 0, 1, 0, 0), LessonCounts("2", 0, 1, 0, 0)]


@pytest.mark.gen_test
async def test_readers_at_the_same_time_see_the_same(roster, redis_client):
    fill(redis_client, *map(str, range(200)))
    first, *others = await asyncio.gather(*(roster.lessons(None, 200) for _ in range(10)))
    assert len(first) == 200
    assert all(other == first for other in others)
