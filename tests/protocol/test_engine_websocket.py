"""engine.py and websocket.py as clients see them: the websocket transport."""

import asyncio
import gc
import socket
import weakref

import orjson
import pytest
from edge import (
    ACK,
    JOIN,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
    short_timeouts_fixture,  # noqa: F401
)
from engine_requests import WEBSOCKET, handshake
from raw_client import CLOSE, PING, SECRET, TEXT, UPGRADE_HEADERS, Client, frame, websocket_query
from waiting import LONG, until

from lesson_server.protocol import limits
from lesson_server.protocol.limits import (
    MAX_HEADER_LINES,
    MAX_MESSAGE_SIZE,
    MAX_PARAMETERS,
    MAX_UNREAD_BYTES,
    MAX_URL_SIZE,
)
from lesson_server.protocol.websocket import Websocket


def join_of_size(size: int) -> str:
    return '42["join_lesson"' + " " * (size - len(JOIN)) + "]"


@pytest.mark.gen_test
async def test_a_websocket_is_offered_no_upgrade(edge: Edge) -> None:
    connection = await edge.connection()
    assert (await connection.request("GET", WEBSOCKET, **UPGRADE_HEADERS)).status == 101
    opening = await connection.receive()
    assert isinstance(opening, str)
    assert orjson.loads(opening[1:])["upgrades"] == []


@pytest.mark.parametrize("options", ["upgrade", "keep-alive, Upgrade", "Upgrade,keep-alive"])
@pytest.mark.gen_test
async def test_an_upgrade_may_stand_among_other_options_of_the_connection(edge: Edge, options: str) -> None:
    """Firefox sends the second."""
    client = await edge.connected(Connection=options)
    await client.send(JOIN_WITH_ACK)
    assert await client.receive() == ACK


@pytest.mark.gen_test
async def test_the_refusal_of_another_version_names_the_supported_one(edge: Edge) -> None:
    response = await edge.request("GET", WEBSOCKET, **UPGRADE_HEADERS | {"Sec-WebSocket-Version": "8"})
    assert (response.status, response.headers["sec-websocket-version"]) == (426, "13")


@pytest.mark.gen_test
async def test_websocket_handshake_join_and_acknowledgement(edge: Edge) -> None:
    client = await edge.connected()
    await client.send(JOIN_WITH_ACK)
    assert await client.receive() == ACK
    await edge.sio.eio.send(edge.sockets[0].sid, b"\x02")
    assert await client.receive() == b"\x02"
    await client.leave()
    await until(lambda: edge.application.reasons == ["transport close"])


@pytest.mark.gen_test
async def test_frames_that_come_with_the_request_are_handled_after_it(edge: Edge) -> None:
    """A client should wait for the answer, but Tornado has read it already."""
    connection = await edge.connection()
    headers = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": connection.host} | UPGRADE_HEADERS).items())
    request = f"GET /socket.io/?{websocket_query()} HTTP/1.1\r\n{headers}\r\n"
    await connection.write(request.encode() + frame("40{}") + frame(JOIN_WITH_ACK))
    assert (await connection.response()).status == 101
    opening, connected, answer = [await connection.receive() for _ in range(3)]
    assert (opening[:1], connected[:2], answer) == ("0", "40", ACK)


@pytest.mark.gen_test
async def test_a_request_that_arrives_in_pieces_is_waited_for(edge: Edge) -> None:
    connection = await edge.connection()
    headers = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": connection.host} | UPGRADE_HEADERS).items())
    request = f"GET /socket.io/?{websocket_query()} HTTP/1.1\r\n{headers}\r\n".encode()
    for byte in request[:-1]:
        await connection.write(bytes([byte]))
        await asyncio.sleep(0)
    assert not edge.sockets
    await connection.write(request[-1:])
    assert (await connection.response()).status == 101


@pytest.mark.gen_test
async def test_the_options_of_a_connection_may_stand_on_several_lines(edge: Edge) -> None:
    connection = await edge.connection()
    headers = UPGRADE_HEADERS | {"Connection": "keep-alive\r\nConnection: Upgrade"}
    assert (await connection.request("GET", websocket_query(), **headers)).status == 101


