"""engine.py as clients see it: both transports, the upgrade, and whatever bytes arrive."""

import asyncio
import base64
import gc
import socket
import weakref

import orjson
import pytest
from edge import (
    ACK,
    BINARY_JOIN,
    CLOSE,
    JOIN,
    JOIN_WITH_ACK,
    LONG,
    PING,
    POLLING,
    REFUSAL,
    REFUSED_HANDSHAKE,
    SECRET,
    TEXT,
    UPGRADE_HEADERS,
    Client,
    Edge,
    edge_fixture,  # noqa: F401
    frame,
    impatient_fixture,  # noqa: F401
    until,
    websocket_query,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tornado.ioloop import IOLoop

from lesson_server.protocol import engine_socket
from lesson_server.protocol.engine import ID_BYTES, IDS_AT_ONCE, Engine
from lesson_server.protocol.engine_socket import (
    MAX_MESSAGE_SIZE,
    MAX_PACKETS_IN_POST,
    MAX_UNREAD_BYTES,
    MAX_UNREAD_PACKETS,
)
from lesson_server.protocol.http_server import MAX_HEADER_LINES, MAX_PARAMETERS, MAX_URL_SIZE
from lesson_server.protocol.places import Places

impatient = pytest.mark.usefixtures("impatient")
FOREIGN = "https://elsewhere.example"
WEBSOCKET = websocket_query()


def join_of_size(size: int) -> str:
    return '42["join_lesson"' + " " * (size - len(JOIN)) + "]"


# Polling


@pytest.mark.gen_test
async def test_polling_handshake_join_and_acknowledgement(edge: Edge) -> None:
    response = await edge.request("GET", POLLING)
    opening = orjson.loads(response.body[1:])
    assert response.headers["content-type"] == "text/plain; charset=UTF-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.body[:1] == b"0"
    assert opening.pop("sid") in edge.sio.eio.sockets
    assert opening == {"upgrades": ["websocket"], "pingInterval": 25_000, "pingTimeout": 20_000, "maxPayload": 16_384}

    client = await edge.connected_polling()
    assert (await client.post(JOIN_WITH_ACK)).body == b"ok"
    assert await client.poll() == [ACK]


@pytest.mark.gen_test
async def test_a_poll_waits_for_what_comes_later(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        await client.post(JOIN_WITH_ACK, JOIN_WITH_ACK)
        assert (await poll.response()).body.startswith(ACK.encode())


@pytest.mark.gen_test
async def test_a_polling_only_server_offers_no_upgrade_and_takes_none(edge: Edge) -> None:
    edge.sio.eio.transports = ["polling"]
    client = await edge.connected_polling()
    assert orjson.loads((await edge.request("GET", POLLING)).body[1:])["upgrades"] == []
    assert (await edge.request("GET", websocket_query(client.sid), **UPGRADE_HEADERS)).status == 400


@pytest.mark.gen_test
async def test_jsonp_is_not_spoken(edge: Edge) -> None:
    """A script of another origin needs no Origin header: it must never be given a script."""
    response = await edge.request("GET", POLLING + "&j=0")
    assert response.headers["content-type"].startswith("text/plain")
    assert response.body[:2] == b"0{"


@pytest.mark.gen_test
async def test_two_polls_at_once_end_the_session(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        assert (await client.get()).status == 400
        assert (await poll.response()).body == b"1"
    assert edge.application.reasons == ["transport error"]
    assert edge.log == ["client dropped: two polls at once"]


@pytest.mark.gen_test
async def test_a_client_that_disappears_from_its_poll_is_disconnected(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        poll.disappear()
        await until(lambda: edge.application.reasons == ["transport close"])


@pytest.mark.gen_test
async def test_a_socket_whose_poll_is_answered_carries_no_session_any_more(edge: Edge) -> None:
    """Though its client does not read the answer: it may give way to a newcomer."""
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected_polling()
    await until(lambda: len(edge.server.places) == 0)
    connection = await edge.connection(receive_buffer=4096)
    await connection.send_request("GET", client.query)
    await until(lambda: edge.server.places.kept)
    await edge.sio.eio.send(client.sid, "x" * 30_000)
    await until(lambda: not edge.sockets[0]._outbox)
    await until(lambda: not edge.server.places.kept)
    assert len(edge.server.places) == 1


@pytest.mark.gen_test
async def test_the_end_of_a_session_reaches_a_poll_that_waits(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        await edge.sio.eio.disconnect(client.sid)
        assert (await poll.response()).body == b"1"
    assert (await client.get()).status == 400


@pytest.mark.gen_test
async def test_the_end_of_a_session_reaches_the_next_poll(edge: Edge) -> None:
    client = await edge.connected_polling()
    await client.post(JOIN_WITH_ACK)
    await until(lambda: edge.sockets[0]._outbox)
    await edge.sio.eio.disconnect(client.sid)
    assert await client.poll() == [ACK]
    assert await client.poll() == ["1"]
    assert (await client.get()).status == 400


@impatient
@pytest.mark.gen_test
async def test_the_last_words_to_a_client_that_never_asks_are_forgotten(edge: Edge) -> None:
    client = await edge.connected_polling()
    await edge.sio.eio.disconnect(client.sid)
    await until(lambda: not edge.sio.eio._final_payloads)


@pytest.mark.gen_test
async def test_a_session_that_is_ending_is_unknown_to_requests(edge: Edge) -> None:
    """Nobody would ever answer a poll that began to wait while the disconnect handler ran."""
    client = await edge.connected_polling()
    may_end = asyncio.Event()

    async def slow_disconnect(sid: str, reason: str) -> None:
        await may_end.wait()
        await edge.application.disconnect(sid, reason)

    edge.sio.on("disconnect", slow_disconnect)
    leaving = asyncio.create_task(client.post("1"))
    await until(lambda: edge.sockets[0].closed)
    assert await client.poll() == ["1"]
    assert (await client.get()).status == 400
    assert (await client.post(JOIN)).status == 400
    may_end.set()
    assert (await leaving).body == b"ok"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty body"),
        pytest.param(b"\x1e", id="empty packets"),
        pytest.param(b"4" + b"\xff", id="invalid UTF-8"),
        pytest.param(b"bAAAA", id="binary message"),
        pytest.param(BINARY_JOIN.encode(), id="binary event"),
        pytest.param(b"2", id="ping of a client"),
        pytest.param(b"2probe", id="probe"),
        pytest.param(b"5", id="upgrade"),
        pytest.param(b"9" + SECRET.encode(), id="unknown packet"),
        pytest.param(b"\x1e".join([b"3"] * (MAX_PACKETS_IN_POST + 1)), id="too many packets"),
        pytest.param(b"4" + SECRET.encode(), id="malformed message"),
    ],
)
@pytest.mark.gen_test
async def test_a_body_that_is_no_list_of_packets_ends_the_session(edge: Edge, body: bytes) -> None:
    client = await edge.connected_polling()
    connection = await edge.connection()
    response = await connection.request("POST", client.query, body, **{"Content-Length": str(len(body))})
    assert response.status == 400
    assert await connection.is_ended() == b""
    assert edge.application.reasons == ["transport error"]
    assert len(edge.log) == 1
    await edge.serves_others()


@pytest.mark.gen_test
async def test_a_body_that_is_too_large_is_not_read(edge: Edge) -> None:
    client = await edge.connected_polling()
    connection = await edge.connection()
    await connection.send_request("POST", client.query, **{"Content-Length": str(MAX_MESSAGE_SIZE + 1)})
    assert (await connection.is_ended()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.gen_test
async def test_chunks_that_are_too_large_together_are_not_read(edge: Edge) -> None:
    client = await edge.connected_polling()
    connection = await edge.connection()
    await connection.send_request("POST", client.query, **{"Transfer-Encoding": "chunked"})
    await connection.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
    await connection.write((b"1000\r\n" + bytes(0x1000) + b"\r\n") * 4)
    assert (await connection.is_ended()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.gen_test
async def test_binary_messages_travel_as_base64_when_polling(edge: Edge) -> None:
    client = await edge.connected_polling()
    await edge.sio.eio.send(client.sid, b"\x02")
    assert await client.poll() == ["bAg=="]


@pytest.mark.gen_test
async def test_a_polling_client_that_never_polls_is_dropped(edge: Edge) -> None:
    client = await edge.connected_polling()
    for _ in range(MAX_UNREAD_PACKETS + 1):
        await edge.sio.eio.send(client.sid, "")
    await until(lambda: not edge.sockets)
    assert edge.log == ["client dropped: slow reader"]
    assert await client.poll() == ["1"]


@pytest.mark.gen_test
async def test_large_messages_count_more_than_small_ones(edge: Edge) -> None:
    client = await edge.connected_polling()
    await edge.sio.eio.send(client.sid, "x" * MAX_UNREAD_BYTES)
    await until(lambda: not edge.sockets)
    assert edge.application.reasons == ["transport error"]


@pytest.mark.gen_test
async def test_a_defect_is_logged_without_what_the_client_sent(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(*args: object) -> None:
        raise LookupError

    client = await edge.polling()
    monkeypatch.setattr(edge.sio.eio, "find_socket", defective)
    assert (await edge.request("POST", f"{client.query}&access_token={SECRET}", b"40{}")).status == 500
    [record] = caplog.records
    assert record.getMessage() == "POST request failed"
    assert record.exc_info is not None
    assert record.exc_info[0] is LookupError
    assert SECRET not in caplog.text
    caplog.clear()


@pytest.mark.gen_test
async def test_a_defect_at_the_handshake_of_a_websocket_is_logged_and_not_told(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(*args: object) -> None:
        raise LookupError("for the log only")

    monkeypatch.setattr(edge.sio.eio, "find_socket", defective)
    response = await edge.request("GET", f"{websocket_query()}&access_token={SECRET}", **UPGRADE_HEADERS)
    assert (response.status, orjson.loads(response.body)) == (500, {"code": 3, "message": "Internal error"})
    [record] = caplog.records
    assert record.getMessage() == "a handshake failed"
    assert "for the log only" in caplog.text
    assert SECRET not in caplog.text
    caplog.clear()


@pytest.mark.gen_test
async def test_a_defect_at_a_message_of_a_websocket_is_logged_and_ends_it(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(*args: object) -> None:
        raise LookupError

    client = await edge.connected()
    monkeypatch.setattr(edge.sio, "_begin_event", defective)
    await client.send(f'42["join_lesson","{SECRET}"]')
    assert await client.messages() == []
    await until(lambda: not edge.sockets)
    [record] = caplog.records
    assert record.getMessage() == "a message could not be handled"
    assert SECRET not in caplog.text
    caplog.clear()


# Websocket


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
async def test_a_websocket_of_another_version_is_told_which_one_is_spoken(edge: Edge) -> None:
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
async def test_what_comes_with_the_request_is_taken_in_after_it(edge: Edge) -> None:
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
async def test_the_end_of_a_session_reaches_a_websocket(edge: Edge) -> None:
    client = await edge.connected()
    await edge.sio.eio.disconnect()
    assert await client.messages() == []
    assert edge.application.reasons == ["server disconnect"]


@pytest.mark.parametrize("packet", ["1", "41"])
@pytest.mark.gen_test
async def test_a_client_can_end_its_session_itself(edge: Edge, packet: str) -> None:
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
async def test_a_frame_that_is_none_of_a_client_s_ends_the_session(edge: Edge, frames: bytes) -> None:
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
async def test_what_follows_a_fault_is_not_taken_in(edge: Edge) -> None:
    """The frames that arrived with it have been read already; each would be a line in the log."""
    client = await edge.connected()
    await client.send("9", *[JOIN] * 500, *["9"] * 500)
    await client.messages()
    assert edge.application.joins == []
    assert edge.log == ["client dropped: unknown packet"]


@pytest.mark.gen_test
async def test_what_follows_a_text_that_is_no_utf_8_is_not_taken_in(edge: Edge) -> None:
    client = await edge.connected()
    await client.write(frame(b"\xff", TEXT) + frame(JOIN))
    await client.messages()
    await until(lambda: edge.application.reasons)
    assert edge.application.joins == []


@pytest.mark.parametrize("farewell", [frame("41") + frame(b"", CLOSE), frame(b"", CLOSE)], ids=["41", "close"])
@pytest.mark.gen_test
async def test_a_client_that_closes_and_never_reads_is_closed_in_time(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, farewell: bytes
) -> None:
    """What it has left unread would keep its socket open, and no session would count it."""
    monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.2)
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected(receive_buffer=4096)
    session = edge.sockets[0]
    while session._websocket.is_writable:
        session.send("x" * 1_000)
    await client.write(farewell)
    await until(lambda: not edge.sockets and not edge.sio.eio.websockets)


@pytest.mark.gen_test
async def test_a_lost_connection_leaves_no_timer(edge: Edge) -> None:
    client = await edge.connected()
    [session] = edge.sockets
    websocket = session._websocket
    client.disappear()
    await until(lambda: not edge.sockets)
    assert session._timer.cancelled()
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
    assert edge.sockets[0]._websocket._fragments == begun.encode()
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
        answered = len(joins)
        await client.send(*[f'42{ack_id}["join_lesson"]'] * 8)
        await until(lambda answered=answered: len(joins) == answered + 8 or not edge.sockets)
    assert edge.log == ["client dropped: slow reader"]
    assert len(joins) * len(ack_id) < MAX_UNREAD_BYTES + 32 * 1024
    await edge.serves_others()


@pytest.mark.gen_test
async def test_a_client_that_reads_late_gets_everything_in_order(edge: Edge) -> None:
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected(receive_buffer=4096)
    [session] = edge.sockets
    messages = [f"{number:1000}" for number in range(40)]
    sent = 0
    while len(session._outbox) < 3:
        session.send(messages[sent])
        sent += 1
    assert [await client.receive() for _ in range(sent)] == ["4" + message for message in messages[:sent]]
    await client.send(JOIN_WITH_ACK)
    assert await client.receive() == ACK


async def behind(edge: Edge) -> Client:
    """A client that has something left to read which the system does not take."""
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected(receive_buffer=4096)
    [session] = edge.sockets
    while len(session._outbox) < 10:
        session.send("x" * 1_000)
        if len(session._outbox) == 10:
            await asyncio.sleep(0.05)  # the system takes a little more after a while
    return client


@pytest.mark.gen_test
async def test_pings_of_a_client_that_reads_nothing_cost_nothing(edge: Edge) -> None:
    """RFC 6455, 5.5.3: one pong is enough for several pings."""
    client = await behind(edge)
    [session] = edge.sockets
    await client.write(frame("x" * 100, PING) * 1_000 + frame(JOIN))
    await until(lambda: edge.application.joins)
    assert session._websocket._underlying.get_write_buffer_size() <= len(frame("4" + "x" * 1_000))


@pytest.mark.gen_test
async def test_a_slow_reader_gets_what_it_has_left_and_then_the_end(edge: Edge) -> None:
    client = await behind(edge)
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
    await behind(edge)
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
    client = await behind(edge)
    client.write_soon(fault + bytes(200_000 if goes_on else 0))
    await until(lambda: not edge.sockets and not edge.sio.eio.websockets)


@pytest.mark.gen_test
async def test_a_client_that_reads_nothing_and_ends_its_sending_is_closed_in_time(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.05)
    client = await behind(edge)
    client._writer.write_eof()
    await until(lambda: not edge.sockets and not edge.sio.eio.websockets)


@pytest.mark.gen_test
async def test_an_upgrade_that_is_given_up_leaves_nothing(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline would hold it, and a client may begin as many as it likes."""
    monkeypatch.setattr(engine_socket, "HANDSHAKE_TIMEOUT", 10 * LONG)
    sid = (await edge.connected_polling()).sid
    websocket = await edge.websocket(sid)
    await websocket.write(frame("x" * 16_000, final=False))
    left = weakref.ref(edge.sockets[0]._upgrading)
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
    await websocket.send("5", JOIN_WITH_ACK)
    assert await websocket.receive() == ACK
    assert edge.sockets[0]._upgrade_timer.cancelled()


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
    assert not left & {"Websocket", "_Protocol", "WSTransport", "WSUpgradeRequest", "CIMultiDict", "RequestRefused"}


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
    assert not left & {"EngineSocket", "Websocket", "_Protocol", "WSTransport", "EngineHandler", "IOStream", "Task"}


def handshake(url: str, *headers: str) -> bytes:
    """The head of a request for a websocket."""
    lines = [f"GET {url} HTTP/1.1", *(f"{name}: {value}" for name, value in UPGRADE_HEADERS.items()), *headers]
    return "\r\n".join([*lines, "", ""]).encode()


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


# The upgrade


@pytest.mark.gen_test
async def test_an_upgrade_of_a_client_whose_poll_waits(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        websocket = await edge.probing(client.sid)
        assert (await poll.response()).body == b"6"
    await websocket.send("5", JOIN_WITH_ACK)
    assert await websocket.receive() == ACK
    assert edge.sio.eio.transport(client.sid) == "websocket"


@pytest.mark.gen_test
async def test_an_upgrade_brings_what_no_poll_has_taken(edge: Edge) -> None:
    client = await edge.connected_polling()
    websocket = await edge.probing(client.sid)
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == ["6"]
    await websocket.send("5")
    assert await websocket.receive() == ACK
    await websocket.leave()
    await until(lambda: edge.application.reasons == ["transport close"])


@pytest.mark.gen_test
async def test_after_an_upgrade_polling_is_refused(edge: Edge) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    await websocket.send("2probe", "5")
    await until(lambda: edge.sockets[0].upgraded)
    assert (await client.get()).status == 400
    assert (await client.post(JOIN)).status == 400
    assert (await edge.request("GET", websocket_query(client.sid), **UPGRADE_HEADERS)).status == 400
    await websocket.send(JOIN_WITH_ACK)
    assert await websocket.receive() == "3probe"
    assert await websocket.receive() == ACK


@pytest.mark.gen_test
async def test_of_two_upgrades_at_once_the_second_is_refused(edge: Edge) -> None:
    client = await edge.connected_polling()
    first = await edge.websocket(client.sid)
    for packets in ("2probe",), ("5", JOIN_WITH_ACK):
        assert (await edge.request("GET", websocket_query(client.sid), **UPGRADE_HEADERS)).status == 400
        await first.send(*packets)
    assert await first.receive() == "3probe"
    assert await first.receive() == ACK


@pytest.mark.gen_test
async def test_after_an_upgrade_that_failed_another_one_may_be_tried(edge: Edge) -> None:
    client = await edge.connected_polling()
    first = await edge.probing(client.sid)
    await first.leave()
    await until(lambda: not edge.sockets[0].upgrading)
    second = await edge.probing(client.sid)
    await second.send("5", JOIN_WITH_ACK)
    assert await second.receive() == ACK


@pytest.mark.parametrize("message", ["5", JOIN, "3", "2", "", b"2probe"])
@pytest.mark.gen_test
async def test_a_websocket_that_does_not_probe_is_closed_and_polling_goes_on(edge: Edge, message: str | bytes) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    await websocket.send(message)
    assert await websocket.is_ended() == b""
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == [ACK]


@impatient
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.gen_test
async def test_an_upgrade_that_is_not_completed_is_closed_and_polling_goes_on(edge: Edge, begun: bool) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    if begun:
        await websocket.send("2probe")
    assert await websocket.messages() == ["3probe"] * begun
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == [ACK]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.gen_test
async def test_an_upgrade_ends_with_its_session(edge: Edge, begun: bool) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    if begun:
        await websocket.send("2probe")
        assert await websocket.receive() == "3probe"
    await client.post("1")
    assert await websocket.is_ended() == b""


@pytest.mark.gen_test
async def test_nothing_is_upgraded_after_its_session(edge: Edge) -> None:
    """No timer would ever close it."""
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    await client.post("1")
    await websocket.send("2probe", "5")
    assert await websocket.messages() == []


# The handshake, and ping and pong


@impatient
@pytest.mark.parametrize(
    "packets", [(), ("3",) * 9, ("43[]",), (frame("", PING),)], ids=["silence", "pongs", "acknowledgement", "pings"]
)
@pytest.mark.gen_test
async def test_a_websocket_without_a_handshake_is_closed(edge: Edge, packets: tuple[str | bytes, ...]) -> None:
    client = await edge.websocket()
    for packet in packets:
        await (client.write(packet) if isinstance(packet, bytes) else client.send(packet))
    await client.messages()
    assert edge.log == ["client dropped: handshake timeout"]


@impatient
@pytest.mark.gen_test
async def test_a_polling_client_without_a_handshake_is_dropped(edge: Edge) -> None:
    client = await edge.polling()
    assert await client.poll() == ["1"]
    assert edge.log == ["client dropped: handshake timeout"]


@impatient
@pytest.mark.gen_test
async def test_after_the_handshake_no_handshake_is_missed(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 3 * engine_socket.HANDSHAKE_TIMEOUT)
    client = await edge.connected()
    assert await client.receive() == "2"


@pytest.mark.gen_test
async def test_a_client_that_answers_pings_stays(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 0.02)
    client = await edge.connected()
    for _ in range(3):
        assert await client.receive() == "2"
        await client.send("3")


@pytest.mark.parametrize("packets", [(), (JOIN, "43[]")])
@pytest.mark.gen_test
async def test_a_client_that_answers_no_ping_is_dropped(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, packets: tuple[str, ...]
) -> None:
    """Whatever else it says: a pong that was sent before the ping is none."""
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_socket, "PING_TIMEOUT", 0.05)
    client = await edge.connected()
    await client.send("3")
    assert await client.receive() == "2"
    await client.send(*packets)
    assert await client.messages() == []
    assert edge.log == ["client dropped: ping timeout"]


@pytest.mark.gen_test
async def test_a_polling_client_is_pinged_too(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_socket, "PING_TIMEOUT", 0.5)
    client = await edge.connected_polling()
    assert await client.poll() == ["2"]
    await client.post("3")
    assert await client.poll() == ["2"]
    assert await client.poll() == ["1"]
    assert edge.log == ["client dropped: ping timeout"]


@pytest.mark.gen_test
async def test_a_refused_handshake_is_answered_and_its_websocket_closed(edge: Edge) -> None:
    client = await edge.websocket()
    await client.send(REFUSED_HANDSHAKE)
    assert await client.messages() == ['44{"message":"' + REFUSAL + '"}']
    assert not edge.sockets


@pytest.mark.gen_test
async def test_a_refused_handshake_is_answered_and_its_polling_ended(edge: Edge) -> None:
    client = await edge.polling()
    async with client.waiting() as poll:
        await client.post(REFUSED_HANDSHAKE)
        assert (await poll.response()).body == b'44{"message":"' + REFUSAL.encode() + b'"}'
    assert await client.poll() == ["1"]  # by itself: the JavaScript client would take it before the message
    client = await edge.polling()
    await client.post(REFUSED_HANDSHAKE)
    assert await client.poll() == ['44{"message":"' + REFUSAL + '"}']
    assert await client.poll() == ["1"]
    assert (await client.get()).status == 400


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
async def test_a_refused_request_is_answered_and_its_socket_closed(
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


async def are_told_that_the_server_is_busy(edge: Edge) -> None:
    for query, headers in ((POLLING, {}), (WEBSOCKET, UPGRADE_HEADERS)):
        response = await edge.request("GET", query, **headers)
        assert response.status == 503
        assert b"busy" in response.body


@pytest.mark.gen_test
async def test_newcomers_for_whose_session_there_is_no_place_are_told_so(edge: Edge) -> None:
    edge.sio.eio._socket_places = Places(1)
    await edge.connected()
    await are_told_that_the_server_is_busy(edge)


@pytest.mark.gen_test
async def test_a_server_that_is_about_to_stop_begins_no_session_and_goes_on_with_those_that_are_here(
    edge: Edge,
) -> None:
    polling, websocket = await edge.connected_polling(), await edge.connected()
    edge.sio.eio.refuse_new_clients()
    await are_told_that_the_server_is_busy(edge)
    await polling.post(JOIN_WITH_ACK)
    assert await polling.poll() == [ACK]
    await websocket.send(JOIN_WITH_ACK)
    assert await websocket.receive() == ACK


# Origins


@pytest.mark.parametrize(
    ("allowed", "origin", "is_allowed"),
    [
        ((), "http://{host}", True),
        ((), "HTTP://{host}", True),
        ((), "https://{host}", True),  # TLS ends at a proxy
        ((), "http://{host}.elsewhere.example", False),
        ((), "http://elsewhere.example:{port}", False),
        ((), "http://{host}, " + FOREIGN, False),
        ((), "", False),
        ((FOREIGN,), FOREIGN, True),
        ((FOREIGN,), FOREIGN.upper(), True),
        ((FOREIGN,), FOREIGN + ":8443", False),
        ((FOREIGN,), "http://{host}", True),
        (("*",), "https://anywhere.example", True),
    ],
)
@pytest.mark.gen_test
async def test_origins(edge: Edge, allowed: tuple[str, ...], origin: str, is_allowed: bool) -> None:
    edge.sio.eio._allowed_origins = frozenset(allowed)
    origin = origin.format(host=f"127.0.0.1:{edge.port}", port=edge.port)
    polling = await edge.request("GET", POLLING, Origin=origin)
    websocket = await edge.request("GET", WEBSOCKET, Origin=origin, **UPGRADE_HEADERS)
    if is_allowed:
        assert (polling.status, websocket.status) == (200, 101)
        assert polling.headers["access-control-allow-origin"] == origin
        assert polling.headers["access-control-allow-credentials"] == "true"
        assert polling.headers["vary"] == "Origin"
    else:
        assert (polling.status, websocket.status) == (403, 403)
        assert "access-control-allow-origin" not in polling.headers


def test_allowed_origins_reach_the_engine() -> None:
    eio = Engine(socket_places=Places(1), allowed_origins=(FOREIGN,))
    assert eio.allows(FOREIGN, "here.example")
    assert not eio.allows("https://other.example", "here.example")
    assert not eio.allows("null", "")


@pytest.mark.parametrize("origin", ["http://here.example", "http://", "null"])
@pytest.mark.gen_test
async def test_without_a_host_no_origin_is_the_server_s_own(edge: Edge, origin: str) -> None:
    """HTTP/1.0 may leave the host out."""
    connection = await edge.connection()
    await connection.write(f"GET /socket.io/?{POLLING} HTTP/1.0\r\nOrigin: {origin}\r\n\r\n".encode())
    assert (await connection.response()).status == 403


@pytest.mark.parametrize("origin", ["http://here.example", "http://", "null"])
@pytest.mark.gen_test
async def test_without_a_host_no_origin_is_the_server_s_own_for_a_websocket(edge: Edge, origin: str) -> None:
    headers = "".join(f"{name}: {value}\r\n" for name, value in (UPGRADE_HEADERS | {"Origin": origin}).items())
    connection = await edge.connection()
    await connection.write(f"GET /socket.io/?{WEBSOCKET} HTTP/1.1\r\n{headers}\r\n".encode())
    assert (await connection.response()).status == 403


@pytest.mark.gen_test
async def test_without_an_origin_no_cors_headers_are_sent(edge: Edge) -> None:
    response = await edge.request("GET", POLLING)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.gen_test
async def test_a_preflight_is_answered(edge: Edge) -> None:
    edge.sio.eio._allowed_origins = frozenset({FOREIGN})
    response = await edge.request("OPTIONS", POLLING, Origin=FOREIGN, **{"Access-Control-Request-Method": "POST"})
    assert response.status == 204
    assert response.headers["access-control-allow-origin"] == FOREIGN
    assert response.headers["access-control-allow-methods"] == "GET, POST, OPTIONS"
    assert response.headers["access-control-allow-headers"] == "Content-Type"


# Sockets that never become a request

HOST = b"Host: here.example\r\n"
GET = b"GET /socket.io/?access_token=" + SECRET.encode() + b" HTTP/1.1\r\n"
POST = GET.replace(b"GET", b"POST") + HOST


@impatient
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
async def test_a_socket_that_sends_no_request_is_closed(edge: Edge, data: bytes) -> None:
    connection = await edge.connection()
    await connection.write(data)
    answer = await connection.is_ended()
    assert answer[:13] in {b"", b"HTTP/1.1 400 ", b"HTTP/1.1 431 "}
    assert edge.log == []


@impatient
@pytest.mark.parametrize("head", [GET + b"A: ", POST + b"Content-Length: 9999\r\n\r\n"], ids=["header", "body"])
@pytest.mark.gen_test
async def test_a_socket_that_trickles_is_closed(edge: Edge, head: bytes) -> None:
    """Bytes now and then put no deadline off."""
    connection = await edge.connection()
    await connection.write(head)

    async def trickle() -> None:
        while True:
            await connection.write(b"x")
            await asyncio.sleep(engine_socket.HANDSHAKE_TIMEOUT / 10)

    trickling = asyncio.create_task(trickle())
    await connection.is_ended()
    trickling.cancel()


@impatient
@pytest.mark.gen_test
async def test_a_socket_that_is_kept_alive_for_nothing_is_closed(edge: Edge) -> None:
    connection = await edge.connection()
    assert (await connection.request("OPTIONS", POLLING)).status == 204
    assert await connection.is_ended() == b""


# The engine for those that embed it


def test_each_id_is_as_many_random_bytes_of_its_own() -> None:
    engine = Engine(socket_places=Places(1))
    ids = [engine.generate_id() for _ in range(2 * IDS_AT_ONCE)]
    assert {len(base64.urlsafe_b64decode(sid)) for sid in ids} == {ID_BYTES}
    assert len(set(ids)) == len(ids)


def test_what_python_socketio_passes_on_reaches_the_engine() -> None:
    assert Engine(socket_places=Places(1), transports=["polling"]).transports == ["polling"]


@pytest.mark.gen_test
async def test_messages_to_a_session_that_has_gone_are_dropped(edge: Edge) -> None:
    client = await edge.connected_polling()
    session = edge.sockets[0]
    await edge.sio.eio.disconnect(client.sid)
    session.send("late")
    await edge.sio.eio.send(client.sid, "late")
    await edge.sio.eio.disconnect(client.sid)
    assert await client.poll() == ["1"]


@pytest.mark.gen_test
async def test_emitted_events_reach_both_transports(edge: Edge) -> None:
    polling, websocket = await edge.connected_polling(), await edge.connected()
    await edge.sio.emit("news", 1)
    assert await polling.poll() == ['42["news",1]']
    assert await websocket.receive() == '42["news",1]'


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


def test_whatever_arrives_nothing_is_left_and_nothing_is_logged_as_an_error(edge: Edge, io_loop: IOLoop) -> None:
    """The fixture asserts the rest: no session, room, environment or attachment is left of any of them."""

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
