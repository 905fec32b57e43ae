"""access.py: who may use the roster API, and by which session a browser may use the console."""

import http.cookies
import logging
import re
import time

import pytest
from console_logins import login, logout, session
from fakes import store_down
from roster_api import TOKEN, ask, failure, read
from tornado.httpclient import AsyncHTTPClient
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.web import create_signed_value

from lesson_server.http import access
from lesson_server.http.access import MAX_FAILURES
from lesson_server.stores.redis.console_sessions import SESSION_LIFE, ConsoleSessions

OVERVIEW = "/api/overview"
OFF = (404, "there is no such resource")
UNAUTHORIZED = (401, "the request needs the admin token")
TOO_MANY = (429, "too many failed tries, try again in a minute")
PATHS = [
    ("GET", OVERVIEW),
    ("GET", "/api/lessons"),
    ("GET", "/api/lessons/1"),
    ("DELETE", "/api/lessons/1/participants/p1"),
    ("DELETE", "/api/lessons/1/teachers/t1"),
    ("GET", "/openapi.json"),
    ("GET", "/api"),
    ("GET", "/api/nothing"),
]


class Clock:
    """The clock of the failed tries."""

    def __init__(self):
        self.now = time.monotonic()

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(access, "time", clock)
    return clock


@pytest.fixture
def server(start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN)


@pytest.fixture
def off(start_server):
    return start_server()


@pytest.fixture
def embedded(start_server):
    return start_server(is_embedded=True)


@pytest.fixture
def started(start_server, request):
    """Servers with the settings that a test is parametrized by."""
    return [start_server(**settings) for settings in request.param]


def servers(*settings):
    return pytest.mark.parametrize("started", [settings], indirect=True, ids=[""])


# The bearer token


@pytest.mark.gen_test
async def test_the_token_opens_every_path(server):
    assert [(await ask(server, path, method)).code for method, path in PATHS] == [
        200,
        200,
        404,
        404,
        404,
        200,
        404,
        404,
    ]


@pytest.mark.gen_test
async def test_the_name_of_the_scheme_may_be_in_any_case(server):
    for scheme in ("bearer", "BEARER"):
        assert (await ask(server, OVERVIEW, token=None, headers={"Authorization": f"{scheme}  {TOKEN} "})).code == 200


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.gen_test
async def test_without_the_token_every_path_is_refused(server, method, path):
    answer = await ask(server, path, method, token=None)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert await failure(server, path, method, token=None) == UNAUTHORIZED


@pytest.mark.parametrize(
    "credentials",
    [
        *("", " ", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é\xff"),
        *(f"Basic {TOKEN}", f"Digest {TOKEN}", TOKEN, f"Bearer{TOKEN}", f"Bearer {TOKEN} {TOKEN}"),
        *(f"Bearer {TOKEN.upper()}", "Bearer " + "x" * 7000, f"Bearer {TOKEN}, Bearer {TOKEN}"),
    ],
    ids=lambda credentials: repr(credentials[:40]),
)
@pytest.mark.gen_test
async def test_other_credentials_are_refused(server, credentials):
    answer = await ask(server, OVERVIEW, token=None, headers={"Authorization": credentials})
    assert (answer.code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


@pytest.mark.gen_test
async def test_the_token_is_taken_from_no_other_place(server):
    for name in ("token", "access_token", "admin_token"):
        assert await failure(server, f"{OVERVIEW}?{name}={TOKEN}", token=None) == UNAUTHORIZED
    assert await failure(server, OVERVIEW, token=None, headers={"Cookie": f"lesson_console={TOKEN}"}) == UNAUTHORIZED


@servers({"LESSON_ADMIN_TOKEN": "Schlüssel €"})
@pytest.mark.gen_test
async def test_a_token_of_any_characters_is_accepted_as_utf_8(started):
    (server,) = started
    headers = {"Authorization": "Bearer Schlüssel €".encode().decode("latin-1")}
    assert (await ask(server, OVERVIEW, token=None, headers=headers)).code == 200


@pytest.mark.gen_test
async def test_an_answer_is_not_to_be_stored(server):
    for token in (TOKEN, None):
        answer = await ask(server, OVERVIEW, token=token)
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.gen_test
async def test_the_token_is_in_no_log_line_and_in_no_answer(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    for token in (TOKEN, f"{TOKEN}x"):
        for path in (OVERVIEW, f"{OVERVIEW}?token={TOKEN}", f"/api/{TOKEN}", f"/api/lessons?limit={TOKEN}"):
            answer = await ask(server, path, token=token)
            assert TOKEN not in answer.body.decode() + str(answer.headers)

    async def defect():
        raise LookupError("a defect")

    monkeypatch.setattr(server._watch._roster, "nodes", defect)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = await AsyncHTTPClient().fetch(server.url + OVERVIEW, headers=headers, raise_error=False)
    assert (answer.code, answer.body) == (500, b'{"error":"internal error"}')
    assert "GET request failed" in caplog.text
    assert TOKEN not in caplog.text


# Without a token


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.gen_test
async def test_without_the_setting_every_path_is_not_found(off, method, path):
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}, {"Host": "localhost"}):
        assert await failure(off, path, method, token=None, headers=headers) == OFF


@pytest.mark.gen_test
async def test_without_the_setting_a_malformed_path_is_not_found_either(off):
    for path in ("/api/lessons/%ff", "/api/lessons/1/teachers/%ff", "/api/lessons?limit=%ff"):
        assert (await ask(off, path, token=None)).code == 404


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "127.0.0.2", "127.255.0.9", "[::1]"])
@pytest.mark.gen_test
async def test_the_embedded_set_up_is_open_to_this_machine(embedded, host):
    for port in ("", ":80", ":8080", ":"):
        headers = {"Host": f"{host}{port}"}
        assert (await ask(embedded, OVERVIEW, token=None, headers=headers)).code == 200
        if port != ":":
            own = {**headers, "Origin": f"http://{host}{port}"}
            assert (await ask(embedded, OVERVIEW, token=None, headers=own)).code == 200
            assert (await ask(embedded, "/api/lessons/1/teachers/t1", "DELETE", token=None, headers=own)).code == 404


