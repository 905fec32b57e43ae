"""trial.py: the page on which a newcomer tries a join, over HTTP and with a real client."""

import asyncio
import json
from typing import Any

import pytest
from clients import SUCCESS, client, error, join
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from event_streams import event_stream
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server import server as server_module
from lesson_server.errors import StoreUnavailable
from lesson_server.gateway import tracing as tracing_module
from lesson_server.http import trial
from lesson_server.http.stream import StreamHandler
from lesson_server.tokens import Identity
from statecharts.join_lesson import participant as chart

TOKEN = "the-admin-token-of-the-tests-0123456789"
CLIENT_PATH = "/try/socket.io.esm.min.js"
PATHS = [("GET", "/try"), ("POST", "/try/token"), ("GET", "/try/steps?sid=nobody"), ("GET", CLIENT_PATH)]
ANNA = {"client": "participant", "lesson_id": "1", "name": "anna"}
MALFORMED = (400, "the request needs a client, a lesson_id and a name")
BAD_NAME = (400, "the name has characters that an id can't have")


@pytest.fixture
def embedded(start_server):
    return start_server(is_embedded=True)


@pytest.fixture
def started(start_server, request):
    """A server with the settings that a test is parametrized by."""
    return start_server(**request.param)


def settings(*values, ids=("",)):
    return pytest.mark.parametrize("started", values, indirect=True, ids=ids)


@pytest.fixture
def with_client(monkeypatch, tmp_path):
    """The official client, as ``make try`` installs it."""
    path = tmp_path / "socket.io.esm.min.js"
    path.write_bytes(b"export const io = 1;\n")
    monkeypatch.setattr(trial, "CLIENT", path)


@pytest.fixture
def without_client(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "CLIENT", tmp_path / "none.js")


async def fetch(server, path, method="GET", body=None, **headers):
    return await AsyncHTTPClient().fetch(
        server.url + path,
        method=method,
        body=body if body is not None or method == "GET" else "",
        headers=headers,
        raise_error=False,
        follow_redirects=False,
    )


async def asked_for_token(server, request):
    """The code of the answer, and the ``auth`` object or the sentence."""
    body = request if isinstance(request, bytes) else json.dumps(request)
    response = await fetch(server, "/try/token", "POST", body)
    assert response.headers["Content-Type"] == "application/json"
    data = json.loads(response.body)
    assert list(data) == ["auth" if response.code == 200 else "error"]
    return response.code, *data.values()


# Who may


async def is_off(server, **headers):
    for method, path in PATHS:
        response = await fetch(server, path, method, json.dumps(ANNA) if method == "POST" else None, **headers)
        assert response.code == 404, path


@pytest.mark.gen_test
async def test_it_is_on_in_the_embedded_set_up_for_this_machine(embedded, with_client):
    port = embedded.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]"):
        own = {"Host": f"{host}:{port}", "Origin": f"http://{host}:{port}"}
        assert (await fetch(embedded, "/try", **own)).code == 200
        assert (await fetch(embedded, CLIENT_PATH, **own)).code == 200
        assert (await fetch(embedded, "/try/token", "POST", json.dumps(ANNA), **own)).code == 200


@pytest.mark.parametrize("host", ["example.com", "localhost.example.com", "10.0.0.1", "0.0.0.0"])
@pytest.mark.gen_test
async def test_it_is_not_found_under_another_name(embedded, with_client, host):
    await is_off(embedded, Host=host)


@pytest.mark.parametrize("origin", ["null", "http://example.com", "http://localhost:1"])
@pytest.mark.gen_test
async def test_it_is_not_found_from_a_page_of_another_origin(embedded, with_client, origin):
    await is_off(embedded, Origin=origin)


@settings({"is_embedded": True, "LESSON_ADMIN_TOKEN": TOKEN})
@pytest.mark.gen_test
async def test_it_is_off_with_an_admin_token_also_for_who_has_it(started, with_client):
    await is_off(started)
    await is_off(started, Authorization=f"Bearer {TOKEN}")


@settings({}, {"LESSON_ADMIN_TOKEN": TOKEN}, ids=["no token", "token"])
@pytest.mark.gen_test
async def test_it_is_off_in_any_other_set_up(started, with_client):
    await is_off(started, Authorization=f"Bearer {TOKEN}")


@settings({"is_embedded": True, "LESSON_SERVER_HOST": "0.0.0.0"})
@pytest.mark.gen_test
async def test_it_is_off_where_others_can_connect(started, with_client):
    await is_off(started, Host="localhost")


