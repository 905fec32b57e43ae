"""server.py: the whole server in one process, its pages and its end."""

import asyncio
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_end_to_end import SUCCESS, client, join, until
from tornado.httpclient import AsyncHTTPClient

from lesson_server.configuration import load
from lesson_server.errors import StoreUnavailable
from lesson_server.server import LessonServer
from lesson_server.settings import SettingsError


async def get(server, path):
    return await AsyncHTTPClient().fetch(server.url + path, raise_error=False)


async def metrics(server):
    families = text_string_to_metric_families((await get(server, "/metrics")).body.decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


@pytest.mark.gen_test
async def test_the_pages_of_operators(server):
    assert (await get(server, "/healthz")).code == 200
    assert (await get(server, "/readyz")).body == b"ready\n"
    assert (await get(server, "/metrics")).headers["Content-Type"].startswith("text/plain")
    assert (await get(server, "/nothing?access_token=secret")).body == b"404 Not Found\n"


@pytest.mark.gen_test
async def test_readyz_names_what_is_down(server, monkeypatch):
    async def down():
        raise StoreUnavailable("Redis", "outage")

    monkeypatch.setattr(server._redis.client, "ping", down)
    answer = await get(server, "/readyz")
    assert (answer.code, answer.body) == (503, b"Redis down\n")


@pytest.mark.gen_test
async def test_the_metrics_tell_what_happens(server, mint):
    async with (
        client(server, client="participant", lesson_id="1", access_token=mint()) as sio,
        client(server, client="participant", lesson_id="1") as guest,
        client(server, client="teacher", lesson_id="1") as teacher,
    ):
        await join(sio)
        await join(guest)
        await join(teacher)
        async with client(server, client="participant", lesson_id="1", access_token=mint()) as again:
            await join(again)
        await until(lambda: len(server.gateway.connections) == 3)
        seen = await metrics(server)
    assert seen["lesson_connections", "participant", "registered"] == 1
    assert seen["lesson_connections", "participant", "seated"] == 1
    assert seen["lesson_connections", "teacher", "connected"] == 1
    assert seen["lesson_joins_total", "participant", "success"] == 3
    assert seen["lesson_joins_total", "teacher", "token_required"] == 1
    assert seen["lesson_join_seconds_count", "participant"] == 3
    assert seen["lesson_step_seconds_count", "set_client_presence"] == 2
    assert seen["lesson_reconnects_total",] == 1


def test_a_stop_ends_every_connection_with_its_presence(io_loop, environ, redis_client, mint):
    server = LessonServer(load(environ=environ))

    async def story():
        await server.start()
        gone = []
        async with (
            client(server, client="participant", lesson_id="1", access_token=mint()) as websocket,
            client(server, ["polling"], client="teacher", lesson_id="1", access_token=mint("t1", "teacher")) as polling,
        ):
            for sio in (websocket, polling):
                sio.on("disconnect", gone.append)
                assert await join(sio) == SUCCESS
            await server.stop()
            assert sorted(redis_client.keys()) == ["lesson_seat_1", "p1"]
            await until(lambda: len(gone) == 2)

    io_loop.run_sync(story)


def test_a_reconnect_reaches_mixpanel_before_the_server_ends(io_loop, environ, mint):
    received = []

    class Track(BaseHTTPRequestHandler):
        def do_POST(self):
            form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            received.extend(json.loads(form["data"][0]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": 1, "error": null}')

        def log_message(self, *args):
            pass

    mixpanel = ThreadingHTTPServer(("127.0.0.1", 0), Track)
    threading.Thread(target=mixpanel.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{mixpanel.server_port}"
    server = LessonServer(load(environ={**environ, "LESSON_MIXPANEL_TOKEN": "m", "LESSON_MIXPANEL_API_URL": url}))

    async def story():
        await server.start()
        for _ in range(2):
            async with client(server, client="participant", lesson_id="1", access_token=mint()) as sio:
                await join(sio)
                await join(sio)
        await server.stop()

    try:
        io_loop.run_sync(story)
    finally:
        mixpanel.shutdown()
        mixpanel.server_close()
    (event,) = received
    assert event["event"] == "reconnect"
    properties = event["properties"]
    assert properties["token"] == "m"
    assert (properties["distinct_id"], properties["lesson_id"], properties["role"]) == ("p1", "1", "student")
    assert properties["time"]
    assert properties["$insert_id"]


def test_a_store_that_is_not_there_stops_the_start(io_loop, environ):
    server = LessonServer(load(environ={**environ, "LESSON_REDIS_URL": "redis://127.0.0.1:1"}))
    with pytest.raises(StoreUnavailable) as caught:
        io_loop.run_sync(server.start)
    assert caught.value.cause.startswith("Redis: ")
    io_loop.run_sync(server.stop)


def test_a_key_that_does_not_fit_stops_the_start(environ):
    with pytest.raises(SettingsError, match=r"auth\.key"):
        LessonServer(load(environ={**environ, "LESSON_AUTH_ALGORITHM": "RS256"}))


def test_a_short_key_is_worth_a_line(environ, caplog):
    LessonServer(load(environ={**environ, "LESSON_AUTH_KEY": "short"}))
    assert "auth.key" in caplog.text
    assert "short:" not in caplog.text


@pytest.mark.gen_test
async def test_a_class_joins_at_once(server, redis_client, mint):
    async def participant(number):
        async with client(server, client="participant", lesson_id="1", access_token=mint(f"p{number}")) as sio:
            answer = await join(sio)
            await everybody.wait()
            return answer

    everybody = asyncio.Barrier(60)
    assert await asyncio.gather(*(participant(number) for number in range(60))) == [SUCCESS] * 60
    await until(lambda: not redis_client.exists("lesson_student_1"))