@pytest.mark.parametrize(
    "host",
    [
        *("example.com", "example.com:8080", "localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]"),
        *("0.0.0.0", "[::]", "169.254.0.1", "localhost.", "127.1", "0x7f000001", "2130706433", "[fe80::1]"),
    ],
)
@pytest.mark.gen_test
async def test_the_embedded_set_up_is_not_found_under_another_name(embedded, host):
    """The DNS name of an attacker's page may resolve to 127.0.0.1."""
    for path in (OVERVIEW, "/openapi.json"):
        assert await failure(embedded, path, token=None, headers={"Host": host}) == OFF


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "", "http://example.com", "http://localhost", "http://localhost:8081", "http://127.0.0.1:8080"),
        *("http://localhost:8080.example.com", "http://[", "http://[x]", "file://", "http://x@localhost:8080", "//"),
    ],
)
@pytest.mark.gen_test
async def test_the_embedded_set_up_is_not_found_from_a_page_of_another_origin(embedded, origin):
    headers = {"Host": "localhost:8080", "Origin": origin}
    assert await failure(embedded, OVERVIEW, token=None, headers=headers) == OFF
    assert await failure(embedded, "/api/lessons/1/teachers/t1", "DELETE", token=None, headers=headers) == OFF


@pytest.mark.parametrize("host", ["[zz]", "[v1.x]", "[::1", "a b", "localhost,localhost", "@localhost", "[1]:x"])
@pytest.mark.gen_test
async def test_a_malformed_host_is_no_defect(embedded, host, caplog):
    answer = await ask(embedded, "/openapi.json", token=None, headers={"Host": host})
    assert answer.code in (400, 404)  # 400: Tornado has refused it
    assert caplog.records == []


@servers({"is_embedded": True, "LESSON_ADMIN_TOKEN": TOKEN})
@pytest.mark.gen_test
async def test_the_embedded_set_up_with_a_token_needs_the_token(started):
    (server,) = started
    assert await failure(server, OVERVIEW, token=None, headers={"Host": "localhost"}) == UNAUTHORIZED
    assert (await ask(server, OVERVIEW, headers={"Host": "example.com"})).code == 200


@servers({"is_embedded": True, "LESSON_SERVER_HOST": "0.0.0.0"})
@pytest.mark.gen_test
async def test_the_embedded_set_up_that_listens_on_all_addresses_is_off(started):
    assert await failure(started[0], OVERVIEW, token=None, headers={"Host": "localhost"}) == OFF


# Failed tries


async def fail(server, times, **headers):
    for _ in range(times):
        assert await failure(server, OVERVIEW, token="wrong", headers=headers) == UNAUTHORIZED


