"""The edge of the server without what lies behind it: a fake application, and clients that can send any bytes."""

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import orjson
import pytest
from socketio.exceptions import ConnectionRefusedError  # noqa: A004 (the library's, not the builtin)
from tornado.ioloop import IOLoop
from tornado.testing import bind_unused_port

from lesson_server.embedded.stores import EmbeddedStores
from lesson_server.http.pages import Readiness, routes
from lesson_server.protocol.engine_packets import SEPARATOR
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.limits import HANDSHAKE_TIMEOUT
from lesson_server.protocol.rooms import Rooms
from lesson_server.protocol.server import ProtocolServer
from lesson_server.protocol.transport import SocketServer
from lesson_server.protocol.worker import Worker, make_inboxes
from lesson_server.stores.redis.client import RedisStore

LONG = 20.0  # seconds to wait for what always comes
# What a client sends and the log must never show. In URLs it stands as it is.
SECRET = "eyJhbGciOiJIUzI1NiJ9.secret"
ACCEPTED = {"status": "SUCCESS", "data": {}}
REFUSAL = "the fake application refuses"
REFUSED_HANDSHAKE = '40{"refuse":true,"access_token":"' + SECRET + '"}'
JOIN = '42["join_lesson"]'
JOIN_WITH_ACK = '427["join_lesson"]'
BINARY_JOIN = '451-["join_lesson",{"_placeholder":true,"num":0}]'
ACK = '437[{"status":"SUCCESS","data":{}}]'
TEXT, BINARY, CLOSE, PING = 0x1, 0x2, 0x8, 0x9


async def until(condition: Callable[[], object]) -> None:
    """Waits for what always comes."""
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.001)


# The server


class FakeApplication:
    """Stands where the gateway stands. It answers a join when ``may_answer`` lets it."""

    def __init__(self, sio: SocketServer) -> None:
        self.connected: list[str] = []
        self.ended: list[tuple[str, str]] = []
        self.joins: list[tuple[object, ...]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        sio.on("connect", self.connect)
        sio.on("join_lesson", self.join_lesson)
        sio.on("disconnect", self.disconnect)

    def connect(self, sid: str, environ: dict[str, Any], auth: object) -> None:
        if isinstance(auth, dict) and "refuse" in auth:
            raise ConnectionRefusedError(REFUSAL)
        self.connected.append(sid)

    async def join_lesson(self, sid: str, *data: object) -> dict[str, Any]:
        self.joins.append(data)
        await self.may_answer.wait()
        return ACCEPTED

    async def disconnect(self, sid: str, reason: str) -> None:
        self.ended.append((sid, reason))

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.ended]


# More clients than any test has.
MAX_CONNECTIONS = 1_000
# As many bytes as the real metrics have.
METRICS = b"# metrics\n" * 2_000


