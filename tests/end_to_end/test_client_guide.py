"""The clients that docs/clients/ shows join, join again after a reconnect, and try again while the server is busy."""

import asyncio
import contextlib
import json
import re
import shutil

import pytest
import socketio
from cluster import ROOT
from lesson_client import Refused, stay_in_lesson

from lesson_server.errors import ServiceBusy

CLIENT = ROOT / "docs/clients/lesson_client.mjs"
JS = ROOT / "tests/js"

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (JS / "node_modules/socket.io-client").exists(),
    reason="needs Node.js and socket.io-client",
)
LANGUAGES = pytest.mark.parametrize("language", [pytest.param("javascript", marks=needs_node), "python"])


class Seen:
    """What a client has reported, as it comes."""

    def __init__(self):
        self._lines = asyncio.Queue()

    def add(self, **line):
        self._lines.put_nowait(line)

    async def next(self):
        return await self._lines.get()


@contextlib.asynccontextmanager
async def python_client(server, token, **who):
    sio, seen = socketio.AsyncClient(reconnection=False), Seen()

    async def get_auth():
        return {**who, "access_token": token}

    async def on_joined():
        seen.add(joined=sio.get_sid())

    async def stay():
        try:
            await stay_in_lesson(sio, server.url, get_auth, on_joined)
        except Refused as refused:
            seen.add(refused=str(refused))

    staying = asyncio.create_task(stay())
    try:
        yield seen
    finally:
        staying.cancel()
        await asyncio.wait({staying})


@pytest.fixture
def clients(monkeypatch, tmp_path):
    """Runs the clients of the pages, without the pauses between their attempts."""
    monkeypatch.setattr("lesson_client.random.uniform", lambda least, most: 0)
    # Where it stands, Node.js would not find socket.io-client.
    shutil.copy(CLIENT, tmp_path)
    (tmp_path / "node_modules").symlink_to(JS / "node_modules")

    @contextlib.asynccontextmanager
    async def javascript_client(server, token, **who):
        seen, pipe = Seen(), asyncio.subprocess.PIPE
        command = ("node", JS / "stay_in_lesson.mjs", tmp_path / CLIENT.name, server.url, json.dumps(who))
        node = await asyncio.create_subprocess_exec(*command, *([token] if token else []), stdin=pipe, stdout=pipe)

        async def read():
            async for line in node.stdout:
                seen.add(**json.loads(line))

        reading = asyncio.create_task(read())
        try:
            yield seen
        finally:
            node.stdin.close()
            await node.wait()
            await reading

    return {"javascript": javascript_client, "python": python_client}


class BusyAtFirst:
    """An admission that refuses the first two connections, and the first two events."""

    def __init__(self, admission):
        self._admission = admission
        self.refused = {"connections": 0, "events": 0}

    def admit_connection(self, held):
        self._refuse("connections")
        self._admission.admit_connection(held)

    def admit_event(self, event):
        self._refuse("events")
        self._admission.admit_event(event)

    def _refuse(self, what):
        if self.refused[what] < 2:
            self.refused[what] += 1
            raise ServiceBusy


@LANGUAGES
@pytest.mark.gen_test
async def test_it_tries_again_while_the_server_is_busy(server, clients, mint, language):
    server.gateway._admission = busy = BusyAtFirst(server.gateway._admission)
    async with clients[language](server, mint("anna"), client="participant", lesson_id=1) as seen:
        assert await seen.next() == {"joined": next(iter(server.gateway.connections))}
        assert busy.refused == {"connections": 2, "events": 2}


@LANGUAGES
@pytest.mark.gen_test
async def test_it_joins_again_on_another_connection(server, clients, mint, redis_client, language):
    async with clients[language](server, mint("anna"), client="participant", lesson_id=1) as seen:
        first = await seen.next()
        for engine_socket in list(server._protocol.sio.eio.sockets.values()):
            await engine_socket.close(server._protocol.sio.reason.SERVER_DISCONNECT)  # as when the server drains
        second = await seen.next()
        assert second.keys() == {"joined"}
        assert second != first
        assert redis_client.hget("lesson_student_1", "anna") == second["joined"]


@LANGUAGES
@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ({"client": "hub", "lesson_id": 1}, "the Hub does not join lessons"),
        ({"client": "participant", "lesson_id": "none-such"}, "lesson none-such not found"),
    ],
    ids=["handshake", "join"],
)
@pytest.mark.gen_test
async def test_it_does_not_try_again_what_is_refused_for_good(server, clients, who, reason, language):
    async with clients[language](server, None, **who) as seen:
        assert await seen.next() == {"refused": reason}


@needs_node
@pytest.mark.gen_test
async def test_a_page_stays_away_when_its_person_is_removed(server, clients, mint):
    async with clients["javascript"](server, mint("anna"), client="participant", lesson_id=1) as seen:
        await seen.next()
        await server.gateway.remove("1", "participant", "anna")
        assert await seen.next() == {"refused": "removed from the lesson"}


@needs_node
@pytest.mark.gen_test
async def test_the_example_of_the_readme_joins(server, tmp_path):
    (example,) = re.findall(r"```js\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert "http://127.0.0.1:8080" in example
    (tmp_path / "node_modules").symlink_to(JS / "node_modules")
    (tmp_path / "join.mjs").write_text(example.replace("http://127.0.0.1:8080", server.url), "utf-8")
    node = await asyncio.create_subprocess_exec("node", tmp_path / "join.mjs", stdout=asyncio.subprocess.PIPE)
    try:
        assert await node.stdout.readline() == b"{ status: 'SUCCESS', data: {} }\n"
    finally:
        node.kill()
        await node.wait()
