"""websocket.py between a connection and a fake Engine.IO socket: what it does, and what picows does for it.

What clients see of websockets is in the modules beside this one, what websockets cost in test_memory.py.
"""

import asyncio
import socket

import pytest
from fake_engine import FakeEngine, websocket_of
from raw_client import CLOSE, PING, frame
from waiting import LONG, until

from lesson_server.errors import ServiceBusy
from lesson_server.protocol import websocket
from lesson_server.protocol.limits import MAX_MESSAGE_SIZE
from lesson_server.protocol.websocket import Websocket

ACCEPTED = b"HTTP/1.1 101 Switching Protocols\r\n"


async def received_until_the_end(client: socket.socket) -> bytes:
    """What a client gets until its connection ends."""
    received = b""
    while data := await asyncio.get_running_loop().sock_recv(client, 1_000):
        received += data
    return received


@pytest.mark.gen_test
async def test_the_head_of_the_request_is_not_kept() -> None:
    async with websocket_of(b"") as engine:
        await until(lambda: engine.websocket.is_writable)
        transport = engine.websocket._transport
        assert transport is not None
        for message in (transport.request, transport.response):
            assert not hasattr(message, "headers")
        answer = await asyncio.get_running_loop().sock_recv(engine.client, 1_000)
        assert answer.startswith(ACCEPTED)


@pytest.mark.gen_test
async def test_fragments_may_be_as_large_together_as_a_message() -> None:
    async with websocket_of(frame("x" * (MAX_MESSAGE_SIZE - 1), final=False) + frame("x", 0x0)) as engine:
        await until(lambda: sum(engine.engine_socket.received) == 1)


@pytest.mark.gen_test
async def test_a_close_frame_is_answered_and_the_connection_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT", 10 * LONG)
    async with websocket_of(frame(b"", CLOSE)) as engine:
        assert (await received_until_the_end(engine.client)).endswith(b"\r\n\r\n\x88\x02\x03\xe8")


@pytest.mark.gen_test
async def test_a_client_that_sends_the_close_frame_and_reads_nothing_is_closed_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT", 0.05)
    async with websocket_of(b"") as engine:
        await until(lambda: engine.websocket.is_writable)
        while engine.websocket.is_writable:
            engine.websocket.write("x" * 10_000)
        engine.client.sendall(frame(b"", CLOSE))
        await until(lambda: engine.engine_socket.is_lost)


@pytest.mark.gen_test
async def test_a_client_that_reads_nothing_is_sent_no_pong() -> None:
    async with websocket_of(b"") as engine:
        await until(lambda: engine.websocket.is_writable)
        while engine.websocket.is_writable:
            engine.websocket.write("x" * 10_000)
        unread = engine.websocket._underlying.get_write_buffer_size()
        engine.client.sendall(frame("x" * 100, PING) * 50 + frame("4"))
        await until(lambda: engine.engine_socket.received[0])
        assert engine.websocket._underlying.get_write_buffer_size() <= unread


@pytest.mark.gen_test
async def test_messages_of_several_frames_may_follow_each_other_and_none_begins_in_its_middle() -> None:
    message = frame("4", final=False) + frame("", 0x0)
    async with websocket_of(message * 2 + frame("4", 0x0)) as engine:
        await until(lambda: engine.engine_socket.is_lost)
        assert engine.engine_socket.received == [2]


# Its place


@pytest.mark.gen_test
async def test_a_connection_is_evicted_only_when_it_can_be_closed() -> None:
    async with websocket_of(b"") as engine:
        with pytest.raises(ServiceBusy):
            engine.places.take(lambda: None)
        await until(lambda: engine.websocket.is_writable)
        engine.places.take(lambda: None).free()
        assert (await received_until_the_end(engine.client)).startswith(ACCEPTED)


@pytest.mark.gen_test
async def test_the_transport_of_an_engine_socket_is_evicted_only_after_the_close_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT", 10 * LONG)
    async with websocket_of(b"") as engine:
        await until(lambda: engine.websocket.is_writable)
        engine.websocket.keep()
        with pytest.raises(ServiceBusy):
            engine.places.take(lambda: None)
        engine.websocket.disconnect(abort=False)
        engine.places.take(lambda: None).free()
        await until(lambda: engine.engine_socket.is_lost)


@pytest.mark.gen_test
async def test_a_connection_that_the_loop_can_not_serve_is_closed_and_its_place_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(websocket: Websocket) -> None:
        raise OSError("no transport")

    monkeypatch.setattr(websocket, "WebsocketProtocol", broken)
    engine = FakeEngine()
    engine.begin()
    await until(lambda: len(engine.places) == 0)
    assert engine.connection.fileno() == -1
    engine.client.close()
    (record,) = caplog.records
    assert record.exc_info is not None
