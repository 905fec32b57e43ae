"""websocket.py, for clients that read late or never."""

import asyncio
import socket

import pytest
from edge import (
    ACK,
    JOIN,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
)
from raw_client import CLOSE, PING, TEXT, Client, frame
from waiting import until

from lesson_server.protocol.limits import MAX_UNREAD_BYTES
from lesson_server.protocol.websocket import Websocket


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


# Clients for which packets are queued


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
