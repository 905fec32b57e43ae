"""roster.py: the roster API on two nodes. :func:`roster_api.ask` compares each answer with the OpenAPI document."""

import contextlib
import re
import socket
import time
from datetime import UTC, datetime
from urllib.parse import quote

import orjson
import pytest
from clients import SUCCESS, client, join
from fakes import store_down
from roster_api import TOKEN, ask, failure, read

from lesson_server.http.api import ApiHandler
from lesson_server.http.roster import MAX_LIMIT, rfc3339

LIST = "lesson_node_lessons"
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
UNAVAILABLE = (503, "Redis is unavailable, try again")
BAD_LIMIT = (400, "limit should be a number from 1 to 500")
BAD_CURSOR = (400, "cursor should be one that a page has returned")


@pytest.fixture(params=["", "school:"], ids=["no prefix", "prefix"])
def prefix(request):
    return request.param


@pytest.fixture
def nodes(start_server, prefix):
    return [start_server(LESSON_ADMIN_TOKEN=TOKEN, LESSON_REDIS_KEY_PREFIX=prefix) for _ in range(2)]


@pytest.fixture
def server(start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN)


def node_id(server):
    return server._node._claims.incarnation.node_id


@contextlib.asynccontextmanager
async def joined(node, client_, lesson_id="1", token=None):
    auth = {"client": client_, "lesson_id": lesson_id}
    async with client(node, **auth, **({} if token is None else {"access_token": token})) as sio:
        assert await join(sio) == SUCCESS
        yield sio


@pytest.fixture
def lessons(sql):
    """Lesson 1 with 30 seats, lesson 10 without, and lesson 2 with 3."""
    sql.execute("INSERT INTO lessons (id, seat_count) VALUES ('10', NULL), ('2', 3)")


@contextlib.asynccontextmanager
async def school(nodes, mint):
    """Two lessons over two nodes: a teacher, p1 in two tabs on both nodes, p2, guests; and a lesson of guests only."""
    here, there = nodes
    async with (
        joined(here, "teacher", "1", mint("t1", "teacher")) as teacher,
        joined(here, "participant", "1", mint("p1")),
        joined(there, "participant", "1", mint("p1", "assistant")) as newest,
        joined(there, "participant", "10", mint("p2")),
        joined(here, "participant", "1"),
        joined(there, "participant", "10"),
        joined(there, "participant", "2"),
        client(there, client="participant", lesson_id="1", access_token=mint("p3")),  # connected, not joined
    ):
        for node in nodes:
            await node._node.beat()
        yield teacher, newest


# What it says


@pytest.mark.gen_test
async def test_the_overview_counts_all_nodes(nodes, lessons, mint):
    async with school(nodes, mint):
        for node in nodes:
            overview = await read(node, "/api/overview")
            said = overview.pop("nodes")
            assert overview == {
                "lessons": 2,
                "teachers": 1,
                "participants": 2,
                "guests": 3,
                "stores": {"RDS": "up", "Redis": "up"},
            }
            expected = sorted(zip(map(node_id, nodes), [3, 5], strict=True))
            assert [(one["node"], one["connections"]) for one in said] == expected
            assert all(is_recent(one["heard_of"]) for one in said)


@pytest.mark.gen_test
async def test_the_lessons_are_counted_and_a_lesson_of_guests_is_none(nodes, lessons, mint, redis_client, prefix):
    async with school(nodes, mint):
        redis_client.hset(f"{prefix}lesson_seat_1", mapping={"3": "p1", "4": "p9"})
        for node in nodes:
            assert await read(node, "/api/lessons") == {
                "lessons": [
                    {"lesson_id": "1", "teachers": 1, "participants": 1, "seats": 30, "taken": 2},
                    {"lesson_id": "10", "teachers": 0, "participants": 1, "seats": 0, "taken": 0},
                ],
                "cursor": None,
            }


@pytest.mark.gen_test
async def test_a_lesson_tells_everybody_by_the_newest_connection_and_the_seats(
    nodes, lessons, mint, redis_client, prefix
):
    async with school(nodes, mint) as (teacher, newest):
        redis_client.hset(f"{prefix}lesson_seat_1", "2", "p1")
        redis_client.hset(f"{prefix}lesson_student_1", "foreign", "a sid")
        redis_client.hset(f"{prefix}lesson_teacher_1", "foreign", "a sid")
        for node in nodes:
            lesson = await read(node, "/api/lessons/1")
            assert list(lesson["seats"].items()) == [(str(seat), "p1" if seat == 2 else "") for seat in range(1, 31)]
            times = [one.pop("since") for one in (*lesson["teachers"], *lesson["participants"])]
            assert lesson["lesson_id"] == "1"
            assert lesson["teachers"] == [
                {"user_id": "foreign", "sid": "a sid", "node": None},
                {"user_id": "t1", "sid": teacher.get_sid(), "node": node_id(nodes[0])},
            ]
            assert lesson["participants"] == [
                {"client_id": "foreign", "role": None, "sid": "a sid", "node": None},
                {"client_id": "p1", "role": "assistant", "sid": newest.get_sid(), "node": node_id(nodes[1])},
            ]
            assert [time is None for time in times] == [True, False, True, False]
            assert is_recent(times[1])
            assert is_recent(times[3])
        await newest.disconnect()
        (p1,) = (one for one in (await read(node, "/api/lessons/1"))["participants"] if one["client_id"] == "p1")
        assert (p1["role"], p1["node"]) == ("student", node_id(nodes[0]))


