"""stream.py: server-sent events, and what becomes of a stream that nobody reads."""

import asyncio
import contextlib
import socket
from urllib.parse import urlsplit

import pytest
from event_streams import event_stream
from waiting import until

from lesson_server.http import stream as stream_module
from lesson_server.http.access import Access
from lesson_server.http.stream import StreamHandler
from lesson_server.protocol import limits
from lesson_server.protocol.server import EXTRA_SOCKETS
from lesson_server.server import LessonServer
from lesson_server.settings.sources import load
from lesson_server.stores.redis.console_sessions import ConsoleSessions

TOKEN = "the-admin-token-of-the-tests-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Source:
    """Events for a stream: what a test puts in; counts the streams that read them."""

    def __init__(self):
        self.queue = asyncio.Queue()
        self.readers = 0

    async def events(self):
        self.readers += 1
        try:
            if self.queue.empty():
                yield None  # the head of the response is sent with the first event
            while True:
                event = await self.queue.get()
                if event is StopAsyncIteration:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.readers -= 1

    def put(self, *events):
        for event in events:
            self.queue.put_nowait(event)


def add_stream(server, source, path="/test/events", **options):
    class Handler(StreamHandler):
        async def get(self):
            await self.serve(source.events(), **options)

    access = Access(TOKEN, False, ConsoleSessions(server._redis))
    server._protocol.add_pages([(path, Handler, {"access": access})])
    return server.url + path


@pytest.fixture
def source(io_loop):
    return Source()


@pytest.fixture
def url(io_loop, start_server, source):
    server = start_server()
    yield add_stream(server, source)
    io_loop.run_sync(lambda: until(lambda: source.readers == 0))
    assert StreamHandler.streams == set()


@pytest.mark.gen_test
async def test_events_are_sent_as_they_come(url, source):
    source.put(("one", {"n": 1}), None, ("one", {"n": 1}))
    async with event_stream(url, BEARER) as stream:
        assert await stream.response.content.readline() == b"retry: 1000\n"
        assert await stream.response.content.readline() == b"\n"
        assert await stream.response.content.readline() == b"event: one\n"
        assert await stream.response.content.readline() == b'data: {"n":1}\n'
        assert await stream.response.content.readline() == b"\n"
        assert await stream.next() == (None, None)
        assert await stream.event() == ("one", {"n": 1})
        assert stream.response.headers["X-Accel-Buffering"] == "no"
        assert stream.response.headers["Cache-Control"] == "no-store"


