"""console.py: the pages, the login, and the streams of the overview and of a lesson."""

import asyncio
import contextlib
import http.cookies
import json
import time

import pytest
from clients import SUCCESS, client, join
from cluster import Valkey
from console_logins import login, logout, session
from event_streams import event_stream
from roster_api import TOKEN
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server.http import console as console_module
from lesson_server.http import figures as figures_module
from lesson_server.http import watch as watch_module
from lesson_server.http.access import MAX_FAILURES
from lesson_server.http.console import LESSONS_ON_PAGE, PEOPLE_ON_PAGE, SORT_KEYS, lessons_page
from lesson_server.http.page import HEADERS
from lesson_server.http.stream import StreamHandler
from lesson_server.stores.redis import keys
from lesson_server.stores.redis.console_sessions import SESSION_LIFE
from lesson_server.stores.redis.roster import LessonCounts

BEARER = {"Authorization": f"Bearer {TOKEN}"}
INTERVAL = 0.05  # seconds, of the figures when they are quick


@pytest.fixture
def quick(monkeypatch):
    """Looks, reads and publications in short intervals."""
    for name in ("LOOK_INTERVAL", "READ_INTERVAL"):
        monkeypatch.setattr(console_module, name, INTERVAL)
    monkeypatch.setattr(watch_module, "READ_INTERVAL", INTERVAL)
    monkeypatch.setattr(watch_module, "WATCH_INTERVAL", 2 * INTERVAL)
    monkeypatch.setattr(figures_module, "PUBLISH_INTERVAL", INTERVAL)
    monkeypatch.setattr(figures_module, "WATCH_LIFE", 6 * INTERVAL)


@pytest.fixture
def console(start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN)


@pytest.fixture
def embedded(start_server):
    return start_server(is_embedded=True)


async def get(server, path, **headers):
    return await AsyncHTTPClient().fetch(
        server.url + path, raise_error=False, follow_redirects=False, headers={**BEARER, **headers}
    )


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/console", 200),
        ("/console/lessons/1", 200),
        ("/console/lessons/%20", 404),
        ("/console/charts/join_lesson/teacher.svg", 200),
        ("/console/charts/join_lesson/nobody.svg", 404),
        ("/console/static/console.js", 200),
        ("/console/static/nothing.js", 404),
        ("/console/static/..?secret", 403),
        ("/", 302),
    ],
)
@pytest.mark.gen_test
async def test_every_page_and_asset_has_the_headers(console, caplog, path, status):
    response = await get(console, path)
    assert response.code == status
    expected = dict(HEADERS)
    if "/static/" in path and status == 200:
        expected["Cache-Control"] = "no-cache"
    assert {name: response.headers[name] for name in HEADERS} == expected
    assert "secret" not in caplog.text


@pytest.mark.gen_test
async def test_without_a_session_pages_lead_to_the_login(console):
    response = await get(console, "/console", Authorization="Bearer wrong")
    assert (response.code, response.headers["Location"]) == (303, "/console/login")


@pytest.mark.gen_test
async def test_it_is_off_without_a_token(server):
    for path in ("/", "/console", "/try", "/console/static/console.js"):
        assert (await get(server, path)).code == 404


@pytest.mark.gen_test
async def test_the_overview_is_sent(console):
    async with event_stream(console.url + "/console/events", BEARER) as stream:
        shown = await stream.until("overview")
        assert [store["name"] for store in shown["stores"]] == ["RDS", "Redis", "Mixpanel"]
        assert (await stream.until("lessons"))["total"] == 0


# The login


async def page(server, path, headers=None):
    """A page, asked for without the bearer token."""
    return await AsyncHTTPClient().fetch(
        server.url + path, raise_error=False, follow_redirects=False, headers=headers or {}
    )


async def leads_to(server, path, target, headers=None):
    response = await page(server, path, headers)
    return response.code in (302, 303) and response.headers["Location"] == target


@pytest.mark.gen_test
async def test_the_login_page_is_there_without_a_session_and_leads_on_with_one(console):
    response = await page(console, "/console/login")
    assert response.code == 200
    assert b'action="/console/login"' in response.body
    assert b"login-error" not in response.body
    cookie = await session(console)
    assert await leads_to(console, "/console/login", "/console", cookie)
    shown = await page(console, "/console", cookie)
    assert shown.code == 200
    assert b'action="/console/logout"' in shown.body