class Clients:
    """Clients of a server on this machine.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._clients: list[Client] = []

    async def connection(self, receive_buffer: int | None = None) -> "Client":
        """A TCP connection; the system holds about ``receive_buffer`` bytes that the client has not read."""
        raw = socket.socket()
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=2**20 if receive_buffer is None else 1024)
        client = Client(f"127.0.0.1:{self.port}", reader, writer)
        self._clients.append(client)
        return client

    async def request(self, method: str, query: str, body: bytes = b"", /, **headers: str) -> "Response":
        """One request on a connection of its own."""
        return await (await self.connection()).request(method, query, body, **headers)

    async def websocket(self, sid: str = "", receive_buffer: int | None = None, **headers: str) -> "Client":
        """A websocket; the OPEN packet of its own Engine.IO socket has been read."""
        client = await self.connection(receive_buffer)
        response = await client.request("GET", websocket_query(sid), **(UPGRADE_HEADERS | headers))
        assert response.status == 101, response
        if not sid:
            opening = await client.receive()
            assert isinstance(opening, str)
            assert opening[:1] == "0"
        return client

    async def probing(self, sid: str) -> "Client":
        """A websocket that has probed, so that it may complete the upgrade of a polling client."""
        client = await self.websocket(sid)
        await client.send("2probe")
        assert await client.receive() == "3probe"
        return client

    async def connected(self, auth: str = "{}", **options: Any) -> "Client":
        """A websocket whose handshake is complete."""
        client = await self.websocket(**options)
        await client.send("40" + auth)
        answer = await client.receive()
        assert isinstance(answer, str)
        assert answer.startswith('40{"sid":')
        return client

    def disappear(self) -> None:
        """Takes every client away."""
        for client in self._clients:
            client.disappear()


class Edge(Clients):
    """The edge of the server on a port of its own, built as in production and on a real Redis, but for the application;
    with every client that a test has made of it."""

    def __init__(
        self,
        caplog: pytest.LogCaptureFixture,
        redis_url: str,
        max_connections: int = MAX_CONNECTIONS,
        worker: Worker | None = None,
        allowed_origins: tuple[str, ...] = (),
    ) -> None:
        self.socket, port = bind_unused_port()
        super().__init__(port)
        self._caplog = caplog
        self._redis = RedisStore(redis_url, "", 2.0, 2)
        self.rooms = Rooms(self._redis)
        pages = routes(Readiness({}), lambda: METRICS)
        self.server = ProtocolServer(
            self.rooms, pages, max_connections=max_connections, allowed_origins=allowed_origins, worker=worker
        )
        self.sio = self.server.sio
        self.application = FakeApplication(self.sio)
        self.server.start([self.socket])

    @property
    def sockets(self) -> list[EngineSocket]:
        return list(self.sio.eio.sockets.values())

    @property
    def log(self) -> list[str]:
        """The lines that an operator sees: levels are those of ``lesson-server run``."""
        return [record.getMessage() for record in self._caplog.get_records("call")]

    async def polling(self) -> "Polling":
        """A polling client; its OPEN packet has been read."""
        response = await self.request("GET", POLLING)
        assert response.status == 200, response
        return Polling(self, orjson.loads(response.body[1:])["sid"])

    async def connected_polling(self) -> "Polling":
        """A polling client whose handshake is complete."""
        client = await self.polling()
        assert (await client.post("40{}")).body == b"ok"
        [answer] = await client.poll()
        assert answer.startswith('40{"sid":')
        return client

    async def serves_others(self) -> None:
        """Another client comes and joins."""
        client = await self.connected()
        await client.send(JOIN_WITH_ACK)
        assert await client.receive() == ACK
        await client.leave()

    async def stop(self) -> None:
        """Takes every client away."""
        self.application.may_answer.set()
        self.disappear()
        # A polling client that has gone is missed only when it doesn't answer a ping; a websocket at once.
        await until(lambda: not any(engine_socket.upgraded for engine_socket in self.sockets))
        await self.server.stop()
        await until(lambda: not self.sio.eio.sockets and not self.sio.eio._tasks)
        await self.rooms.close()
        await self._redis.close()

    def check(self) -> None:
        """Asserts that nothing of any client is left, and that the log kept to the rules."""
        assert left_of(self.sio) == {}
        assert len(self.server.places) == 0
        assert len(self.sio.eio._socket_places) == 0
        assert sorted(self.application.connected) == sorted(sid for sid, _ in self.application.ended)

        for record in self._caplog.get_records("call") + self._caplog.get_records("teardown"):
            assert record.levelno < logging.WARNING, record.getMessage()
            assert record.exc_info is None
            assert SECRET not in record.getMessage()
        assert len(self.log) <= len(self._clients)


async def close(*edges: Edge) -> None:
    """The end of a test."""
    for edge in edges:
        await edge.stop()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    for edge in edges:
        edge.check()


def left_of(sio: SocketServer) -> dict[str, object]:
    """The tables of the Socket.IO server, its engine and its rooms that still tell of a connection."""
    tables = {
        f"{type(owner).__name__}.{name}": getattr(owner, name)
        for owner, names in (
            (sio, ("environ",)),
            (sio.eio, ("sockets", "websockets", "_tasks")),
            (
                sio.manager,
                ("_sids", "_eio_sids", "_members", "_rooms_of", "_ending", "callbacks"),
            ),
        )
        for name in names
    }
    return {name: table for name, table in tables.items() if table}


@pytest.fixture(name="edge")
def edge_fixture(
    io_loop: IOLoop, caplog: pytest.LogCaptureFixture, running_stores: EmbeddedStores, request: pytest.FixtureRequest
) -> Iterator[Edge]:
    """The edge; a parameter, if there is one, says how many clients it takes."""
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.INFO, "lesson_server")

    async def make() -> Edge:
        return Edge(caplog, running_stores.redis_url, getattr(request, "param", MAX_CONNECTIONS))

    the_edge = io_loop.run_sync(make)
    yield the_edge
    io_loop.run_sync(lambda: close(the_edge), timeout=2 * LONG)


# Whose pages may connect to the workers.
PAGES = "https://pages.example"


@pytest.fixture(name="workers")
def workers_fixture(
    io_loop: IOLoop, caplog: pytest.LogCaptureFixture, running_stores: EmbeddedStores
) -> Iterator[list[Edge]]:
    """The edges of two workers, in one loop, each on a port of its own."""
    caplog.set_level(logging.WARNING)
    inboxes = make_inboxes(2)

    async def make() -> list[Edge]:
        return [
            Edge(caplog, running_stores.redis_url, worker=Worker(number, inboxes), allowed_origins=(PAGES,))
            for number in range(2)
        ]

    edges = io_loop.run_sync(make)
    yield edges
    io_loop.run_sync(lambda: close(*edges), timeout=2 * LONG)
    for end in chain(*inboxes):
        end.close()


@pytest.fixture(name="short_timeouts")
def short_timeouts_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake timeouts are short. Before ``edge``: the HTTP server reads them when it is made."""
    monkeypatch.setattr("lesson_server.protocol.limits.HANDSHAKE_TIMEOUT", HANDSHAKE_TIMEOUT / 100)