@pytest.mark.gen_test
async def test_of_a_lesson_with_seats_and_nobody_the_seats_are_told(nodes, lessons, mint):
    async with school(nodes, mint):
        lesson = await read(nodes[0], "/api/lessons/2")
    assert lesson == {"lesson_id": "2", "seats": {"1": "", "2": "", "3": ""}, "teachers": [], "participants": []}


@pytest.mark.parametrize("lesson_id", ["none", "1", "a b", "%ff", "%00", "é", "x" * 65, "*", "..", "1%2F2"])
@pytest.mark.gen_test
async def test_a_lesson_that_redis_does_not_know_is_not_found(server, redis_client, lesson_id):
    redis_client.hset("lesson_student_a b", "p1", "sid")
    path = f"/api/lessons/{quote(lesson_id, safe='%.*')}"
    assert await failure(server, path) == (404, "nobody is in this lesson")


@pytest.mark.gen_test
async def test_the_overview_of_nothing(server):
    overview = await read(server, "/api/overview")
    assert (overview["lessons"], overview["guests"], len(overview["nodes"])) == (0, 0, 1)
    assert await read(server, "/api/lessons") == {"lessons": [], "cursor": None}


@pytest.mark.gen_test
async def test_the_overview_says_that_rds_is_down(server, monkeypatch):
    asked = []

    async def down():
        asked.append(1)
        raise store_down()

    monkeypatch.setitem(server._readiness._probes, "RDS", down)
    assert (await read(server, "/api/overview"))["stores"] == {"RDS": "down", "Redis": "up"}
    assert asked


def is_recent(text):
    assert RFC3339.fullmatch(text), text
    seconds = datetime.fromisoformat(text).timestamp()
    return abs(time.time() - seconds) < 60