@pytest.mark.gen_test
async def test_a_wrong_token_is_told_on_the_login_page(console):
    answer = await login(console, "<b>wrong</b>")
    assert (answer.code, answer.headers.get("Set-Cookie")) == (401, None)
    assert b"This is not the admin token." in answer.body
    assert b"wrong" not in answer.body
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.gen_test
async def test_the_right_token_sets_a_cookie_for_this_site_alone(console):
    answer = await login(console, TOKEN)
    assert (answer.code, answer.headers["Location"]) == (303, "/console")
    (cookie,) = http.cookies.SimpleCookie(answer.headers["Set-Cookie"]).values()
    assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Strict", "/")


@pytest.mark.gen_test
async def test_too_many_wrong_tokens_are_told_on_the_login_page(console):
    for _ in range(MAX_FAILURES):
        assert (await login(console, "wrong")).code == 401
    for token in ("wrong", TOKEN):
        answer = await login(console, token)
        assert (answer.code, answer.headers["Retry-After"]) == (429, "60")
        assert b"Too many failed tries. Try again in a minute." in answer.body
        assert "Set-Cookie" not in answer.headers


async def forged(cookie):
    name, _, value = cookie["Cookie"].partition("=")
    return [{"Cookie": f"{name}={text}"} for text in ("", value[:-1], f"{value}0", value.replace("2|1", "2|2", 1), "x")]


@pytest.mark.parametrize("path", ["/console", "/console/lessons/1", "/console/charts/join_lesson/teacher.svg"])
@pytest.mark.gen_test
async def test_a_forged_or_expired_cookie_leads_to_the_login(console, redis_client, monkeypatch, path):
    cookie = await session(console)
    assert (await page(console, path, cookie)).code == 200
    for wrong in await forged(cookie):
        assert await leads_to(console, path, "/console/login", wrong)
    later = time.time() + SESSION_LIFE + 1
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        assert await leads_to(console, path, "/console/login", cookie)
        assert (await page(console, "/console/login", cookie)).code == 200
    redis_client.delete(*redis_client.keys("lesson_node_console:*"))
    assert await leads_to(console, path, "/console/login", cookie)


@pytest.mark.parametrize("query", ["", "?lesson=1"], ids=["overview", "lesson"])
@pytest.mark.gen_test
async def test_a_logout_ends_the_streams_of_its_session(quick, console, query):
    cookie, other = await session(console), await session(console)
    url = f"{console.url}/console/events{query}"
    async with event_stream(url, cookie) as stream, event_stream(url, other) as goes_on:
        await stream.event()
        answer = await logout(console, cookie)
        assert (answer.code, answer.headers["Location"]) == (303, "/console/login")
        await stream.ended()
        for wrong in (cookie, {}, *await forged(other)):
            async with event_stream(url, wrong, status=401):
                pass
        for _ in range(20):
            await goes_on.next()
    await until(lambda: not StreamHandler.streams)


@pytest.mark.gen_test
async def test_a_logout_without_a_session_leads_to_the_login(console):
    answer = await logout(console, {})
    assert (answer.code, answer.headers["Location"]) == (303, "/console/login")


# The embedded set-up without a token


@pytest.mark.gen_test
async def test_the_embedded_set_up_needs_no_login(embedded):
    assert await leads_to(embedded, "/", "/console")
    assert await leads_to(embedded, "/console/login", "/console")
    for path in ("/console", "/console/lessons/1"):
        shown = await page(embedded, path)
        assert shown.code == 200
        assert b"/console/logout" not in shown.body
        assert b'href="/try"' in shown.body
    async with event_stream(f"{embedded.url}/console/events") as stream:
        await stream.until("overview")


@pytest.mark.gen_test
async def test_with_a_token_the_console_does_not_lead_to_the_page_that_tries_a_join(console):
    assert b'href="/try"' not in (await get(console, "/console")).body


@pytest.mark.parametrize("headers", [{"Host": "example.com"}, {"Origin": "http://example.com"}], ids=["name", "origin"])
@pytest.mark.gen_test
async def test_the_embedded_set_up_is_open_to_this_machine_only(embedded, headers):
    for path in ("/", "/console", "/console/login", "/console/lessons/1", "/console/events", "/console/static/page.js"):
        assert (await page(embedded, path, headers)).code == 404


# The list of lessons


def counts(lesson_id, teachers=0, participants=0, seats=0, taken=0):
    return LessonCounts(lesson_id, teachers, participants, seats, taken)