@pytest.mark.gen_test
async def test_a_client_that_does_not_answer_the_close_frame_is_closed(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.05)
    client = await edge.connected()
    await edge.sio.eio.disconnect()
    assert await client.is_ended() == b"\x88\x02\x03\xe8"
    assert not edge.sio.eio.websockets


@pytest.mark.gen_test
async def test_a_server_that_has_stopped_closes_the_websockets_that_are_left(edge: Edge) -> None:
    """Whatever their clients do: these have not even been told."""
    clients = [await edge.connected() for _ in range(3)]
    await edge.sio.eio.abort()
    assert [await client.is_ended() for client in clients] == [b""] * 3
    await until(lambda: edge.application.reasons == ["transport close"] * 3)


@pytest.mark.gen_test
async def test_compression_is_not_negotiated(edge: Edge) -> None:
    """A compressor costs 187 kB a connection."""
    connection = await edge.connection()
    offer = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
    response = await connection.request("GET", websocket_query(), **UPGRADE_HEADERS, **offer)
    assert response.status == 101
    assert "sec-websocket-extensions" not in response.headers


@pytest.mark.gen_test
async def test_the_end_of_an_engine_socket_closes_its_websocket(edge: Edge) -> None:
    client = await edge.connected()
    await edge.sio.eio.disconnect()
    assert await client.messages() == []
    assert edge.application.reasons == ["server disconnect"]


@pytest.mark.parametrize("packet", ["1", "41"])
@pytest.mark.gen_test
async def test_a_client_can_end_its_engine_socket_itself(edge: Edge, packet: str) -> None:
    websocket = await edge.connected()
    await websocket.send(packet)
    assert await websocket.messages() == []
    polling = await edge.connected_polling()
    assert (await polling.post(packet)).body == b"ok"
    assert await polling.poll() == ["1"]
    assert edge.application.reasons == ["client disconnect"] * 2
    assert edge.log == []


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(frame(join_of_size(MAX_MESSAGE_SIZE + 1)), id="message too large"),
        pytest.param(frame("", length=2**63 - 1), id="message announced too large"),
        pytest.param(
            frame(join_of_size(MAX_MESSAGE_SIZE), final=False) + frame(b" ", 0x0), id="fragments too large together"
        ),
        pytest.param(frame(b"4\xff", TEXT), id="invalid UTF-8"),
        pytest.param(frame("4", 0xF), id="unknown opcode"),
        pytest.param(b"\xff" + frame("4")[1:], id="reserved bits"),
        *[pytest.param(bytes([0x81 | bit]) + frame(JOIN)[1:], id=f"reserved bit {bit}") for bit in (0x40, 0x20, 0x10)],
        pytest.param(frame("4", 0x0), id="continuation of nothing"),
        pytest.param(frame("4", final=False) * 2, id="fragments of two messages"),
        pytest.param(frame("x" * 126, PING), id="large control frame"),
        pytest.param(frame(b"\x03\xe8\xff", CLOSE), id="close frame with invalid UTF-8"),
        pytest.param(frame(b"\x00", CLOSE), id="close frame with half a code"),
        pytest.param(frame(""), id="empty packet"),
        pytest.param(frame("2"), id="ping of a client"),
        pytest.param(frame("2probe"), id="probe of a websocket"),
        pytest.param(frame("5"), id="upgrade of a websocket"),
        pytest.param(frame("9" + SECRET), id="unknown packet"),
        pytest.param(frame(b""), id="empty binary message"),
        pytest.param(frame("4" + SECRET), id="malformed message"),
        pytest.param(SECRET.encode() * 1000, id="garbage"),
    ],
)
@pytest.mark.gen_test
async def test_a_frame_that_no_client_may_send_ends_the_engine_socket(edge: Edge, frames: bytes) -> None:
    client = await edge.connected()
    await client.write(frames)
    await client.messages()
    await until(lambda: len(edge.application.reasons) == 1)
    assert edge.application.joins == []
    await edge.serves_others()


