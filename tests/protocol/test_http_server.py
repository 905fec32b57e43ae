"""http_server.py: what is too large or malformed is refused, and who reads no answer is closed."""

import asyncio
import socket
import struct

import pytest
from edge import (
    Edge,
    edge_fixture,  # noqa: F401
    short_timeouts_fixture,  # noqa: F401
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_client import POLLING, SECRET, UPGRADE_HEADERS, websocket_query
from tornado.ioloop import IOLoop
from waiting import LONG, until

from lesson_server.protocol import limits
from lesson_server.protocol.limits import MAX_HEAD_SIZE, MAX_HEADER_LINES, MAX_PARAMETERS, MAX_URL_SIZE
from lesson_server.protocol.server import EXTRA_SOCKETS

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"
WAITING = b"GET /socket.io/?%b&sid=%%b HTTP/1.1\r\nHost: here\r\n\r\n" % POLLING.encode()
NOT_FOUND = b"GET /nowhere HTTP/1.1\r\nHost: here\r\n\r\n"
HALF_A_BODY = b"POST /socket.io/ HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n12345678"
MALFORMED = b"malformed\r\n\r\n"
UPGRADE = b"GET /socket.io/?%b HTTP/1.1\r\nHost: here\r\n%b\r\n" % (
    websocket_query().encode(),
    "".join(f"{name}: {value}\r\n" for name, value in UPGRADE_HEADERS.items()).encode(),
)


# Answers that nobody reads


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(METRICS, id="one"),
        pytest.param(METRICS * 1_000, id="pipelined"),
        pytest.param(HEALTH * 1_000, id="pipelined, small"),
        pytest.param(NOT_FOUND * 1_000, id="pipelined, refused"),
        pytest.param(HEALTH * 500 + MALFORMED, id="pipelined, malformed at the end"),
    ],
)
@pytest.mark.gen_test
async def test_a_client_that_reads_no_answer_is_closed(edge: Edge, requests: bytes) -> None:
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connection(receive_buffer=4096)
    client.write_soon(requests)
    await until(lambda: len(edge.server.places) == 1)
    await until(lambda: len(edge.server.places) == 0)


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.gen_test
async def test_a_polling_client_that_reads_no_answer_is_closed(edge: Edge) -> None:
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected_polling()
    await edge.sio.eio.send(client.sid, "x" * 30_000)
    connection = await edge.connection(receive_buffer=4096)
    connection.write_soon(WAITING % client.sid.encode())
    await until(lambda: not edge.sockets[0]._outbox)
    await until(lambda: len(edge.server.places) == 0)


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.gen_test
async def test_a_client_that_does_not_send_its_body_in_time_is_closed(edge: Edge) -> None:
    client = await edge.connection()
    await client.write(HALF_A_BODY)
    assert await client.is_ended() == b""


