"""server.py: the whole server in one process, its pages and its end."""

import asyncio
import contextlib
import json
import signal
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import socketio
from clients import SUCCESS, client, join, refusal
from commands import running
from prometheus_client.parser import text_string_to_metric_families
from tornado.httpclient import AsyncHTTPClient, HTTPClientError
from tornado.websocket import websocket_connect
from valkeys import Valkeys
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.events.join_lesson import JOIN_LESSON
from lesson_server.protocol.server import EXTRA_SOCKETS
from lesson_server.server import OTHER_FILES, LessonServer, _max_connections
from lesson_server.settings.schema import SettingsError
from lesson_server.settings.sources import load


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

    monkeypatch.setattr(server._readiness, "_probes", {"RDS": server._lessons.ping, "Redis": down})
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
        registered = ("join_lesson", "participant", "registered")
        await until(lambda: dict(server.gateway.count_states())[registered] == 1)
        seen = await metrics(server)
    assert seen["lesson_connections", "participant", "join_lesson", "registered"] == 1
    assert seen["lesson_connections", "participant", "join_lesson", "seated"] == 1
    assert seen["lesson_connections", "teacher", "join_lesson", "connected"] == 1
    assert seen["lesson_events_total", "participant", "join_lesson", "success"] == 3
    assert seen["lesson_events_total", "teacher", "join_lesson", "token_required"] == 1
    assert seen["lesson_event_seconds_count", "participant", "join_lesson"] == 3
    assert seen["lesson_step_seconds_count", "join_lesson", "set_client_presence"] == 2
    assert seen["lesson_reconnects_total",] == 1


@pytest.mark.gen_test
async def test_the_metrics_are_there_before_anything_has_happened(server):
    await until(lambda: server._metrics.registry.get_sample_value("lesson_store_up", {"store": "RDS"}) is not None)
    seen = await metrics(server)
    for outcome in ("success", "store_unavailable", "internal_error", "busy"):
        assert seen["lesson_events_total", "participant", "join_lesson", outcome] == 0
    assert seen["lesson_handshakes_refused_total", "busy"] == 0
    assert seen["lesson_store_up", "RDS"] == seen["lesson_store_up", "Redis"] == seen["lesson_rooms_up",] == 1
    assert seen["lesson_nodes",] == 1
    assert (
        seen["lesson_connections_limit",] == 25_000
        or seen["lesson_connections_limit",] < seen["lesson_open_files_limit",]
    )


@pytest.mark.gen_test
async def test_the_metrics_tell_who_was_refused_and_who_was_dropped(server):
    await refusal(server, {"client": "hub", "lesson_id": "1"})
    websocket = await websocket_connect(server.url.replace("http", "ws") + "/socket.io/?EIO=4&transport=websocket")
    await websocket.write_message("no such packet")
    while await websocket.read_message() is not None:
        pass
    websocket.close()
    seen = await metrics(server)
    assert seen["lesson_handshakes_refused_total", "handshake_refused"] == 1
    assert seen["lesson_clients_dropped_total", "unknown_packet"] == 1


def test_the_metrics_tell_which_store_is_down(io_loop, environ, own_redis, monkeypatch):
    monkeypatch.setattr("lesson_server.sampler.SAMPLE_INTERVAL", 0.1)
    server = LessonServer(load(environ={**environ, "LESSON_REDIS_URL": f"redis://127.0.0.1:{own_redis.start()}"}))

    async def ups():
        seen = await metrics(server)
        return [
            seen.get(name) for name in (("lesson_store_up", "RDS"), ("lesson_store_up", "Redis"), ("lesson_rooms_up",))
        ]

    async def story():
        await server.start()
        await until(lambda: is_told([1, 1, 1]))
        own_redis.kill_all()
        await until(lambda: is_told([1, 0, 0]))
        await server.stop()

    async def is_told(expected):
        return await ups() == expected

    io_loop.run_sync(story, timeout=30)


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


# The drain


@pytest.fixture
def away(io_loop, environ):
    """Makes servers that a test starts and stops itself."""

    def make(**more):
        return LessonServer(load(environ={**environ, **more}))

    return make


async def guests(server, stack, count):
    """Clients of a lesson, and a list to which the moment of each one's end is added."""
    ends = []
    for _ in range(count):
        sio = await stack.enter_async_context(client(server, client="participant", lesson_id="1"))
        sio.on("disconnect", lambda reason: ends.append(time.monotonic()))
        assert await join(sio) == SUCCESS
    return ends


def test_from_the_first_moment_of_a_drain_nobody_new_comes_in_and_the_others_are_served(io_loop, away, mint):
    server = away(LESSON_SERVER_DRAIN="60")

    async def story():
        await server.start()
        async with contextlib.AsyncExitStack() as stack:
            await guests(server, stack, 20)
            drain = asyncio.create_task(server.drain())
            await asyncio.sleep(0)
            answer = await get(server, "/readyz")
            assert (answer.code, answer.body) == (503, b"the server down\n")
            assert (await get(server, "/healthz")).code == 200
            refused = await get(server, "/socket.io/?EIO=4&transport=polling")
            assert refused.code == 503
            assert "the lesson service is busy, try again" in refused.body.decode()
            with pytest.raises(HTTPClientError, match="503"):
                await websocket_connect(server.url.replace("http", "ws") + "/socket.io/?EIO=4&transport=websocket")
            stayed = list(server.gateway.connections)
            assert len(stayed) >= 18
            assert await server.gateway.answer(JOIN_LESSON, stayed[0]) == SUCCESS
            drain.cancel()
            await server.stop()

    io_loop.run_sync(story, timeout=20)


