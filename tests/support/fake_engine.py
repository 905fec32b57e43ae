"""A fake Engine.IO server of one websocket, and the client's end of its connection."""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import picows
from raw_client import UPGRADE_HEADERS
from waiting import until

from lesson_server.protocol.places import Places
from lesson_server.protocol.websocket import Websocket

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n%b\r\n" % b"".join(
    f"{name}: {value}\r\n".encode() for name, value in UPGRADE_HEADERS.items()
)


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


class FakeEngine:
    """The Engine.IO server of one websocket, and the client's end of its connection."""

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
async def websocket_of(data: bytes, request: bytes = REQUEST) -> AsyncIterator[FakeEngine]:
    """A client that has sent its request and these bytes before the server has looked."""
    engine = FakeEngine()
    engine.client.sendall(request + data)
    engine.begin()
    yield engine
    engine.client.close()
    await until(lambda: engine.engine_socket.is_lost)
    assert not engine.websockets
    assert len(engine.places) == 0