LESSONS = [
    counts("10", teachers=1, participants=3, seats=30, taken=5),
    counts("9", teachers=2, participants=1, seats=10, taken=1),
    counts("Math-2", teachers=1, participants=8, seats=0),
    counts("math-10", participants=2, seats=20, taken=7),
]
GUESTS = {"9": 4, "10": 2, "math-1": 1}  # there are only guests in math-1


def ids(search="", sort="lesson_id", descending=False, page=1, lessons=LESSONS, guests=GUESTS):
    return [each["lesson_id"] for each in lessons_page(lessons, guests, search, sort, descending, page)["lessons"]]


def test_a_lesson_is_shown_with_its_guests_also_when_nobody_else_is_there():
    shown = lessons_page(LESSONS, GUESTS, "", "lesson_id", False, 1)
    assert (shown["total"], shown["page"], shown["pages"]) == (5, 1, 1)
    by_id = {lesson.pop("lesson_id"): lesson for lesson in shown["lessons"]}
    assert by_id["9"] == {"teachers": 2, "participants": 1, "guests": 4, "seats": 10, "taken": 1}
    assert by_id["math-10"] == {"teachers": 0, "participants": 2, "guests": 0, "seats": 20, "taken": 7}
    assert by_id["math-1"] == {"teachers": 0, "participants": 0, "guests": 1, "seats": 0, "taken": 0}


@pytest.mark.parametrize(
    ("sort", "ascending", "descending"),
    [
        (
            "lesson_id",
            ["9", "10", "Math-2", "math-1", "math-10"],
            ["math-10", "math-1", "Math-2", "10", "9"],
        ),
        ("teachers", ["math-1", "math-10", "10", "Math-2", "9"], ["9", "10", "Math-2", "math-1", "math-10"]),
        ("participants", ["math-1", "9", "math-10", "10", "Math-2"], ["Math-2", "10", "math-10", "9", "math-1"]),
        ("guests", ["Math-2", "math-10", "math-1", "10", "9"], ["9", "10", "math-1", "Math-2", "math-10"]),
        ("seats", ["Math-2", "math-1", "9", "math-10", "10"], ["10", "math-10", "9", "Math-2", "math-1"]),
        ("taken", ["Math-2", "math-1", "9", "10", "math-10"], ["math-10", "10", "9", "Math-2", "math-1"]),
    ],
)
def test_each_column_sorts_and_equal_lessons_are_in_the_order_of_their_ids(sort, ascending, descending):
    for lessons in (LESSONS, LESSONS[::-1]):
        assert ids(sort=sort, lessons=lessons) == ascending
        assert ids(sort=sort, lessons=lessons, descending=True) == descending


def test_every_column_is_one_of_those():
    assert set(SORT_KEYS) == lessons_page(LESSONS, {}, "", "lesson_id", False, 1)["lessons"][0].keys()


def test_numbers_in_ids_are_compared_as_numbers():
    unordered = ["b10", "b9", "a", "100", "9", "10", "b9-2", "b9-10", "_", "007", "b"]
    ordered = ["007", "9", "10", "100", "_", "a", "b", "b9", "b9-2", "b9-10", "b10"]
    assert ids(lessons=[counts(each) for each in unordered], guests={}) == ordered


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("", 5),
        ("math", 3),
        ("MATH", 3),
        ("th-1", 2),
        ("1", 3),
        ("nothing", 0),
        (".*", 0),
        ("math-1", 2),
        ("\x00", 0),
    ],
)
def test_a_search_is_for_a_part_of_the_id_in_any_case(search, found):
    shown = lessons_page(LESSONS, GUESTS, search, "lesson_id", False, 1)
    assert (shown["total"], len(shown["lessons"]), shown["pages"]) == (found, found, 1)


def test_lessons_are_shown_a_page_at_a_time():
    lessons = [counts(str(number)) for number in range(2 * LESSONS_ON_PAGE + 1)]
    pages = [lessons_page(lessons, {}, "", "lesson_id", False, page) for page in (1, 2, 3)]
    assert [(shown["total"], shown["page"], shown["pages"]) for shown in pages] == [
        (len(lessons), page, 3) for page in (1, 2, 3)
    ]
    assert [each["lesson_id"] for shown in pages for each in shown["lessons"]] == [
        lesson.lesson_id for lesson in lessons
    ]
    # Beyond the last page, as when lessons have ended: the last page.
    assert lessons_page(lessons, {}, "", "lesson_id", False, 999_999) == pages[-1]
    assert lessons_page(lessons[:-1], {}, "", "lesson_id", False, 3)["page"] == 2
    assert lessons_page([], {}, "", "lesson_id", False, 7) == {"total": 0, "page": 1, "pages": 1, "lessons": []}