@pytest.mark.gen_test
async def test_an_event_that_is_like_the_last_one_of_its_name_may_be_left_out(server, source):
    async with event_stream(add_stream(server, source, only_changes=True), BEARER) as stream:
        source.put(("a", 1), ("b", 1), ("a", 1), ("b", 2), ("a", 1), ("a", 2), ("a", 1))
        assert [await stream.event() for _ in range(5)] == [("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 1)]


@pytest.mark.gen_test
async def test_a_stream_ends_with_its_events(url, source):
    async with event_stream(url, BEARER) as stream:
        source.put(("one", 1), StopAsyncIteration)
        assert await stream.ended() == ["one"]


@pytest.mark.parametrize("before", [[], [("one", 1)]], ids=["at first", "later"])
@pytest.mark.gen_test
async def test_a_defect_is_logged_and_ends_the_stream(url, source, caplog, before):
    source.put(*before, LookupError("a defect"))
    if not before:
        async with event_stream(url, BEARER, status=500) as stream:
            assert await stream.response.text() == "500: internal error\n"
    else:
        async with event_stream(url, BEARER) as stream:
            assert await stream.ended() == ["one"]
    assert "GET request failed" in caplog.text
    assert "a defect" in caplog.text


@pytest.mark.gen_test
async def test_a_stream_needs_the_token(url):
    async with event_stream(url, status=401) as stream:
        assert await stream.response.text() == "401: the request needs the admin token\n"


@pytest.mark.gen_test
async def test_nothing_is_left_when_the_browser_has_gone(url, source, caplog):
    """At once: not only when the next event is sent."""
    tasks = asyncio.all_tasks()
    async with event_stream(url, BEARER) as stream:
        source.put(("one", 1))
        await stream.event()
        assert source.readers == 1
    await until(lambda: source.readers == 0)
    await until(lambda: asyncio.all_tasks() <= tasks)
    assert caplog.records == []


@pytest.mark.gen_test
async def test_there_are_so_many_streams_at_most(url, source, monkeypatch):
    assert stream_module.MAX_STREAMS <= EXTRA_SOCKETS / 2  # probes need places too
    monkeypatch.setattr(stream_module, "MAX_STREAMS", 2)
    async with event_stream(url, BEARER) as one:
        source.put(("one", 1))
        await one.event()
        async with event_stream(url, BEARER):
            await until(lambda: source.readers == 2)
            async with event_stream(url, BEARER, status=503) as three:
                assert await three.response.text() == "503: too many pages are open, try again\n"
        await until(lambda: source.readers == 1)
        async with event_stream(url, BEARER):
            await until(lambda: source.readers == 2)


async def connected(url):
    """A raw connection that has asked for a stream and reads nothing."""
    parts = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.connect((parts.hostname, parts.port))
    head = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


@pytest.mark.gen_test
async def test_a_reader_who_is_too_slow_is_dropped(url, source, monkeypatch):
    with contextlib.closing(await connected(url)):
        await until(lambda: source.readers == 1)
        monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT", 0.05)
        source.put(*[("large", "x" * 2**20)] * 100)
        await until(lambda: source.readers == 0)
        assert source.queue.qsize() > 50  # what it did not read has not been kept


@pytest.mark.gen_test
async def test_a_computer_that_is_switched_off_is_noticed(url, source, server):
    """Its kernel acknowledges nothing; ours gives up after the time that the socket has for it."""
    async with event_stream(url, BEARER):
        await until(lambda: source.readers == 1)
        (handler,) = StreamHandler.streams
        of_socket = handler.request.connection.stream.socket  # type: ignore[attr-defined]
        assert of_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == stream_module.USER_TIMEOUT == 10_000


@pytest.fixture
def small_server(start_server):
    return start_server(LESSON_SERVER_MAX_CONNECTIONS="1")


@pytest.mark.gen_test
async def test_new_connections_do_not_evict_a_stream(small_server, source):
    server = small_server
    places = server._protocol.places
    parts = urlsplit(server.url)
    async with event_stream(add_stream(server, source), BEARER) as stream:
        source.put(("one", 1))
        await stream.event()
        evicted = []
        take = places.take

        def watch(on_evicted):
            return take(lambda: (evicted.append(1), on_evicted()))

        places.take = watch
        with contextlib.ExitStack() as stack:
            for _ in range(places._limit + 20):
                stack.enter_context(contextlib.closing(socket.create_connection((parts.hostname, parts.port))))
                await asyncio.sleep(0)
            await until(lambda: len(places) == places._limit and len(places.kept) == 1)
            source.put(("two", 2))
            assert await stream.event() == ("two", 2)
    await until(lambda: len(places.kept) == 0)


@pytest.mark.parametrize("drains", [False, True], ids=["stop", "drain"])
def test_the_end_of_the_server_does_not_wait_for_streams(io_loop, environ, caplog, source, drains):
    server = LessonServer(load(environ={**environ, "LESSON_SERVER_DRAIN": "0.01"}))

    async def story():
        await server.start()
        async with event_stream(add_stream(server, source), BEARER) as stream:
            source.put(("one", 1))
            await stream.event()
            if drains:
                await server.drain()
                source.put(("two", 2))
                assert await stream.event() == ("two", 2)  # until the stop
            await server.stop()
            assert source.readers == 0
            assert await stream.ended() == []
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    io_loop.run_sync(story, timeout=20)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