# The page


@pytest.mark.gen_test
async def test_the_page_offers_the_lessons_of_rds(embedded, with_client, sql):
    sql.execute("INSERT INTO lessons (id) SELECT 'more-' || n FROM generate_series(1, 200) AS n")
    response = await fetch(embedded, "/try")
    page = response.body.decode()
    assert response.headers["Content-Type"].startswith("text/html")
    assert '<option value="1">' in page
    assert page.count("<option value=") == trial.MAX_LESSONS == 100
    assert '<script type="module" src="/console/static/try.js">' in page
    assert "make try" not in page


@pytest.mark.gen_test
async def test_the_page_says_that_rds_is_down(embedded, with_client, monkeypatch):
    def down(dsn):
        raise StoreUnavailable("RDS", "the password of anna")

    monkeypatch.setattr(server_module, "list_lessons", down)
    response = await fetch(embedded, "/try")
    assert (response.code, response.body) == (503, b"503: RDS is unavailable, try again\n")


@pytest.mark.gen_test
async def test_the_client_is_served_where_it_is_installed(embedded, with_client):
    response = await fetch(embedded, CLIENT_PATH)
    assert (response.code, response.body) == (200, b"export const io = 1;\n")
    assert response.headers["Content-Type"] == "text/javascript"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.gen_test
async def test_without_the_client_the_page_says_how_to_install_it(embedded, without_client):
    response = await fetch(embedded, "/try")
    assert response.code == 200
    assert b"<code>make try</code>" in response.body
    assert b"try.js" not in response.body
    assert (await fetch(embedded, CLIENT_PATH)).code == 404


# The token


@pytest.mark.parametrize(("kind", "role"), [("teacher", "teacher"), ("participant", "student")])
@pytest.mark.gen_test
async def test_a_teacher_and_a_participant_get_a_token_in_their_name(embedded, kind, role):
    code, auth = await asked_for_token(embedded, {**ANNA, "client": kind})
    assert code == 200
    token = auth.pop("access_token")
    assert auth == {"client": kind, "lesson_id": "1"}
    assert embedded.gateway._services.tokens.verify(token) == Identity("anna", role)


@pytest.mark.gen_test
async def test_a_guest_gets_no_token_and_needs_no_name(embedded):
    guest = 200, {"client": "participant", "lesson_id": "1"}
    for more in ({}, {"name": ""}, {"name": "anna"}, {"name": "é"}):
        assert await asked_for_token(embedded, {"client": "guest", "lesson_id": "1", **more}) == guest


@pytest.mark.parametrize("kind", ["teacher", "participant"])
@pytest.mark.parametrize("name", ["", "é", "anna b", "lesson_1", "a\n", "x" * 129, "<b>"])
@pytest.mark.gen_test
async def test_a_name_that_no_id_can_have_is_refused(embedded, kind, name):
    assert await asked_for_token(embedded, {**ANNA, "client": kind, "name": name}) == BAD_NAME


@pytest.mark.parametrize(
    "request_",
    [
        *({**ANNA, "lesson_id": lesson_id} for lesson_id in ("", "é", "1 2", "1\n", "x" * 65, "../1", 1, None)),
        *({**ANNA, "client": kind} for kind in ("", "admin", "guests", "teacher\n", None, 1)),
        *({**ANNA, "name": name} for name in (None, 1, ["anna"])),
        {"client": "participant", "name": "anna"},
        {"lesson_id": "1", "name": "anna"},
        {**ANNA, "role": "admin"},
        *(b"", b"{", b"[]", b"null", b'"anna"', b"\xff", b"client=teacher", b'{"name": "\\ud800"}', b"[" * 5000),
    ],
    ids=lambda request: repr(request)[:70],
)
@pytest.mark.gen_test
async def test_a_malformed_request_is_refused(embedded, caplog, request_):
    assert await asked_for_token(embedded, request_) == MALFORMED
    assert caplog.records == []


PUBLIC_KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
PUBLIC_PEM = PUBLIC_KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@settings({"is_embedded": True, "LESSON_AUTH_KEY": PUBLIC_PEM, "LESSON_AUTH_ALGORITHM": "ES256"})
@pytest.mark.gen_test
async def test_a_key_that_can_not_sign_is_named(started, caplog):
    sentence = "auth.key is a public key, which can't sign a token, so only a guest can be tried"
    for kind in ("teacher", "participant"):
        assert await asked_for_token(started, {**ANNA, "client": kind}) == (409, sentence)
    assert (await asked_for_token(started, {**ANNA, "client": "guest"}))[0] == 200
    assert caplog.records == []