def test_clients_go_in_batches_over_the_time_of_the_drain_with_their_presence(io_loop, away, redis_client, mint):
    server = away(LESSON_SERVER_DRAIN="1")

    async def story():
        await server.start()
        async with contextlib.AsyncExitStack() as stack:
            ends = await guests(server, stack, 12)
            teacher = client(server, client="teacher", lesson_id="1", access_token=mint("t1", "teacher"))
            assert await join(await stack.enter_async_context(teacher)) == SUCCESS
            started = time.monotonic()
            await server.drain()
            await until(lambda: len(ends) == 12 and not server.gateway.connections)
            assert 0.3 < ends[-1] - started < 2.5
            assert max(sum(first <= end < first + 0.1 for end in ends) for first in ends) <= 8
            await until(lambda: redis_client.keys() == ["lesson_seat_1"])
            await server.stop()
            assert redis_client.keys("lesson_node*") == ["lesson_node_seats:{lesson_seat_1}"]  # as long as the seat map

    io_loop.run_sync(story, timeout=20)


@pytest.fixture
def own_redis(tmp_path):
    """A Valkey that may be stopped in the middle: its process."""
    valkeys = Valkeys(tmp_path)
    yield valkeys
    for process in valkeys._running.values():
        process.send_signal(signal.SIGCONT)
    valkeys.kill_all()


def drained(environ, mint, io_loop, fault):
    """Signals a server that has a client, and returns how long it took to end with status 0."""
    with running(**environ) as server:

        async def story():
            sio = socketio.AsyncClient(reconnection=False)
            auth = {"client": "participant", "lesson_id": "1", "access_token": mint()}
            await sio.connect(server.url, transports=["websocket"], auth=auth)
            assert await join(sio) == SUCCESS
            fault()
            started = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert await asyncio.get_running_loop().run_in_executor(None, server.wait, 30) == 0
            await sio.disconnect()
            return time.monotonic() - started

        return io_loop.run_sync(story, timeout=40)


def test_a_second_signal_stops_at_once(environ, io_loop, mint, redis_client):
    with running(**environ, LESSON_SERVER_DRAIN="600") as server:

        async def story():
            async with contextlib.AsyncExitStack() as stack:
                for number in range(8):
                    auth = {"client": "participant", "lesson_id": "1", "access_token": mint(f"p{number}")}
                    assert await join(await stack.enter_async_context(client(server, **auth))) == SUCCESS
                server.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.5)
                assert server.poll() is None
                started = time.monotonic()
                server.send_signal(signal.SIGTERM)
                assert await asyncio.get_running_loop().run_in_executor(None, server.wait, 30) == 0
                assert time.monotonic() - started < 5

        io_loop.run_sync(story, timeout=40)
    assert not redis_client.exists("lesson_student_1")


def test_a_redis_that_hangs_does_not_keep_the_server_beyond_its_deadline(environ, io_loop, mint, own_redis):
    port = own_redis.start()
    environ = {**environ, "LESSON_REDIS_URL": f"redis://127.0.0.1:{port}", "LESSON_SERVER_DRAIN": "0.5"}
    (process,) = own_redis._running.values()
    assert drained(environ, mint, io_loop, lambda: process.send_signal(signal.SIGSTOP)) < 10
    process.send_signal(signal.SIGCONT)
    # What it could not take back is left for the others to sweep.
    assert own_redis.ask(port, "HLEN", "lesson_node_counts") == 1


@pytest.mark.parametrize(
    ("files", "room"), [(100_000, 700), (500, 500 - 20 - 30 - EXTRA_SOCKETS - OTHER_FILES), (100, 1)]
)
def test_there_is_max_connections_as_many_clients_as_are_set_or_as_there_may_be_open_files(
    environ, monkeypatch, files, room
):
    """Beside the connections of the pools, the sockets of those who are told that it is full, and the rest."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (files, files))
    settings = load(
        environ={
            **environ,
            "LESSON_SERVER_MAX_CONNECTIONS": "700",
            "LESSON_RDS_POOL_SIZE": "20",
            "LESSON_REDIS_POOL_SIZE": "30",
        }
    )
    assert _max_connections(settings) == room


def test_a_client_too_many_gets_a_connect_error(io_loop, start_server):
    server = start_server(LESSON_SERVER_MAX_CONNECTIONS="1")

    async def story():
        async with client(server, client="participant", lesson_id="1"):
            told = await refusal(server, {"client": "participant", "lesson_id": "1"})
            assert told == "the lesson service is busy, try again"

    io_loop.run_sync(story)
