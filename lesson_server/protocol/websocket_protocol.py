"""The asyncio protocol of a websocket's connection: that of ``picows``, with limits on what a client sends at once.

Uses the class of picows for a connection of a server (``picows.picows.WSProtocol``), because picows otherwise opens the
listening sockets itself; ``tests/protocol/test_websocket_protocol.py`` fails when that class changes.
"""

import asyncio
import typing

from picows import WSAutoPingStrategy, WSListener, WSUpgradeRequest, WSUpgradeResponseWithListener
from picows.picows import WSProtocol  # type: ignore[attr-defined]

from lesson_server.log import EventLogger
from lesson_server.protocol.limits import MAX_MESSAGE_SIZE

logger = EventLogger(__name__)

# At most this many bytes per read, so that one client can't starve the others. As frames of the smallest size, they are
# 50 kB of objects.
READ_SIZE = 2 * 1024
# Bytes of its read buffer that picows does not fill.
UNUSED = 256


class Websocket(typing.Protocol):
    """A websocket, as its protocol uses it."""

    def opened(self, transport: asyncio.Transport) -> None: ...
    def answer(self, request: WSUpgradeRequest) -> WSListener | WSUpgradeResponseWithListener: ...
    def close_in_time(self) -> None: ...
    def closed(self) -> None: ...


class _TracebackLogger:
    """A logger for picows that logs only the tracebacks of defects.

    All other log lines of picows contain client input, including access tokens.
    """

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 (the name of the standard library)
        return False

    def exception(self, *args: object) -> None:
        logger.exception("websocket_message_failed", "a message could not be handled")

    def debug(self, *args: object) -> None: ...

    log = info = warning = error = debug


class WebsocketProtocol(WSProtocol):  # type: ignore[misc]
    """The protocol of one connection of a server.

    Args:
        websocket: answers the handshake, and is called at each change of the connection.
    """

    __slots__ = ("_after_close", "_buffer_size", "_underlying", "_websocket")

    def __init__(self, websocket: Websocket) -> None:
        super().__init__(
            None,  # host and path: only for clients
            None,
            False,  # is_client_side
            websocket.answer,
            _TracebackLogger(),
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
        self._buffer_size = len(buffer)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes == self._buffer_size:  # more may be readable
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
