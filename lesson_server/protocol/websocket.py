"""A websocket of Engine.IO: the handshake and the frames of ``picows``, and the limits that picows lacks.

This module adds: the size limit of fragmented messages, the checks of UTF-8 and of the reserved bits, and limits for
clients that read nothing or send much at once.

Uses the class of picows for a connection of a server (``picows.picows.WSProtocol``), because picows otherwise opens the
listening sockets itself; ``tests/protocol/test_websocket.py`` fails when that class changes.
"""

import asyncio
import base64
import logging
import socket
import typing
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any

from picows import (
    WSAutoPingStrategy,
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSProtocolError,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
)
from picows.picows import WSProtocol  # type: ignore[attr-defined]

from lesson_server.protocol.engine_packets import RequestRefused
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.limits import MAX_MESSAGE_SIZE
from lesson_server.protocol.places import Place

logger = logging.getLogger(__name__)

# At most this many bytes per read, so that one client can't starve the others. As frames of the smallest size, they are
# 50 kB of objects.
READ_SIZE = 2 * 1024
# Bytes of its read buffer that picows does not fill.
UNUSED = 256
# Bytes of a decoded ``Sec-WebSocket-Key`` (RFC 6455).
KEY_SIZE = 16
# Seconds for a client to answer the server's close frame, or to read the remaining data after its own close frame.
CLOSE_TIMEOUT = 5.0

DATA = (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.CONTINUATION)


class _DefectsOnly:
    """A logger for picows that logs only the tracebacks of defects.

    All other log lines of picows contain client input, including access tokens.
    """

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 (the name of the standard library)
        return False

    def exception(self, *args: object) -> None:
        logger.exception("a message could not be handled")

    def debug(self, *args: object) -> None: ...

    log = info = warning = error = debug


class Engine(typing.Protocol):
    """The Engine.IO server, as a websocket uses it.

    Attributes:
        websockets: the open websockets of the event loop.
    """

    websockets: set["Websocket"]

    def spawn(self, work: Coroutine[Any, Any, None]) -> object: ...

    def accept(self, websocket: "Websocket", request: WSUpgradeRequest) -> EngineSocket:
        """Return the Engine.IO socket that a websocket handshake asks for.

        Raises:
            RequestRefused: the handshake is refused.
        """


class Websocket(WSListener):
    """The transport of an Engine.IO socket, or the websocket of an upgrade from polling.

    Args:
        connection: a connection whose request has arrived and has not been read.
        place: the place of the connection.
        engine: the Engine.IO server that registers the websocket.
    """

    def __init__(self, connection: socket.socket, place: Place, engine: Engine) -> None:
        self._engine = engine
        self._place = place
        place.keep()  # no eviction until `abort` can close the connection
        self._engine_socket: EngineSocket | None = None  # None until the handshake has been accepted
        self._transport: WSTransport | None = None  # None until the handshake has been answered
        self._underlying: asyncio.Transport
        self._is_text = True  # whether the message under way is text
        self._fragments: bytes | None = None  # of the message under way; None if there is none
        self._close_timer: asyncio.TimerHandle | None = None
        self.is_writable = False
        engine.spawn(self._begin(connection))

    async def _begin(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: _Protocol(self), connection)
        except Exception:
            logger.exception("an accepted connection could not be served")
            connection.close()
            self._place.leave()

    def opened(self, transport: asyncio.Transport) -> None:
        """Register the open connection, before the handshake is read."""
        self._underlying = transport
        self._engine.websockets.add(self)
        self._place.hand_over(self.abort)
        self._place.release()

    def answer(self, request: WSUpgradeRequest) -> WSListener | WSUpgradeResponseWithListener:
        """Accept or refuse a handshake.

        Source: RFC 6455, section 4.2; the protocol of Engine.IO.
        """
        try:
            options = ",".join(request.headers.getall("Connection", [])).lower().split(",")
            if "upgrade" not in map(str.strip, options) or not _is_key(request.headers.get("Sec-WebSocket-Key", "")):
                raise RequestRefused(3, "Bad request")
            if request.headers.get("Sec-WebSocket-Version") != "13":
                raise RequestRefused(3, "Unsupported websocket version", 426)
            request.headers["Connection"] = "Upgrade"  # picows allows no other option here; Firefox sends one
            self._engine_socket = self._engine.accept(self, request)
        except RequestRefused as refusal:
            return _refused(refusal)
        except Exception:
            logger.exception("a handshake failed")  # picows would send the error's text to the client
            return _refused(RequestRefused(3, "Internal error", 500))
        return self

    # Called by the Engine.IO socket

    def keep(self) -> None:
        """Keep the place of the connection, because the websocket is now the transport of an Engine.IO socket."""
        self._place.keep()

    def write(self, packet: str | bytes) -> None:
        """Send a packet, unless the close frame has been sent."""
        assert self._transport is not None
        self._transport.send(WSMsgType.TEXT if isinstance(packet, str) else WSMsgType.BINARY, packet)

    def disconnect(self, *, abort: bool) -> None:
        """Close the websocket; with ``abort``, at once, without the data that the client has not read."""
        if abort:
            self.abort()
        else:
            assert self._transport is not None
            self._transport.send_close(WSCloseCode.OK)
            self._place.release()
            self.close_in_time()

    def abort(self) -> None:
        """Close the connection at once."""
        self._underlying.abort()

    def close_in_time(self) -> None:
        """Close the connection after a timeout, unless the client has closed it or has read the remaining data."""
        if self._close_timer is None:
            self._close_timer = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.abort)

    # Called by picows

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport
        del transport.request.headers, transport.response.headers  # up to kilobytes
        self.resume_writing()
        # From now on the Engine.IO socket queues the packets that the kernel does not accept. In the transport, a frame
        # of a few bytes would be an object of half a kB.
        self._underlying.set_write_buffer_limits(0)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.rsv1 or frame.rsv2 or frame.rsv3:
            raise WSProtocolError(WSCloseCode.PROTOCOL_ERROR, "")
        if frame.msg_type in DATA:
            if not transport.is_close_frame_sent:
                self._take_in(frame)
        elif frame.msg_type == WSMsgType.PING:
            if self.is_writable:  # otherwise the client has not read earlier data
                transport.send_pong(frame.get_payload_as_bytes())
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(WSCloseCode.OK)
            transport.disconnect()

    def pause_writing(self) -> None:
        self.is_writable = False

    def resume_writing(self) -> None:
        self.is_writable = True
        if self._engine_socket is not None:
            self._engine_socket.flush()

    def closed(self) -> None:
        """Clean up after the end of the connection."""
        self._engine.websockets.discard(self)
        self._place.leave()
        self._fragments = None
        if self._engine_socket is not None:
            self._engine_socket.lost(self)
        if self._close_timer is not None:
            self._close_timer.cancel()

    def _take_in(self, frame: WSFrame) -> None:
        """Pass a message to the Engine.IO socket when the last frame has arrived."""
        assert self._engine_socket is not None
        data = frame.get_payload_as_bytes()
        if frame.msg_type != WSMsgType.CONTINUATION:
            if self._fragments is not None:
                raise WSProtocolError(WSCloseCode.PROTOCOL_ERROR, "")
            self._is_text = frame.msg_type == WSMsgType.TEXT
        elif self._fragments is None:
            raise WSProtocolError(WSCloseCode.PROTOCOL_ERROR, "")
        else:
            data = self._fragments + data
            if len(data) > MAX_MESSAGE_SIZE:
                raise WSProtocolError(WSCloseCode.MESSAGE_TOO_BIG, "")
        if not frame.fin:
            self._fragments = data
            return
        self._fragments = None
        try:
            self._engine_socket.receive_from(self, data.decode() if self._is_text else data)
        except UnicodeDecodeError:
            raise WSProtocolError(WSCloseCode.INVALID_TEXT, "") from None