@pytest.mark.gen_test
async def test_a_message_may_be_as_large_as_the_handshake_says(edge: Edge) -> None:
    client = await edge.connected()
    await client.send(join_of_size(MAX_MESSAGE_SIZE))
    await until(lambda: edge.application.joins)


@pytest.mark.gen_test
async def test_what_follows_a_fault_is_ignored(edge: Edge) -> None:
    """The frames that arrived with it have been read already; each would be a line in the log."""
    client = await edge.connected()
    await client.send("9", *[JOIN] * 500, *["9"] * 500)
    await client.messages()
    assert edge.application.joins == []
    assert edge.log == ["client dropped: unknown packet"]


@pytest.mark.gen_test
async def test_what_follows_a_text_that_is_no_utf_8_is_ignored(edge: Edge) -> None:
    client = await edge.connected()
    await client.write(frame(b"\xff", TEXT) + frame(JOIN))
    await client.messages()
    await until(lambda: edge.application.reasons)
    assert edge.application.joins == []


@pytest.mark.parametrize("closing_frames", [frame("41") + frame(b"", CLOSE), frame(b"", CLOSE)], ids=["41", "close"])
@pytest.mark.gen_test
async def test_a_client_that_closes_and_never_reads_is_closed_in_time(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, closing_frames: bytes
) -> None:
    """What it has left unread would keep its connection open, and no Engine.IO socket would count it."""
    monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.2)
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected(receive_buffer=4096)
    engine_socket = edge.sockets[0]
    while engine_socket._websocket.is_writable:
        engine_socket.send("x" * 1_000)
    await client.write(closing_frames)
    await until(lambda: not edge.sockets and not edge.sio.eio.websockets)


@pytest.mark.gen_test
async def test_a_lost_connection_leaves_no_timer(edge: Edge) -> None:
    client = await edge.connected()
    [engine_socket] = edge.sockets
    websocket = engine_socket._websocket
    client.disappear()
    await until(lambda: not edge.sockets)
    assert engine_socket._timer.cancelled()
    assert isinstance(websocket, Websocket)
    assert websocket._close_timer is None or websocket._close_timer.cancelled()


@pytest.mark.gen_test
async def test_fragments_are_put_together(edge: Edge) -> None:
    client = await edge.connected()
    half = len(JOIN_WITH_ACK) // 2
    await client.write(frame(JOIN_WITH_ACK[:half], final=False) + frame("are you there", PING))
    await client.write(frame(JOIN_WITH_ACK[half:], 0x0))
    assert await client.receive() == b"are you there"
    assert await client.receive() == ACK


@pytest.mark.gen_test
async def test_fragments_without_end_leave_no_more_than_their_message(edge: Edge) -> None:
    client = await edge.connected()
    begun, rest = JOIN_WITH_ACK[:9], JOIN_WITH_ACK[9:]
    await client.write(frame(begun, final=False) + frame("", 0x0, final=False) * 20_000 + frame("so far", PING))
    assert await client.receive() == b"so far"
    websocket = edge.sockets[0]._websocket
    assert isinstance(websocket, Websocket)
    assert websocket._fragments == begun.encode()
    await client.write(frame(rest, 0x0))
    assert await client.receive() == ACK


@pytest.mark.gen_test
async def test_a_flood_of_tiny_frames_does_not_keep_others_waiting(edge: Edge) -> None:
    client = await edge.connected()
    flood = asyncio.create_task(client.write(frame("43[]") * 50_000))
    await edge.serves_others()
    await flood
    await client.send(JOIN_WITH_ACK)
    assert await client.receive() == ACK


