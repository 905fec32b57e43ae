"""Clients that can send any bytes: HTTP requests, websocket frames, or anything."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from waiting import LONG

# What a client sends and the log must never show. In URLs it stands as it is.
SECRET = "eyJhbGciOiJIUzI1NiJ9.secret"
# Opcodes of websocket frames.
TEXT, BINARY, CLOSE, PING = 0x1, 0x2, 0x8, 0x9
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


class Clients:
    """Clients of a server on this machine.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._clients: list[Client] = []

    async def connection(self, receive_buffer: int | None = None) -> Client:
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

    async def request(self, method: str, query: str, body: bytes = b"", /, **headers: str) -> Response:
        """One request on a connection of its own."""
        return await (await self.connection()).request(method, query, body, **headers)

    async def websocket(self, sid: str = "", receive_buffer: int | None = None, **headers: str) -> Client:
        """A websocket; the OPEN packet of its own Engine.IO socket has been read."""
        client = await self.connection(receive_buffer)
        response = await client.request("GET", websocket_query(sid), **(UPGRADE_HEADERS | headers))
        assert response.status == 101, response
        if not sid:
            opening = await client.receive()
            assert isinstance(opening, str)
            assert opening[:1] == "0"
        return client

    async def probing(self, sid: str) -> Client:
        """A websocket that has probed, so that it may complete the upgrade of a polling client."""
        client = await self.websocket(sid)
        await client.send("2probe")
        assert await client.receive() == "3probe"
        return client

    async def connected(self, auth: str = "{}", **options: Any) -> Client:
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