# The steps


async def connections(server, state):
    """How many participants /metrics counts in a state."""
    text = (await fetch(server, "/metrics")).body.decode()
    line = f'lesson_connections{{client="participant",event="join_lesson",state="{state}"}} '
    return [float(row.removeprefix(line)) for row in text.splitlines() if row.startswith(line)]


async def nothing_is_left(server, tasks):
    await until(lambda: asyncio.all_tasks() <= tasks)
    await asyncio.sleep(0)  # for the callbacks of the tasks that have ended
    tracing = server._tracing
    assert not tracing._traces
    assert not tracing._tasks
    assert not tracing._taps
    assert StreamHandler.streams == set()


ROWS: Any = [row for row in chart.TRANSITIONS if row["trigger"] in chart.PATH]
# The events of a join, without their times.
JOIN = [
    event
    for row in ROWS
    for event in (
        *(("step", row["trigger"], step, None) for step in row["before"]),
        ("state", row["trigger"], row["dest"]),
    )
]


async def trace(stream, last, of="join_lesson"):
    """The events up to a state, without their times."""
    events: list[tuple[Any, ...]] = []
    while True:
        name, data = await stream.event()
        assert (data.pop("event"), data.pop("client")) == (of, "participant")
        if name == "step":
            assert 0 <= data.pop("seconds") < 10
            events.append((name, data.pop("trigger"), data.pop("step"), data.pop("error")))
        else:
            events.append((name, data.pop("trigger"), data.pop("state")))
        assert data == {}
        if events[-1][0] == "state" and events[-1][2] == last:
            return events


@pytest.mark.gen_test
async def test_a_join_is_shown_step_by_step(embedded, redis_client, monkeypatch):
    monkeypatch.setattr(tracing_module, "LIFE_INTERVAL", 0.05)
    await fetch(embedded, "/healthz")  # what the first request starts stays
    tasks = asyncio.all_tasks()
    code, auth = await asked_for_token(embedded, ANNA)
    assert code == 200
    async with (
        client(embedded, **auth) as anna,
        event_stream(f"{embedded.url}/try/steps?sid={anna.get_sid()}") as stream,
    ):
        assert await stream.event() == ("ready", {})
        assert await join(anna) == SUCCESS
        assert await trace(stream, "registered") == JOIN
        assert await connections(embedded, "registered") == [1.0]
        assert redis_client.hget("anna", "sid") == anna.get_sid()
        assert await anna.call("take_seat") == {"status": "SUCCESS", "data": {"seat": 1}}
        *steps, end = await trace(stream, "connected", of="take_seat")
        assert steps[-1] == ("step", "take_seat", "set_seat", None)
        assert end == ("state", "take_seat", "connected")
        await anna.disconnect()
        assert await trace(stream, "disconnected", of="take_seat") == [("state", "disconnect", "disconnected")]
        assert (await trace(stream, "disconnected"))[-1] == ("state", "disconnect", "disconnected")
        assert await stream.ended() == []
    assert await connections(embedded, "registered") == [0.0]
    await nothing_is_left(embedded, tasks)


@pytest.mark.gen_test
async def test_a_refused_join_shows_its_sentence_at_the_step_that_refused(embedded, monkeypatch):
    monkeypatch.setattr(tracing_module, "LIFE_INTERVAL", 0.05)
    await fetch(embedded, "/healthz")
    tasks = asyncio.all_tasks()
    code, auth = await asked_for_token(embedded, {**ANNA, "lesson_id": "unknown"})
    assert code == 200  # the page is there to see a refusal
    async with client(embedded, **auth) as anna:
        async with event_stream(f"{embedded.url}/try/steps?sid={anna.get_sid()}") as stream:
            assert await stream.event() == ("ready", {})
            answer = await join(anna)
            assert answer == error(answer["message"])
            assert await trace(stream, "connected") == [
                ("step", "validate_lesson", "check_lesson_exists", answer["message"]),
                ("step", "abandon", "leave_room", None),
                ("state", "abandon", "connected"),
            ]
            assert await connections(embedded, "connected") == [1.0]
        await until(lambda: not embedded._tracing._tasks)  # the page has gone, the connection stays
        assert await join(anna) == answer
    await nothing_is_left(embedded, tasks)


@pytest.mark.gen_test
async def test_steps_need_a_sid(embedded):
    async with event_stream(f"{embedded.url}/try/steps", status=400) as stream:
        assert await stream.response.text() == "400: the request is malformed\n"