@pytest.mark.gen_test
async def test_after_too_many_failed_tries_an_address_waits_for_the_window(server, clock):
    await fail(server, MAX_FAILURES)
    for token in ("wrong", TOKEN):  # who may try on learns whether a guess was right
        answer = await ask(server, OVERVIEW, token=token)
        assert (answer.code, answer.headers["Retry-After"]) == (429, "60")
        assert await failure(server, OVERVIEW, token=token) == TOO_MANY
    clock.now += access.FAILURE_WINDOW - 0.1
    assert await failure(server, OVERVIEW) == TOO_MANY
    clock.now += 0.2
    assert (await ask(server, OVERVIEW)).code == 200
    await fail(server, MAX_FAILURES)
    assert await failure(server, OVERVIEW) == TOO_MANY


@pytest.mark.gen_test
async def test_each_failed_try_counts_for_one_window(server, clock):
    await fail(server, MAX_FAILURES - 1)
    clock.now += access.FAILURE_WINDOW - 1
    await fail(server, 1)
    assert await failure(server, OVERVIEW) == TOO_MANY
    clock.now += 2
    await fail(server, MAX_FAILURES - 1)
    assert await failure(server, OVERVIEW) == TOO_MANY


@pytest.mark.gen_test
async def test_a_success_is_no_failed_try_and_a_request_without_a_token_is_none(server, clock):
    for _ in range(MAX_FAILURES + 1):
        assert (await ask(server, OVERVIEW)).code == 200
        assert await failure(server, OVERVIEW, token=None) == UNAUTHORIZED


@pytest.mark.gen_test
async def test_another_address_may_still_try(server, clock):
    """nginx on this machine adds the address that it sees as the last one; those before it are the client's words."""
    await fail(server, MAX_FAILURES, **{"X-Forwarded-For": "10.0.0.9, 192.0.2.1"})
    for forwarded in ("192.0.2.1", "10.0.0.7,192.0.2.1", "192.0.2.2, 192.0.2.1"):
        assert await failure(server, OVERVIEW, headers={"X-Forwarded-For": forwarded}) == TOO_MANY
    for headers in ({"X-Forwarded-For": "192.0.2.1, 192.0.2.2"}, {"X-Forwarded-For": "10.0.0.9"}, {}):
        assert (await ask(server, OVERVIEW, headers=headers)).code == 200


@pytest.mark.gen_test
async def test_the_tries_of_a_login_count_too(server, clock):
    for _ in range(MAX_FAILURES):
        assert (await login(server, "wrong")).code == 401
    assert await failure(server, OVERVIEW) == TOO_MANY
    answer = await login(server, TOKEN)
    assert (answer.code, answer.headers.get("Set-Cookie")) == (429, None)


def address_of(remote_ip, **headers):
    head = RequestStartLine("GET", "/", "HTTP/1.1")
    request = HTTPServerRequest(start_line=head, headers=HTTPHeaders({"Host": "localhost", **headers}))
    request.remote_ip = remote_ip
    return access.address_of(request)


def test_only_a_proxy_on_this_machine_may_name_the_address():
    assert address_of("192.0.2.1", **{"X-Forwarded-For": "10.0.0.1"}) == "192.0.2.1"
    assert address_of("127.0.0.1", **{"X-Forwarded-For": "10.0.0.1"}) == "10.0.0.1"
    assert address_of("::1", **{"X-Forwarded-For": "10.0.0.2, 10.0.0.1"}) == "10.0.0.1"
    assert address_of("127.0.0.1") == "127.0.0.1"
    assert address_of("", **{"X-Forwarded-For": "10.0.0.1"}) == ""


def test_the_addresses_of_one_ipv6_network_are_one():
    """A host has all addresses of a /64 to itself."""
    first, second, other = (
        address_of(address) for address in ("2001:db8:0:1::1", "2001:db8:0:1:f::2", "2001:db8:0:2::1")
    )
    assert first == second != other


def test_failed_tries_of_many_addresses_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(access, "MAX_ADDRESSES", 3)
    failures = access.FailedTries()
    for address in ("a", "b", "a", "c", "d"):
        failures.add(address)
    assert list(failures._failures) == ["a", "c", "d"]


# The session of a browser


@pytest.mark.gen_test
async def test_a_login_begins_a_session_in_a_cookie_that_no_script_and_no_other_site_can_use(server, redis_client):
    answer = await login(server, TOKEN)
    cookie = http.cookies.SimpleCookie(answer.headers["Set-Cookie"])["lesson_console"]
    assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Strict", "/")
    assert (cookie["max-age"], cookie["secure"]) == (str(SESSION_LIFE), "")
    assert TOKEN not in answer.headers["Set-Cookie"]
    await read(server, OVERVIEW, token=None, headers={"Cookie": f"lesson_console={cookie.value}"})
    behind_tls = await login(server, TOKEN, **{"X-Forwarded-Proto": "https"})
    assert "; secure" in behind_tls.headers["Set-Cookie"].lower()
    assert len(redis_client.keys("lesson_node_console:*")) == 2