@pytest.mark.gen_test
async def test_a_client_that_floods_and_never_reads_is_dropped(edge: Edge) -> None:
    """What it leaves unread is bounded: here by the system's buffers, which are small, and by the server's."""
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit it
    client = await edge.connected(receive_buffer=4096)
    joins = edge.application.joins
    ack_id = "1" * 100
    while edge.sockets:
        expected = len(joins) + 8
        await client.send(*[f'42{ack_id}["join_lesson"]'] * 8)
        await until(lambda expected=expected: len(joins) == expected or not edge.sockets)  # type: ignore[misc]
    assert edge.log == ["client dropped: slow reader"]
    assert len(joins) * len(ack_id) < MAX_UNREAD_BYTES + 32 * 1024
    await edge.serves_others()


@pytest.mark.gen_test
async def test_a_client_that_reads_late_gets_everything_in_order(edge: Edge) -> None:
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected(receive_buffer=4096)
    [engine_socket] = edge.sockets
    messages = [f"{number:1000}" for number in range(40)]
    sent = 0
    while len(engine_socket._outbox) < 3:
        engine_socket.send(messages[sent])
        sent += 1
    assert [await client.receive() for _ in range(sent)] == ["4" + message for message in messages[:sent]]
    await client.send(JOIN_WITH_ACK)
    assert await client.receive() == ACK


async def slow_reader(edge: Edge) -> Client:
    """A client that has something left to read which the system does not take."""
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected(receive_buffer=4096)
    [engine_socket] = edge.sockets
    while len(engine_socket._outbox) < 10:
        engine_socket.send("x" * 1_000)
        if len(engine_socket._outbox) == 10:
            await asyncio.sleep(0.05)  # the system takes a little more after a while
    return client


@pytest.mark.gen_test
async def test_pings_of_a_client_that_reads_nothing_cost_nothing(edge: Edge) -> None:
    """RFC 6455, 5.5.3: one pong is enough for several pings."""
    client = await slow_reader(edge)
    [engine_socket] = edge.sockets
    await client.write(frame("x" * 100, PING) * 1_000 + frame(JOIN))
    await until(lambda: edge.application.joins)
    assert isinstance(engine_socket._websocket, Websocket)
    assert engine_socket._websocket._underlying.get_write_buffer_size() <= len(frame("4" + "x" * 1_000))


@pytest.mark.gen_test
async def test_a_slow_reader_gets_what_it_has_left_and_then_the_end(edge: Edge) -> None:
    client = await slow_reader(edge)
    sent = len(edge.sockets[0]._outbox)
    await edge.sio.eio.disconnect()
    messages = await client.messages()
    assert len(messages) > sent
    assert set(messages) == {"4" + "x" * 1_000}
    assert edge.application.reasons == ["server disconnect"]
    await until(lambda: not edge.sio.eio.websockets)


@pytest.mark.gen_test
async def test_a_slow_reader_that_never_reads_is_closed_at_the_end(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.05)
    await slow_reader(edge)
    await edge.sio.eio.disconnect()
    await until(lambda: not edge.sio.eio.websockets)


@pytest.mark.parametrize(
    "fault",
    [frame("4", 0xF), frame("", length=2**40), b"\xff" + frame("4")[1:], frame(b"\xff", TEXT)],
    ids=["opcode", "announced too large", "reserved bits", "invalid UTF-8"],
)
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.gen_test
async def test_after_a_fault_a_client_that_reads_nothing_is_closed_in_time(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, fault: bytes, goes_on: bool
) -> None:
    """Or as soon as it has sent as much as a message may have: what it sends is read no more, and kept."""
    if not goes_on:
        monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.05)
    client = await slow_reader(edge)
    client.write_soon(fault + bytes(200_000 if goes_on else 0))
    await until(lambda: not edge.sockets and not edge.sio.eio.websockets)


@pytest.mark.gen_test
async def test_a_client_that_reads_nothing_and_ends_its_sending_is_closed_in_time(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.05)
    client = await slow_reader(edge)
    client._writer.write_eof()
    await until(lambda: not edge.sockets and not edge.sio.eio.websockets)


