"""Requests that Engine.IO refuses, connections that never become one, and any bytes at all."""

import asyncio
import gc

import orjson
import pytest
from edge import (
    ACK,
    BINARY_JOIN,
    JOIN,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
    short_timeouts_fixture,  # noqa: F401
)
from engine_requests import FOREIGN, GET, HOST, POST, WEBSOCKET, short_timeouts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_client import POLLING, SECRET, UPGRADE_HEADERS, frame, websocket_query
from tornado.ioloop import IOLoop
from waiting import LONG, until

from lesson_server.protocol import limits
from lesson_server.protocol.limits import MAX_MESSAGE_SIZE
from lesson_server.protocol.places import Places

# Refused requests

# By their codes. All but one are those of the reference implementation.
MESSAGES = {
    0: "Transport unknown",
    1: "Session ID unknown",
    2: "Bad handshake method",
    3: "Bad request",
    4: "origin not allowed",
    5: "Unsupported protocol version",
}


def without(header: str) -> dict[str, str]:
    return {name: value for name, value in UPGRADE_HEADERS.items() if name != header}


REFUSED_REQUESTS = [
    pytest.param("GET", POLLING + "&sid=nobody", {}, 400, 1, id="polling: unknown sid"),
    pytest.param("POST", POLLING + "&sid=nobody", {}, 400, 1, id="POST: unknown sid"),
    pytest.param("GET", websocket_query("nobody"), UPGRADE_HEADERS, 400, 1, id="websocket: unknown sid"),
    pytest.param("POST", POLLING, {}, 400, 2, id="POST without a sid"),
    pytest.param("GET", "EIO=3&transport=polling", {}, 400, 5, id="polling: EIO=3"),
    pytest.param("GET", "EIO=3&transport=websocket", UPGRADE_HEADERS, 400, 5, id="websocket: EIO=3"),
    pytest.param("GET", "transport=polling", {}, 400, 5, id="no EIO"),
    pytest.param("GET", "EIO=4&transport=foo", {}, 400, 0, id="unknown transport"),
    pytest.param("GET", "", {}, 400, 0, id="no query"),
    pytest.param("GET", WEBSOCKET, {}, 400, 0, id="transport=websocket without an upgrade"),
    pytest.param("GET", POLLING, UPGRADE_HEADERS, 400, 0, id="transport=polling with an upgrade"),
    pytest.param("GET", WEBSOCKET, UPGRADE_HEADERS | {"Connection": "keep-alive"}, 400, None, id="half an upgrade"),
    pytest.param("GET", WEBSOCKET, UPGRADE_HEADERS | {"Connection": ""}, 400, None, id="websocket: empty Connection"),
    pytest.param("GET", WEBSOCKET, without("Connection"), 400, None, id="websocket: no Connection"),
    pytest.param("GET", WEBSOCKET, without("Sec-WebSocket-Key"), 400, 3, id="websocket: no key"),
    *[
        pytest.param("GET", WEBSOCKET, UPGRADE_HEADERS | {"Sec-WebSocket-Key": key}, 400, 3, id=f"websocket: key {key}")
        for key in ("", "x", "dGhl", UPGRADE_HEADERS["Sec-WebSocket-Key"] + "!")
    ],
    pytest.param("GET", WEBSOCKET, UPGRADE_HEADERS | {"Sec-WebSocket-Version": "8"}, 426, None, id="websocket: old"),
    pytest.param("GET", POLLING, {"Origin": FOREIGN}, 403, 4, id="polling: foreign origin"),
    pytest.param("GET", POLLING, {"Origin": "null"}, 403, 4, id="polling: origin null"),
    pytest.param("POST", POLLING, {"Origin": FOREIGN}, 403, 4, id="POST: foreign origin"),
    pytest.param("OPTIONS", POLLING, {"Origin": FOREIGN}, 403, 4, id="OPTIONS: foreign origin"),
    pytest.param("GET", WEBSOCKET, UPGRADE_HEADERS | {"Origin": FOREIGN}, 403, 4, id="websocket: foreign origin"),
    pytest.param("GET", POLLING + "&sid=%ff", {}, 400, 1, id="invalid UTF-8 in the query"),
    pytest.param("GET", websocket_query("%ff"), UPGRADE_HEADERS, 400, 1, id="websocket: invalid UTF-8 in the query"),
    pytest.param("PUT", POLLING, {}, 405, 3, id="PUT"),
    pytest.param("BREW", POLLING, {}, 405, 3, id="unknown method"),
]


@pytest.mark.parametrize(("method", "query", "headers", "status", "code"), REFUSED_REQUESTS)
@pytest.mark.gen_test
async def test_a_refused_request_is_answered_and_its_connection_closed(
    edge: Edge, method: str, query: str, headers: dict[str, str], status: int, code: int | None
) -> None:
    connection = await edge.connection()
    response = await connection.request(method, f"{query}&access_token={SECRET}", **headers)
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    if code is not None:
        assert orjson.loads(response.body) == {"code": code, "message": MESSAGES[code]}
    assert SECRET.encode() not in response.body
    assert response.headers["connection"] == "close"
    assert await connection.is_ended() == b""
    assert not edge.sockets
    assert edge.log == []


async def new_clients_are_refused(edge: Edge) -> None:
    for query, headers in ((POLLING, {}), (WEBSOCKET, UPGRADE_HEADERS)):
        response = await edge.request("GET", query, **headers)
        assert response.status == 503
        assert b"busy" in response.body


