"""websocket.py between a connection and a fake Engine.IO socket: when it reads, and what picows does for it.

What clients see of websockets is in test_engine.py, what they cost in test_memory.py.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import picows
import pytest
from raw_client import CLOSE, PING, UPGRADE_HEADERS, frame
from waiting import LONG, until

from lesson_server.errors import ServiceBusy
from lesson_server.protocol import websocket
from lesson_server.protocol.limits import MAX_MESSAGE_SIZE
from lesson_server.protocol.places import Places
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.websocket_protocol import READ_SIZE

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n%b\r\n" % b"".join(
    f"{name}: {value}\r\n".encode() for name, value in UPGRADE_HEADERS.items()
)
ACCEPTED = b"HTTP/1.1 101 Switching Protocols\r\n"
SMALLEST = len(frame(""))


class FakeEngineSocket:
    """Counts what it receives in each turn of the loop."""

    def __init__(self) -> None:
        self.received: list[int] = [0]
        self.is_lost = False

    def receive_from(self, websocket: Websocket, packet: str | bytes) -> None:
        self.received[-1] += 1

    def flush(self) -> None:
        """Nothing waits."""

    def lost(self, websocket: Websocket) -> None:
        self.is_lost = True


class World:
    """A websocket of a fake Engine.IO socket, and the client's end of its connection."""

    def __init__(self) -> None:
        self.websockets: set[Websocket] = set()
        self.tasks: list[asyncio.Task[None]] = []
        self.engine_socket = FakeEngineSocket()
        self.places = Places(1)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.client = socket.create_connection(listening.getsockname())
            self.connection, _ = listening.accept()
        self.client.setblocking(False)

    def begin(self) -> None:
        place = self.places.take(lambda: None)
        self.websocket = Websocket(self.connection, place, self)  # type: ignore[arg-type]

    def accept(self, websocket: Websocket, request: picows.WSUpgradeRequest) -> FakeEngineSocket:
        return self.engine_socket

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))


@asynccontextmanager
async def world_of(data: bytes, request: bytes = REQUEST) -> AsyncIterator[World]:
    """A client that has sent its request and these bytes before the server has looked."""
    world = World()
    world.client.sendall(request + data)
    world.begin()
    yield world
    world.client.close()
    await until(lambda: world.engine_socket.is_lost)
    assert not world.websockets
    assert len(world.places) == 0


@pytest.mark.gen_test
async def test_a_client_that_sends_much_is_read_in_several_turns_of_the_loop() -> None:
    count = 20 * READ_SIZE // SMALLEST
    async with world_of(frame("") * count) as world:
        while sum(world.engine_socket.received) < count:
            await asyncio.sleep(0)
            world.engine_socket.received.append(0)
    assert max(world.engine_socket.received) <= READ_SIZE // SMALLEST + 1


@pytest.mark.gen_test
async def test_a_large_message_makes_no_later_read_larger() -> None:
    count = 20 * READ_SIZE // SMALLEST
    async with world_of(frame("x" * 7 * READ_SIZE) + frame("") * count) as world:
        while sum(world.engine_socket.received) < 1 + count:
            await asyncio.sleep(0)
            world.engine_socket.received.append(0)
    assert max(world.engine_socket.received) <= READ_SIZE // SMALLEST + 1


@pytest.mark.gen_test
async def test_the_head_of_the_request_is_not_kept() -> None:
    async with world_of(b"") as world:
        await until(lambda: world.websocket.is_writable)
        transport = world.websocket._transport
        assert transport is not None
        for message in (transport.request, transport.response):
            assert not hasattr(message, "headers")
        answer = await asyncio.get_running_loop().sock_recv(world.client, 1_000)
        assert answer.startswith(ACCEPTED)


@pytest.mark.gen_test
async def test_fragments_may_be_as_large_together_as_a_message() -> None:
    async with world_of(frame("x" * (MAX_MESSAGE_SIZE - 1), final=False) + frame("x", 0x0)) as world:
        await until(lambda: sum(world.engine_socket.received) == 1)


async def received_until_the_end(client: socket.socket) -> bytes:
    """What a client gets until its connection ends."""
    received = b""
    while data := await asyncio.get_running_loop().sock_recv(client, 1_000):
        received += data
    return received


@pytest.mark.gen_test
async def test_a_close_frame_is_answered_and_the_connection_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT", 10 * LONG)
    async with world_of(frame(b"", CLOSE)) as world:
        assert (await received_until_the_end(world.client)).endswith(b"\r\n\r\n\x88\x02\x03\xe8")


@pytest.mark.gen_test
async def test_a_client_that_sends_the_close_frame_and_reads_nothing_is_closed_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT", 0.05)
    async with world_of(b"") as world:
        await until(lambda: world.websocket.is_writable)
        while world.websocket.is_writable:
            world.websocket.write("x" * 10_000)
        world.client.sendall(frame(b"", CLOSE))
        await until(lambda: world.engine_socket.is_lost)


@pytest.mark.gen_test
async def test_the_options_of_a_connection_may_stand_in_several_lines() -> None:
    two_lines = b"\r\nConnection: keep-alive\r\nConnection: Upgrade\r\n"
    async with world_of(b"", REQUEST.replace(b"\r\nConnection: Upgrade\r\n", two_lines)) as world:
        await until(lambda: world.websocket.is_writable)


@pytest.mark.gen_test
async def test_a_client_that_reads_nothing_is_sent_no_pong() -> None:
    async with world_of(b"") as world:
        await until(lambda: world.websocket.is_writable)
        while world.websocket.is_writable:
            world.websocket.write("x" * 10_000)
        unread = world.websocket._underlying.get_write_buffer_size()
        world.client.sendall(frame("x" * 100, PING) * 50 + frame("4"))
        await until(lambda: world.engine_socket.received[0])
        assert world.websocket._underlying.get_write_buffer_size() <= unread


@pytest.mark.gen_test
async def test_messages_of_several_frames_may_follow_each_other_and_none_begins_in_its_middle() -> None:
    message = frame("4", final=False) + frame("", 0x0)
    async with world_of(message * 2 + frame("4", 0x0)) as world:
        await until(lambda: world.engine_socket.is_lost)
        assert world.engine_socket.received == [2]


# Its place


@pytest.mark.gen_test
async def test_a_connection_is_evicted_only_when_it_can_be_closed() -> None:
    async with world_of(b"") as world:
        with pytest.raises(ServiceBusy):
            world.places.take(lambda: None)
        await until(lambda: world.websocket.is_writable)
        world.places.take(lambda: None).free()
        assert (await received_until_the_end(world.client)).startswith(ACCEPTED)


@pytest.mark.gen_test
async def test_the_transport_of_an_engine_socket_is_evicted_only_after_the_close_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT", 10 * LONG)
    async with world_of(b"") as world:
        await until(lambda: world.websocket.is_writable)
        world.websocket.keep()
        with pytest.raises(ServiceBusy):
            world.places.take(lambda: None)
        world.websocket.disconnect(abort=False)
        world.places.take(lambda: None).free()
        await until(lambda: world.engine_socket.is_lost)


@pytest.mark.gen_test
async def test_a_connection_that_the_loop_can_not_serve_is_closed_and_its_place_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(websocket: Websocket) -> None:
        raise OSError("no transport")

    monkeypatch.setattr(websocket, "WebsocketProtocol", broken)
    world = World()
    world.begin()
    await until(lambda: len(world.places) == 0)
    assert world.connection.fileno() == -1
    world.client.close()
    (record,) = caplog.records
    assert record.exc_info is not None