# The streams


@pytest.mark.parametrize(
    "query",
    [
        *("sort=name", "sort=", "order=up", "order=", "search=%ff", "lesson=1&page=0"),
        *("page=0", "page=-1", "page=x", "page=1000000", "page=", "page=1.0"),
        *("lesson=", "lesson=%20", "lesson=a%2Fb", "lesson=1%0A2", f"lesson={'x' * 65}"),
    ],
)
@pytest.mark.gen_test
async def test_a_malformed_query_is_refused(console, query):
    async with event_stream(f"{console.url}/console/events?{query}", BEARER, status=400) as stream:
        assert await stream.response.text() == "400: the request is malformed\n"


@contextlib.asynccontextmanager
async def joined(server, client_, lesson_id, token=None):
    auth = {} if token is None else {"access_token": token}
    async with client(server, client=client_, lesson_id=lesson_id, **auth) as sio:
        assert await join(sio) == SUCCESS
        yield sio


@pytest.mark.gen_test
async def test_the_overview_stream_searches_sorts_and_pages(quick, console, redis_client, mint):
    async with (
        joined(console, "teacher", "1", mint("t1", "teacher")),
        joined(console, "participant", "1", mint("anna")),
        joined(console, "participant", "1"),
    ):
        redis_client.hset(keys.seat_map("1"), "7", "anna")
        url = f"{console.url}/console/events?search=1&sort=participants&order=desc&page=9"
        async with event_stream(url, BEARER) as stream:
            shown = await stream.until("lessons", lambda data: data["total"] and data["lessons"][0]["guests"])
            lesson = {"lesson_id": "1", "teachers": 1, "participants": 1, "guests": 1, "seats": 30, "taken": 1}
            assert shown == {"total": 1, "page": 1, "pages": 1, "lessons": [lesson]}
            overview = await stream.until("overview", lambda data: data["guests"])
            assert (overview["lessons"], overview["teachers"], overview["participants"]) == (1, 1, 1)
            assert overview["connections"] == 3
        async with event_stream(f"{console.url}/console/events?search=2", BEARER) as stream:
            assert (await stream.until("lessons"))["total"] == 0


@pytest.mark.gen_test
async def test_the_stream_of_a_lesson_shows_who_is_there_as_they_come_and_go(quick, console, redis_client, mint):
    async with event_stream(f"{console.url}/console/events?lesson=1", BEARER) as stream:
        assert await stream.until("lesson") == {
            "lesson_id": "1",
            "found": False,
            "guests": 0,
            "total": 0,
            "page": 1,
            "pages": 1,
            "seats": {},
            "away": [],
            "teachers": [],
            "participants": [],
        }
        async with (
            joined(console, "teacher", "1", mint("ms-hill", "teacher")) as teacher,
            joined(console, "participant", "1"),
        ):
            async with joined(console, "participant", "1", mint("anna")) as anna:
                redis_client.hset(keys.seat_map("1"), "7", "anna")
                shown = await stream.until("lesson", lambda data: data["guests"] and data["seats"]["7"])
                assert (shown["found"], shown["total"], shown["guests"]) == (True, 1, 1)
                (there,) = shown["teachers"]
                assert (there["user_id"], there["sid"]) == ("ms-hill", teacher.get_sid())
                (present,) = shown["participants"]
                assert (present["client_id"], present["role"], present["sid"]) == ("anna", "student", anna.get_sid())
                assert present["node"] == there["node"] == console._node._claims.incarnation.node_id
                assert present["since"].endswith("Z")
                assert list(shown["seats"]) == [str(number) for number in range(1, 31)]
                assert {seat: name for seat, name in shown["seats"].items() if name} == {"7": "anna"}
                assert shown["away"] == []
            shown = await stream.until("lesson", lambda data: not data["total"])
            assert shown["away"] == ["7"]
            assert [there["user_id"] for there in shown["teachers"]] == ["ms-hill"]
        await stream.until("lesson", lambda data: not data["teachers"] and not data["guests"])
    await until(lambda: not StreamHandler.streams)