@pytest.fixture
def long_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No deadline ends while a test runs."""
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT", 10 * LONG)


@pytest.mark.usefixtures("long_timeouts")
@pytest.mark.parametrize("edge", [1 - EXTRA_SOCKETS], indirect=True, ids=["one socket"])
@pytest.mark.gen_test
async def test_a_client_whose_body_has_not_arrived_is_evicted_by_a_new_one(edge: Edge) -> None:
    slow = await edge.connection()
    await slow.write(HALF_A_BODY)
    await until(lambda: edge.server._http._connections)
    client = await edge.connection()
    await client.write(HEALTH)
    assert (await client.response()).body == b"ok\n"
    assert await slow.is_ended() == b""
    await until(lambda: not edge.server._http._connections)


@pytest.mark.gen_test
async def test_each_connection_carries_one_request(edge: Edge) -> None:
    """The first request decides who serves the socket."""
    client = await edge.connection()
    await client.write(HEALTH * 2)
    response = await client.response()
    assert (response.status, response.headers["connection"]) == (200, "close")
    assert await client.is_ended() == b""


@pytest.mark.parametrize("head", [HEALTH, UPGRADE], ids=["HTTP", "websocket"])
@pytest.mark.gen_test
async def test_a_client_that_resets_its_connection_after_its_request_leaves_nothing(edge: Edge, head: bytes) -> None:
    """The fixture asserts that nothing of it is logged."""
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", edge.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(head)
        await asyncio.sleep(0)
    await edge.serves_others()
    await until(lambda: len(edge.server.places) == 0)


# Requests that are too large


def request(path: str = "/healthz", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: here", *headers, "", ""]).encode()


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        pytest.param(
            request("/healthz?" + "x" * (MAX_URL_SIZE - len("/healthz?"))),
            request("/healthz?" + "x" * (MAX_URL_SIZE - len("/healthz?") + 1)),
            id="URL",
        ),
        pytest.param(
            request("/healthz?" + "&".join("x" * MAX_PARAMETERS)),
            request("/healthz?" + "&".join("x" * (MAX_PARAMETERS + 1))),
            id="parameters",
        ),
        pytest.param(
            request("/healthz", *[f"a{number}: x" for number in range(MAX_HEADER_LINES - 1)]),
            request("/healthz", *[f"a{number}: x" for number in range(MAX_HEADER_LINES)]),
            id="header lines",
        ),
        pytest.param(
            request("/healthz", *["a: x"] * (MAX_HEADER_LINES - 1)),
            request("/healthz", *["a: x"] * MAX_HEADER_LINES),
            id="lines of one header",
        ),
        pytest.param(
            request("/healthz", "a: " + "x" * (MAX_HEAD_SIZE - len(request("/healthz", "a: ")))),
            request("/healthz", "a: " + "x" * (MAX_HEAD_SIZE - len(request("/healthz", "a: ")) + 1)),
            id="head",
        ),
    ],
)
@pytest.mark.gen_test
async def test_a_head_that_is_too_large_is_not_kept(edge: Edge, allowed: bytes, refused: bytes) -> None:
    client = await edge.connection()
    await client.write(allowed)
    assert (await client.response()).body == b"ok\n"
    client = await edge.connection()
    await client.write(refused)
    assert (await client.is_ended())[:13] in {b"", b"HTTP/1.1 400 ", b"HTTP/1.1 431 "}


# Requests that are none

HOSTS = [
    "a:" + "9" * 5_000,
    "[",
    "]",
    "[::1",
    "a:b:c",
    "a:٣",
    "\xff",
    "",
    ",",
    "a,b",
    "%zz",
    "http://",
    "a:-1",
    "a:" + "0" * 400,
]


@pytest.mark.parametrize("host", HOSTS, ids=[host[:10] for host in HOSTS])
@pytest.mark.parametrize("header", ["Host: {}\r\n", "Host: here\r\nOrigin: http://{}\r\n"], ids=["Host", "Origin"])
@pytest.mark.gen_test
async def test_a_junk_host_is_refused_or_answered_without_a_line_in_the_log(edge: Edge, host: str, header: str) -> None:
    client = await edge.connection()
    await client.write(f"GET /socket.io/?{POLLING} HTTP/1.1\r\n{header.format(host)}Connection: close\r\n\r\n".encode())
    assert (await client.is_ended())[:9] in {b"", b"HTTP/1.1 "}
    assert edge.log == []


TOKENS = st.sampled_from(
    [
        *(b"GET", b"POST", b" ", b"/", b"/healthz", b"/socket.io/?EIO=4&transport=polling", b"?", b"&", b"%", b"%ff"),
        *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9", b"\r\n", b"\n", b"\r\n\r\n", b":", b"=", b";", b'"', b"0", b"f", b"-1"),
        *(
            b"Host: here",
            b"Host: a:",
            b"9" * 5_000,
            b"Content-Length: ",
            b"Transfer-Encoding: chunked",
            b"Content-Type: ",
        ),
        *(b"Expect: 100-continue", b"Connection: ", b"close", b"keep-alive", b"Upgrade: websocket", b"Cookie: "),
        *(b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"--x", b"Content-Encoding: gzip"),
        *(b"If-None-Match: ", b"Origin: ", b"http://", b"Sec-WebSocket-Key: ", b"Sec-WebSocket-Version: 13"),
        *(b"Accept-Language: ", b"X-Forwarded-For: ", b"\x00", b"\xff", SECRET.encode()),
    ]
)
HEADS = st.builds(
    lambda start, host, headers, body: b"\r\n".join([start, host, *headers, b"", b""]) + body,
    st.one_of(
        st.sampled_from([b"GET /healthz HTTP/1.1", b"POST /socket.io/?EIO=4 HTTP/1.1", b"OPTIONS * HTTP/1.1"]),
        st.lists(TOKENS, max_size=6).map(b"".join),
    ),
    st.sampled_from([b"Host: here", b"Host: a:" + b"9" * 5_000]),
    st.lists(st.lists(TOKENS, max_size=4).map(b"".join), max_size=4),
    st.lists(TOKENS, max_size=6).map(b"".join),
)


@pytest.mark.without_coverage
def test_whatever_bytes_arrive_for_http_nothing_is_logged_and_others_are_served(edge: Edge, io_loop: IOLoop) -> None:
    """The fixture asserts that there is no warning, no traceback and nothing of what was sent."""

    async def attack(data: bytes) -> None:
        client = await edge.connection()
        await client.write(data)
        client._writer.write_eof()
        await client.is_ended()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(HEADS | st.lists(TOKENS, max_size=12).map(b"".join))
    def fuzz(data: bytes) -> None:
        io_loop.run_sync(lambda: attack(data), timeout=20)

    fuzz()
    io_loop.run_sync(edge.serves_others)