def test_times_are_in_utc_whatever_the_zone_of_the_machine(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        when = datetime(2026, 11, 24, 5, 0, 0, tzinfo=UTC).timestamp()
        assert rfc3339(when) == rfc3339(when + 0.999999) == "2026-11-24T05:00:00Z"
    finally:
        monkeypatch.undo()
        time.tzset()


# Pages


def fill(redis_client, *lesson_ids):
    with redis_client.pipeline() as pipeline:
        for lesson_id in lesson_ids:
            pipeline.zadd(LIST, {lesson_id: 0})
            pipeline.hset(f"lesson_student_{lesson_id}", "p1", "sid")
        pipeline.execute()


async def walk(server, limit, between=None):
    """The lesson ids on each page."""
    pages, cursor = [], ""
    while True:
        page = await read(server, f"/api/lessons?limit={limit}{cursor and f'&cursor={cursor}'}")
        pages.append([lesson["lesson_id"] for lesson in page["lessons"]])
        if page["cursor"] is None:
            return pages
        cursor = page["cursor"]
        if between is not None:
            between(cursor)


@pytest.mark.gen_test
async def test_pages_have_every_lesson_once_in_order_and_the_last_has_no_cursor(server, redis_client):
    ids = sorted(["-", "_", "A", "a", "9", "10", "x" * 64])
    fill(redis_client, *ids)
    assert await walk(server, 1) == [[lesson_id] for lesson_id in ids]
    assert await walk(server, 3) == [ids[:3], ids[3:6], ids[6:]]
    assert await walk(server, 7) == await walk(server, 8) == [ids]


@pytest.mark.gen_test
async def test_two_thousand_lessons_are_four_pages(server, redis_client):
    ids = [f"{number:04}" for number in range(2000)]
    fill(redis_client, *ids)
    assert await walk(server, MAX_LIMIT) == [ids[start : start + 500] for start in range(0, 2000, 500)]
    assert len((await read(server, "/api/lessons"))["lessons"]) == 50
    overview = await read(server, "/api/overview")
    assert (overview["lessons"], overview["participants"]) == (2000, 2000)


@pytest.mark.gen_test
async def test_a_lesson_that_vanishes_between_two_pages_hides_no_other(server, redis_client):
    fill(redis_client, *"abcdef")

    def vanish(cursor):
        redis_client.delete(f"lesson_student_{cursor}")
        redis_client.zrem(LIST, cursor)

    assert await walk(server, 2, vanish) == [["a", "b"], ["c", "d"], ["e", "f"]]


@pytest.mark.gen_test
async def test_the_last_lesson_that_vanishes_leaves_an_empty_last_page(server, redis_client):
    fill(redis_client, "a", "b")
    assert await walk(server, 1, lambda cursor: redis_client.delete("lesson_student_b")) == [["a"], []]


@pytest.mark.parametrize(
    "limit", ["0", "501", "1000", "-1", "+1", "1.0", "1e2", "x", "", "%201", "1%20", "%D9%A1", "0x1"]
)
@pytest.mark.gen_test
async def test_a_limit_is_a_number_from_1_to_500(server, limit):
    assert await failure(server, f"/api/lessons?limit={limit}") == BAD_LIMIT


@pytest.mark.parametrize("cursor", ["", "a%20b", "a/b", "%C3%A9", "x" * 65, "%201", "1%0A", "(a", "*"])
@pytest.mark.gen_test
async def test_a_cursor_is_a_lesson_id(server, cursor):
    assert await failure(server, f"/api/lessons?cursor={cursor}") == BAD_CURSOR


@pytest.mark.parametrize("query", ["limit=%ff", "cursor=%ff"])
@pytest.mark.gen_test
async def test_a_query_that_is_no_text_is_malformed_and_is_not_repeated_in_the_answer(server, query):
    assert await failure(server, f"/api/lessons?{query}") == (400, "the request is malformed")


# A large lesson


@pytest.mark.gen_test
async def test_ten_thousand_people_and_seats_are_answered(server, redis_client):
    claims = {
        f"p{number:05}": orjson.dumps([f"node:{number}:student", f"p{number:05}", f"sid{number}"])
        for number in range(10_000)
    }
    with redis_client.pipeline() as pipeline:
        pipeline.hset("lesson_student_1", mapping={person: f"sid{person[1:]}" for person in claims})
        pipeline.hset("lesson_seat_1", mapping={str(seat): "" for seat in range(1, 10_001)})
        for person, claim in claims.items():
            pipeline.zadd(f"lesson_node_claims:{person}{{lesson_student_1}}", {claim: 1_700_000_000_000_000})
        pipeline.execute()
    answer = await ask(server, "/api/lessons/1")
    lesson = orjson.loads(answer.body)
    assert list(lesson["seats"]) == [str(seat) for seat in range(1, 10_001)]
    assert [one["client_id"] for one in lesson["participants"]] == list(claims)
    assert {one["since"] for one in lesson["participants"]} == {"2023-11-14T22:13:20Z"}


@pytest.mark.gen_test
async def test_a_large_answer_gets_a_send_buffer_of_its_size_and_a_small_one_does_not(
    server, redis_client, monkeypatch
):
    """With the buffers that suit acknowledgements, the kernel takes 0.3 s for a megabyte."""
    sizes = []
    enlarge = ApiHandler._enlarge_send_buffer

    def watch(handler):
        enlarge(handler)
        sizes.append(handler.request.connection.stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))

    monkeypatch.setattr(ApiHandler, "_enlarge_send_buffer", watch)
    await read(server, "/api/overview")
    assert sizes == []
    redis_client.hset("lesson_seat_1", mapping={str(seat): "somebody" for seat in range(3000)})
    await read(server, "/api/lessons/1")
    assert sizes[0] > 200_000


# Errors


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in ("/api/overview", "/api/lessons", "/api/lessons/1")),
        *(("DELETE", f"/api/lessons/1/{kind}/x") for kind in ("teachers", "participants")),
    ],
)
@pytest.mark.gen_test
async def test_while_redis_is_down_every_path_says_so(server, monkeypatch, caplog, method, path):
    asked = []

    async def down(*commands, bookkeeping=()):
        asked.append(commands)
        raise store_down()

    monkeypatch.setattr(server._redis, "execute", down)
    assert await failure(server, path, method) == UNAVAILABLE
    assert asked
    assert caplog.records == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *((method, "/api/overview", "GET") for method in ("HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")),
        ("POST", "/api/lessons", "GET"),
        ("DELETE", "/api/lessons/1", "GET"),
        ("GET", "/api/lessons/1/participants/p1", "DELETE"),
        ("POST", "/openapi.json", "GET"),
    ],
)
@pytest.mark.gen_test
async def test_another_method_is_not_allowed(server, method, path, allowed):
    body = "" if method in ("POST", "PUT", "PATCH") else None
    answer = await ask(server, path, method, body=body)
    assert (answer.code, answer.headers["Allow"]) == (405, allowed)
    assert method == "HEAD" or orjson.loads(answer.body) == {"error": "the method is not allowed here"}


@pytest.mark.parametrize(
    "path", ["/api", "/api/", "/api/x", "/api/lessons/", "/api/lessons/1/", "/api/lessons/1/guests/g", "/api/%ff"]
)
@pytest.mark.gen_test
async def test_another_path_is_not_found(server, path):
    assert await failure(server, path) == (404, "there is no such resource")