@pytest.mark.parametrize("token", ["", "wrong", f"{TOKEN}x", "é"])
@pytest.mark.gen_test
async def test_a_wrong_token_begins_none(server, redis_client, token):
    answer = await login(server, token)
    assert (answer.code, answer.headers.get("Set-Cookie")) == (401, None)
    assert redis_client.keys("lesson_node_console:*") == []


@servers(*({"LESSON_ADMIN_TOKEN": token} for token in (TOKEN, TOKEN, "another")))
@pytest.mark.gen_test
async def test_a_session_holds_on_every_node_with_this_token_until_its_logout(started):
    here, there, other = started
    cookie = await session(here)
    await read(there, OVERVIEW, token=None, headers=cookie)
    assert await failure(other, OVERVIEW, token=None, headers=cookie) == UNAUTHORIZED
    answer = await logout(there, cookie)
    assert (answer.code, answer.headers["Location"]) == (303, "/console/login")
    assert re.match(r'lesson_console=""?;', answer.headers["Set-Cookie"])
    for server in (here, there):
        assert await failure(server, OVERVIEW, token=None, headers=cookie) == UNAUTHORIZED


@pytest.mark.gen_test
async def test_a_forged_cookie_is_refused(server, redis_client):
    cookie = (await session(server))["Cookie"]
    name, _, value = cookie.partition("=")
    stored = redis_client.keys("lesson_node_console:*")[0].rpartition(":")[2]
    key = access.Access(TOKEN, False, ConsoleSessions(server._redis))._cookie_key
    for forged in (
        *(
            value[:-1],
            f"{value}0",
            value.upper(),
            value.replace("2|1", "2|2", 1),
            "",
            "2|",
            "|" * 9,
            "x" * 5000,
            "\xff",
        ),
        create_signed_value(b"another key", name, "anything").decode(),
        create_signed_value(key, "another_cookie", "anything").decode(),
        create_signed_value(key, name, "no session").decode(),
        create_signed_value(key, name, stored).decode(),  # what Redis holds is not what the cookie has to hold
        create_signed_value(key, name, "a", version=1).decode(),
    ):
        headers = {"Cookie": f"{name}={forged}"}
        assert await failure(server, OVERVIEW, token=None, headers=headers) == UNAUTHORIZED, forged
    await read(server, OVERVIEW, token=None, headers={"Cookie": cookie})


@pytest.mark.gen_test
async def test_a_session_ends_after_its_life(server, redis_client, monkeypatch):
    cookie = await session(server)
    (key,) = redis_client.keys("lesson_node_console:*")
    assert 0 < redis_client.ttl(key) <= SESSION_LIFE
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + SESSION_LIFE + 1)
        assert await failure(server, OVERVIEW, token=None, headers=cookie) == UNAUTHORIZED
    await read(server, OVERVIEW, token=None, headers=cookie)
    redis_client.delete(key)
    assert await failure(server, OVERVIEW, token=None, headers=cookie) == UNAUTHORIZED


@pytest.mark.gen_test
async def test_a_change_by_a_session_has_to_come_from_the_same_origin(server, redis_client):
    cookie = await session(server)
    path = "/api/lessons/1/participants/p1"
    foreign = (403, "the request comes from another origin")
    for origin in ({}, {"Origin": "null"}, {"Origin": "http://example.com"}, {"Origin": "http://["}):
        assert await failure(server, path, "DELETE", token=None, headers={**cookie, **origin}) == foreign
    own = {**cookie, "Origin": server.url}
    assert (await failure(server, path, "DELETE", token=None, headers=own))[0] == 404
    # A browser does not add a bearer token by itself.
    assert (await failure(server, path, "DELETE", headers={"Origin": "http://example.com"}))[0] == 404


@pytest.mark.gen_test
async def test_a_login_from_another_origin_is_refused(server):
    for origin in ("null", "http://example.com"):
        answer = await login(server, TOKEN, Origin=origin)
        assert (answer.code, answer.headers.get("Set-Cookie")) == (403, None)


@pytest.mark.gen_test
async def test_a_session_can_not_be_checked_while_redis_is_down(server, monkeypatch):
    cookie = await session(server)
    asked = []

    async def down(*commands, bookkeeping=()):
        asked.append(commands)
        raise store_down()

    monkeypatch.setattr(server._redis, "execute", down)
    unavailable = (503, "Redis is unavailable, try again")
    assert await failure(server, OVERVIEW, token=None, headers=cookie) == unavailable
    assert asked
