"""A websocket of Engine.IO: the frames of ``picows``, and the limits on them that picows lacks.

This module adds: the size limit of fragmented messages, the checks of UTF-8 and of the reserved bits, and limits for
clients that read nothing. websocket_protocol.py limits what a client sends at once.
"""

import asyncio
import socket
import typing
from collections.abc import Coroutine
from typing import Any

from picows import (
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSProtocolError,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponseWithListener,
)

from lesson_server.log import EventLogger
from lesson_server.protocol.engine_packets import RequestRefused
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.limits import MAX_MESSAGE_SIZE
from lesson_server.protocol.places import Place
from lesson_server.protocol.websocket_handshake import check_request, refuse
from lesson_server.protocol.websocket_protocol import WebsocketProtocol

logger = EventLogger(__name__)

# Seconds for a client to answer the server's close frame, or to read the remaining data after its own close frame.
CLOSE_TIMEOUT = 5.0

DATA = (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.CONTINUATION)


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
            await asyncio.get_running_loop().connect_accepted_socket(lambda: WebsocketProtocol(self), connection)
        except Exception:
            logger.exception("connection_failed", "an accepted connection could not be served")
            connection.close()
            self._place.free()

    def opened(self, transport: asyncio.Transport) -> None:
        """Register the open connection, before the handshake is read."""
        self._underlying = transport
        self._engine.websockets.add(self)
        self._place.transfer(self.abort)
        self._place.allow_eviction()

    def answer(self, request: WSUpgradeRequest) -> WSListener | WSUpgradeResponseWithListener:
        """Accept or refuse a handshake."""
        try:
            check_request(request)
            self._engine_socket = self._engine.accept(self, request)
        except RequestRefused as refusal:
            return refuse(refusal)
        except Exception:
            # picows would send the error's text to the client.
            logger.exception("websocket_handshake_failed", "a handshake failed")
            return refuse(RequestRefused(3, "Internal error", 500))
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
            self._place.allow_eviction()
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
                self._receive(frame)
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
        self._place.free()
        self._fragments = None
        if self._engine_socket is not None:
            self._engine_socket.lost(self)
        if self._close_timer is not None:
            self._close_timer.cancel()

    def _receive(self, frame: WSFrame) -> None:
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