def _refused(refusal: RequestRefused) -> WSUpgradeResponseWithListener:
    headers = {"Content-Type": "application/json", "Content-Length": str(len(refusal.body))}
    if refusal.status == HTTPStatus.UPGRADE_REQUIRED:
        headers["Sec-WebSocket-Version"] = "13"
    return WSUpgradeResponseWithListener(
        WSUpgradeResponse.create_error_response(refusal.status, refusal.body, headers), None
    )


def _is_key(key: str) -> bool:
    """Return whether ``key`` is the base64 of 16 bytes.

    picows would check this only after the Engine.IO socket has been opened.
    """
    try:
        return len(base64.b64decode(key, validate=True)) == KEY_SIZE
    except ValueError:
        return False


class _Protocol(WSProtocol):  # type: ignore[misc]
    """The asyncio protocol that picows uses for a connection of a server, with a limit on the bytes per read."""

    __slots__ = ("_after_close", "_room", "_underlying", "_websocket")

    def __init__(self, websocket: Websocket) -> None:
        super().__init__(
            None,  # host and path: only for clients
            None,
            False,  # is_client_side
            websocket.answer,
            _DefectsOnly(),
            True,  # disconnect_on_exception
            None,  # handshake timeout: the request has arrived
            False,  # auto ping: Engine.IO has its own
            1,
            1,
            WSAutoPingStrategy.PING_WHEN_IDLE,
            False,  # auto pong: see on_ws_frame
            MAX_MESSAGE_SIZE,
            None,  # extra headers
            READ_SIZE + UNUSED,
        )
        self._websocket = websocket
        self._after_close = 0  # bytes that have arrived since the close frame was sent
        self._underlying: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._underlying = transport
        self._websocket.opened(transport)
        super().connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer: memoryview = super().get_buffer(sizehint)[:READ_SIZE]
        self._room = len(buffer)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes == self._room:  # more may be readable
            self._underlying.pause_reading()
            asyncio.get_running_loop().call_soon(self._underlying.resume_reading)
        super().buffer_updated(nbytes)
        if self.transport.is_close_frame_sent:
            # After an error, picows buffers further input, and waits without limit for the client to read.
            self._websocket.close_in_time()
            self._after_close += nbytes
            if self._after_close > MAX_MESSAGE_SIZE:
                self._underlying.abort()

    def eof_received(self) -> bool:
        self._websocket.close_in_time()
        return bool(super().eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._websocket.closed()
