"""websocket.py as clients see it: messages, fragments, and frames that no client may send."""

import asyncio

import pytest
from edge import (
    ACK,
    JOIN,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
)
from raw_client import CLOSE, PING, SECRET, TEXT, UPGRADE_HEADERS, frame, websocket_query
from waiting import until

from lesson_server.protocol.limits import MAX_MESSAGE_SIZE
from lesson_server.protocol.websocket import Websocket


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


# Frames that no client may send


def join_of_size(size: int) -> str:
    return '42["join_lesson"' + " " * (size - len(JOIN)) + "]"


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


# Fragments, and many frames


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