@pytest.mark.gen_test
async def test_a_cancelled_upgrade_leaves_nothing(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline would hold it, and a client may begin as many as it likes."""
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT", 10 * LONG)
    sid = (await edge.connected_polling()).sid
    websocket = await edge.websocket(sid)
    await websocket.write(frame("x" * 16_000, final=False))
    left = weakref.ref(edge.sockets[0]._upgrade.websocket)
    gc.collect()
    gc.disable()
    try:
        websocket.disappear()
        await until(lambda: left() is None)
    finally:
        gc.enable()


@pytest.mark.gen_test
async def test_an_upgrade_that_is_complete_has_no_deadline(edge: Edge) -> None:
    websocket = await edge.probing((await edge.connected_polling()).sid)
    upgrade = edge.sockets[0]._upgrade
    await websocket.send("5", JOIN_WITH_ACK)
    assert await websocket.receive() == ACK
    assert upgrade._timer.cancelled()


@pytest.mark.gen_test
async def test_a_refused_handshake_leaves_nothing_to_the_garbage_collector(edge: Edge) -> None:
    await edge.serves_others()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        connection = await edge.connection()
        assert (await connection.request("GET", WEBSOCKET + "&sid=x", **UPGRADE_HEADERS)).status == 400
        await connection.is_ended()
        await until(lambda: not edge.sio.eio.websockets)
        gc.collect()
        left = {type(item).__name__ for item in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not left & {
        "Websocket",
        "WebsocketProtocol",
        "WSTransport",
        "WSUpgradeRequest",
        "CIMultiDict",
        "RequestRefused",
    }


@pytest.mark.parametrize("ended_by", ["client", "server"])
@pytest.mark.gen_test
async def test_an_ended_connection_leaves_nothing_to_the_garbage_collector(edge: Edge, ended_by: str) -> None:
    """It took a tenth of the time of a class start."""
    await edge.serves_others()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        client = await edge.connected()
        await client.send(JOIN_WITH_ACK)
        assert await client.receive() == ACK
        if ended_by == "server":
            await edge.sio.eio.disconnect()
            await client.messages()
        await client.leave()
        await until(lambda: not edge.sockets and not edge.sio.eio.websockets)
        gc.collect()
        left = {type(item).__name__ for item in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not left & {
        "EngineSocket",
        "Websocket",
        "WebsocketProtocol",
        "WSTransport",
        "PollingHandler",
        "IOStream",
        "Task",
    }


@pytest.mark.parametrize(
    ("path", "status"),
    [("/socket.io/", 101), ("/socket.io", 101), ("/socket.io/x", 404), ("/socket.iox", 404)],
)
@pytest.mark.gen_test
async def test_websockets_have_one_path(edge: Edge, path: str, status: int) -> None:
    """With or without a slash at its end."""
    connection = await edge.connection()
    await connection.write(handshake(f"{path}?{WEBSOCKET}"))
    assert (await connection.response()).status == status


URL = f"/socket.io/?{WEBSOCKET}&x="


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        pytest.param(
            handshake(URL.ljust(MAX_URL_SIZE, "x")),
            handshake(URL.ljust(MAX_URL_SIZE + 1, "x")),
            id="URL",
        ),
        pytest.param(
            handshake(URL + "&x=" * (MAX_PARAMETERS - URL.count("="))),
            handshake(URL + "&x=" * (MAX_PARAMETERS - URL.count("=") + 1)),
            id="parameters",
        ),
        pytest.param(
            handshake(URL, *["a: x"] * (MAX_HEADER_LINES - len(UPGRADE_HEADERS))),
            handshake(URL, *["a: x"] * (MAX_HEADER_LINES - len(UPGRADE_HEADERS) + 1)),
            id="header lines",
        ),
    ],
)
@pytest.mark.gen_test
async def test_the_head_of_a_websocket_is_bounded_as_any_other(edge: Edge, allowed: bytes, refused: bytes) -> None:
    for head, status in ((allowed, 101), (refused, 400)):
        connection = await edge.connection()
        await connection.write(head)
        assert (await connection.response()).status == status