@pytest.mark.gen_test
async def test_the_people_of_a_lesson_are_shown_a_page_at_a_time(quick, console, redis_client):
    names = [f"p{number:03}" for number in range(PEOPLE_ON_PAGE + 1)]
    redis_client.hset(keys.students("42"), mapping={name: f"sid-{name}" for name in names})
    first, last = names[:PEOPLE_ON_PAGE], names[PEOPLE_ON_PAGE:]
    for page_, expected in ((1, first), (2, last), (999_999, last)):
        async with event_stream(f"{console.url}/console/events?lesson=42&page={page_}", BEARER) as stream:
            shown = await stream.until("lesson")
            assert [person["client_id"] for person in shown["participants"]] == expected
            assert (shown["total"], shown["page"], shown["pages"]) == (len(names), min(page_, 2), 2)
            assert shown["participants"][0]["node"] is shown["participants"][0]["since"] is None


@pytest.fixture
def own_redis(tmp_path):
    valkey = Valkey(tmp_path, keeps_data=True)
    yield valkey
    valkey.close()


@pytest.fixture
def on_own_redis(own_redis, start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN, LESSON_REDIS_URL=own_redis.url)


def redis_is(status):
    return lambda overview: {store["name"]: store["status"] for store in overview["stores"]}["Redis"] == status


@pytest.mark.gen_test
async def test_streams_go_on_while_redis_is_down_and_say_so(quick, own_redis, on_own_redis):
    server = on_own_redis
    cookie = await session(server)
    async with (
        event_stream(f"{server.url}/console/events", cookie) as overview,
        event_stream(f"{server.url}/console/events?lesson=1", cookie) as lesson,
    ):
        await overview.until("overview", redis_is("up"))
        await lesson.event()
        own_redis.kill()
        shown = await overview.until("overview", redis_is("down"))
        (redis_,) = (store for store in shown["stores"] if store["name"] == "Redis")
        assert redis_["failed_at"] is not None
        assert redis_["cause"]
        assert len(shown["nodes"]) == 1  # this node
        heard = []

        async def listen():
            while True:
                heard.append(await lesson.next())

        listening = asyncio.create_task(listen())
        await until(lambda: len(heard) > 3)
        count = len(heard)  # of them, some may have been sent before Redis was down
        await until(lambda: len(heard) > count + 3)
        assert all(event == (None, None) for event in heard[count:])  # alive, with nothing to say
        own_redis.start()
        await overview.until("overview", redis_is("up"))
        own_redis.client.hset(keys.students("1"), "anna", "sid")
        await until(lambda: [data["total"] for name, data in heard if name == "lesson"][-1:] == [1])
        listening.cancel()
        await asyncio.wait([listening])


# While nobody looks


@pytest.fixture
def nodes(start_server):
    return [start_server(LESSON_ADMIN_TOKEN=TOKEN) for _ in range(2)]


class Listener:
    """Listens to the messages between the nodes."""

    def __init__(self, redis_client):
        self._redis = redis_client
        self._pubsub = redis_client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.subscribe(keys.MESSAGES)
        self.messages = []

    async def listen(self):
        """Takes every message that has been published until now."""
        self._redis.publish(keys.MESSAGES, json.dumps({"kind": "mark"}))

        def mark():
            while (message := self._pubsub.get_message()) is not None:
                data = json.loads(message["data"])
                if data["kind"] == "mark":
                    return True
                self.messages.append(data)
            return False

        await until(mark)

    async def heard(self, intervals=6):
        """The messages of some intervals."""
        await self.listen()
        self.messages.clear()
        await asyncio.sleep(intervals * INTERVAL)
        await self.listen()
        return list(self.messages)

    def close(self):
        self._pubsub.close()


@pytest.mark.gen_test
async def test_nodes_publish_while_somebody_looks_and_only_then(quick, nodes, redis_client):
    node_ids = {node._node._claims.incarnation.node_id for node in nodes}
    with contextlib.closing(Listener(redis_client)) as listener:
        for _ in range(2):
            assert await listener.heard() == []
            async with event_stream(f"{nodes[0].url}/console/events", BEARER) as stream:
                await stream.until("overview", lambda data: len(data["nodes"]) == 2)
                await listener.listen()
                published = [message["node"] for message in listener.messages if message["kind"] == "figures"]
                assert set(published) == node_ids
                assert {message["kind"] for message in listener.messages} == {"watch", "figures"}
            await until(lambda: nodes[0]._watch._task.done())
            await until(lambda: all(node._figures._publishing.done() for node in nodes))