@pytest.mark.gen_test
async def test_new_clients_are_refused_when_there_is_no_place_for_an_engine_socket(edge: Edge) -> None:
    edge.sio.eio._socket_places = Places(1)
    await edge.connected()
    await new_clients_are_refused(edge)


@pytest.mark.gen_test
async def test_a_server_that_is_about_to_stop_refuses_new_clients_and_serves_the_others(
    edge: Edge,
) -> None:
    polling, websocket = await edge.connected_polling(), await edge.connected()
    edge.sio.eio.refuse_new_clients()
    await new_clients_are_refused(edge)
    await polling.post(JOIN_WITH_ACK)
    assert await polling.poll() == [ACK]
    await websocket.send(JOIN_WITH_ACK)
    assert await websocket.receive() == ACK


# Sockets that never become a request


@short_timeouts
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="silence"),
        pytest.param(b"GET /socket.io/?access_token=" + SECRET.encode(), id="half a request line"),
        pytest.param(GET + HOST, id="half a header"),
        pytest.param(POST + b"Content-Length: 9\r\n\r\n12345678", id="half a body"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n4\r\n", id="half of chunks"),
        pytest.param(b"\x16\x03\x01\x02\x00" + bytes(range(256)), id="TLS"),
        pytest.param(SECRET.encode() * 2_000, id="garbage without an end"),
        pytest.param(SECRET.encode() + b"\r\n\r\n", id="garbage"),
        pytest.param(GET + b"Host: " + SECRET.encode() + b"/\r\n\r\n", id="bad host"),
        pytest.param(GET + HOST + b"A: " + b"x" * MAX_MESSAGE_SIZE + b"\r\n\r\n", id="large header"),
        pytest.param(GET + HOST + SECRET.encode() + b"\r\n\r\n", id="header without a colon"),
        pytest.param(POST + b"Content-Length: -1\r\n\r\n", id="negative length"),
        pytest.param(b"GET /socket.io/ HTTP/2.0\r\n" + HOST + b"\r\n", id="HTTP/2"),
    ],
)
@pytest.mark.gen_test
async def test_a_connection_that_sends_no_request_is_closed(edge: Edge, data: bytes) -> None:
    connection = await edge.connection()
    await connection.write(data)
    answer = await connection.is_ended()
    assert answer[:13] in {b"", b"HTTP/1.1 400 ", b"HTTP/1.1 431 "}
    assert edge.log == []


@short_timeouts
@pytest.mark.parametrize("head", [GET + b"A: ", POST + b"Content-Length: 9999\r\n\r\n"], ids=["header", "body"])
@pytest.mark.gen_test
async def test_a_connection_that_sends_slowly_is_closed(edge: Edge, head: bytes) -> None:
    """Bytes now and then put no deadline off."""
    connection = await edge.connection()
    await connection.write(head)

    async def trickle() -> None:
        while True:
            await connection.write(b"x")
            await asyncio.sleep(limits.HANDSHAKE_TIMEOUT / 10)

    trickling = asyncio.create_task(trickle())
    await connection.is_ended()
    trickling.cancel()


@short_timeouts
@pytest.mark.gen_test
async def test_a_connection_is_closed_after_its_response(edge: Edge) -> None:
    connection = await edge.connection()
    assert (await connection.request("OPTIONS", POLLING)).status == 204
    assert await connection.is_ended() == b""


# Anything at all

BEGINNINGS = ["4", "40", "42", "45", "451-", "421", "42[", '42["join_lesson",']

PACKETS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["40{}", JOIN, JOIN_WITH_ACK, BINARY_JOIN, "41", "1", "3", "43[]"]),
    st.builds(str.__add__, st.sampled_from(BEGINNINGS), st.text(max_size=20)),
)

FRAMES = st.one_of(
    PACKETS.map(frame),
    st.binary(max_size=40).map(frame),
    st.builds(frame, st.binary(max_size=130), st.integers(0, 15), final=st.booleans()),
    st.binary(max_size=20),
)


@pytest.mark.without_coverage
def test_whatever_arrives_nothing_is_left_and_nothing_is_logged_as_an_error(edge: Edge, io_loop: IOLoop) -> None:
    """The fixture asserts the rest: no Engine.IO socket, room, environment or attachment is left of any of them."""

    async def attack(frames: list[bytes], *, handshake: bool) -> None:
        client = await (edge.connected() if handshake else edge.websocket())
        await client.write(b"".join(frames))
        client.disappear()
        await until(lambda: not edge.sockets)

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(FRAMES, max_size=12), st.booleans())
    def fuzz(frames: list[bytes], handshake: bool) -> None:
        io_loop.run_sync(lambda: attack(frames, handshake=handshake), timeout=LONG)

    fuzz()
    io_loop.run_sync(edge.serves_others)
    gc.collect()  # a task that failed unseen says so now


@pytest.mark.without_coverage
def test_whatever_is_posted_nothing_is_left_and_nothing_is_logged_as_an_error(edge: Edge, io_loop: IOLoop) -> None:
    bodies = st.one_of(
        st.binary(max_size=60),
        st.lists(PACKETS, max_size=20).map(lambda packets: "\x1e".join(packets).encode()),
    )

    async def attack(body: bytes) -> None:
        client = await edge.polling()
        response = await edge.request("POST", client.query, body, **{"Content-Length": str(len(body))})
        assert response.status in {200, 400}
        await edge.sio.eio.disconnect()

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(bodies)
    def fuzz(body: bytes) -> None:
        io_loop.run_sync(lambda: attack(body), timeout=LONG)

    fuzz()
    io_loop.run_sync(edge.serves_others)
    gc.collect()