# Clients

POLLING = "EIO=4&transport=polling"
UPGRADE_HEADERS = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def websocket_query(sid: str = "") -> str:
    return "EIO=4&transport=websocket" + (f"&sid={sid}" if sid else "")


def frame(data: str | bytes, opcode: int | None = None, *, final: bool = True, length: int | None = None) -> bytes:
    """A websocket frame; ``length`` is what it announces, where that is a lie."""
    if opcode is None:
        opcode = TEXT if isinstance(data, str) else BINARY
    payload = data.encode() if isinstance(data, str) else data
    length = len(payload) if length is None else length
    head = bytes([(0x80 if final else 0) | opcode])
    if length < 126:
        head += bytes([0x80 | length])
    elif length < 2**16:
        head += struct.pack("!BH", 0x80 | 126, length)
    else:
        head += struct.pack("!BQ", 0x80 | 127, length)
    return head + bytes(4) + payload  # a mask of zeros


@dataclass(frozen=True)
class Response:
    """An HTTP response; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One TCP connection, on which a test speaks HTTP, websocket frames, or anything."""

    def __init__(self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.host = host
        self._reader = reader
        self._writer = writer

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        with suppress(ConnectionError):  # the server may have had enough
            await self._writer.drain()

    def write_soon(self, data: bytes) -> None:
        """Sends as much at once as the system takes, and the rest when it takes more."""
        if not self._writer.is_closing():
            self._writer.write(data)

    @property
    def has_sent_all(self) -> bool:
        """Whether the system has taken all that was written, or the server has closed the connection."""
        return self._writer.is_closing() or self._writer.transport.get_write_buffer_size() == 0

    def disappear(self) -> None:
        self._writer.close()

    # HTTP

    async def request(self, method: str, query: str, body: bytes = b"", /, **headers: str) -> Response:
        await self.send_request(method, query, body, **headers)
        return await self.response()

    async def send_request(self, method: str, query: str, body: bytes = b"", /, **headers: str) -> None:
        headers = {"Host": self.host} | ({"Content-Length": str(len(body))} if body else {}) | headers
        lines = [f"{method} /socket.io/?{query} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        await self.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def response(self) -> Response:
        async with asyncio.timeout(LONG):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            start, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        return Response(int(start.split()[1]), headers, body)

    # Websocket

    async def send(self, *messages: str | bytes) -> None:
        await self.write(b"".join(map(frame, messages)))

    async def receive(self) -> str | bytes | None:
        """The next message; None when the server has closed the websocket or the connection."""
        try:
            async with asyncio.timeout(LONG):
                opcode, length = await self._reader.readexactly(2)
                if length == 126:
                    [length] = struct.unpack("!H", await self._reader.readexactly(2))
                payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        if opcode & 0xF == CLOSE:
            await self.write(frame(b"", CLOSE))
            return None
        return payload.decode() if opcode & 0xF == TEXT else payload

    async def messages(self) -> list[str | bytes]:
        """Every message until the server ends the connection."""
        received = [message async for message in self._iterate()]
        await self.is_ended()
        return received

    async def _iterate(self) -> AsyncIterator[str | bytes]:
        while (message := await self.receive()) is not None:
            yield message

    async def is_ended(self) -> bytes:
        """Waits until the server has closed the connection; returns what it sent before."""
        rest = b""
        with suppress(ConnectionError):
            async with asyncio.timeout(LONG):
                while chunk := await self._reader.read(2**16):
                    rest += chunk
        return rest

    async def leave(self) -> None:
        """Ends the connection as a browser does."""
        await self.write(frame(b"", CLOSE))
        await self.is_ended()


class Polling:
    """A client of the polling transport: each request has a connection of its own."""

    def __init__(self, edge: Edge, sid: str) -> None:
        self._edge = edge
        self.sid = sid
        self.query = f"{POLLING}&sid={sid}"

    async def get(self) -> Response:
        return await self._edge.request("GET", self.query)

    async def poll(self) -> list[str]:
        response = await self.get()
        assert response.status == 200, response
        return response.body.decode().split(SEPARATOR)

    async def post(self, *packets: str) -> Response:
        return await self._edge.request("POST", self.query, SEPARATOR.join(packets).encode())

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[Client]:
        """A poll that waits; the connection that it waits on."""
        client = await self._edge.connection()
        engine_socket = self._edge.sio.eio.sockets[self.sid]
        await client.send_request("GET", self.query)
        await until(lambda: engine_socket.polling.request is not None)
        yield client
