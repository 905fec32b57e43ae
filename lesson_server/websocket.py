"""A websocket on a transport of asyncio, with the frames of the ``websockets`` library.

Tornado reads the request, and then the socket leaves it: its own websockets take a future for each part of a frame, and
a turn of the loop for each future.
"""

import asyncio
import logging
import typing
from collections.abc import Awaitable, Coroutine
from typing import Any

from tornado.iostream import IOStream
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import OPEN, SEND_EOF, Protocol, Side

from lesson_server import sessions
from lesson_server.admission import Place
from lesson_server.sessions import TEXT_FRAME, ProtocolError, Session

logger = logging.getLogger(__name__)

# Bytes that are taken in at once: who sends more goes on when others have had their turn. Of the smallest frames, these
# are 50 kB of objects.
READ_SIZE = 2 * 1024
# Seconds for a client to answer the close frame.
CLOSE_TIMEOUT = 5.0

CONTROL = (Opcode.PING, Opcode.PONG, Opcode.CLOSE)

# What the library tells of frames at DEBUG, access tokens among it, goes nowhere.
_silent = logging.getLogger(f"{__name__}.frames")
_silent.setLevel(logging.WARNING)


class Keeper(typing.Protocol):
    """Where the websockets of one loop are kept.

    Attributes:
        read_buffer: where each reads :data:`READ_SIZE` bytes to. Nothing stays there, so they can share it.
        websockets: those that are open.
    """

    read_buffer: memoryview
    websockets: set["Websocket"]

    def spawn(self, work: Coroutine[Any, Any, None]) -> object: ...


class Websocket(asyncio.BufferedProtocol):
    """What carries a session, or wants to take it over from polling.

    Args:
        session: that session.
        keeper: where the websocket is kept.
        greeting: the bytes that go before the first frame.
        place: that of the socket.
    """

    __slots__ = (
        "_close_timer",
        "_fragments",
        "_frames",
        "_keeper",
        "_kind",
        "_place",
        "_protocol",
        "_session",
        "_transport",
        "_unsent",
    )

    def __init__(self, session: Session, keeper: Keeper, greeting: bytes, place: Place) -> None:
        self._session = session
        self._keeper = keeper
        self._unsent = bytearray(greeting)  # what the transport does not take yet
        self._place = place
        place.hand_over(self.abort)
        self._protocol = Protocol(Side.SERVER, max_size=sessions.MAX_MESSAGE_SIZE, logger=_silent)
        self._transport: asyncio.Transport | None = None
        self._frames: list[Frame] = []  # have arrived, and wait for the end of what an earlier one has begun
        self._fragments = b""
        self._kind = Opcode.TEXT  # of the message that the fragments are of
        self._close_timer: asyncio.TimerHandle | None = None

    async def take_over(self, stream: IOStream) -> None:
        """Takes the socket of a stream that Tornado has let go, with what it has read already."""
        if stream.closed():
            self._session.lost(self)
            return
        stream.io_loop.remove_handler(stream.fileno())
        self._take_in(bytes(stream._read_buffer))
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self, stream.socket)

    # What a session asks of its carrier

    def carry(self) -> None:
        """From now on the session is carried: the socket gives way to no other."""
        self._place.keep()

    def write_frame(self, opcode: int, data: bytes) -> None:
        """Sends a message, unless the websocket is closing."""
        if self._protocol.state is OPEN:
            (self._protocol.send_text if opcode == TEXT_FRAME else self._protocol.send_binary)(data)
            self._send()

    def disconnect(self, *, abort: bool) -> None:
        """Closes the websocket; with ``abort``, without waiting for what the client has not read."""
        if abort:
            self.abort()
        elif self._protocol.state is OPEN:
            self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
            self._send()
            self._close_in_time()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._frames.clear()
        if self._transport is not None:
            self._transport.abort()
        else:
            self._protocol.fail(CloseCode.GOING_AWAY)  # goes out, and ends it, as soon as there is a transport

    def _close_in_time(self) -> None:
        """The client has a few seconds to read what is left, and to answer the close frame."""
        if self._close_timer is None:
            self._close_timer = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.abort)

    # What asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._keeper.websockets.add(self)
        # What the system does not take waits here, where a frame costs its bytes. Each write that waits in the
        # transport is an object of half a kB, and each ping of a client asks for a frame of two bytes.
        transport.set_write_buffer_limits(0)
        self._send()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._keeper.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert self._transport is not None
        if nbytes == READ_SIZE:  # there may be more
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._resume_reading)
        self._take_in(bytes(self._keeper.read_buffer[:nbytes]))

    def resume_writing(self) -> None:
        """The system has taken what the transport had."""
        assert self._transport is not None
        if self._unsent:
            unsent, self._unsent = self._unsent, bytearray()
            self._transport.write(unsent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._frames.clear()
        self._keeper.websockets.discard(self)
        self._place.leave()
        self._protocol.parser.close()  # it holds the protocol, which would wait for the garbage collector
        self._session.lost(self)
        if self._close_timer is not None:
            self._close_timer.cancel()

    # Frames

    def _send(self) -> None:
        """Sends what the protocol has to send, or drops a client that has left too much unread."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        chunks = self._protocol.data_to_send()
        self._unsent += b"".join(chunks)
        ends = SEND_EOF in chunks
        if ends or not transport.get_write_buffer_size():
            self.resume_writing()
        if len(self._unsent) + transport.get_write_buffer_size() > sessions.MAX_UNREAD_BYTES:
            self._session.drop("slow reader")
            self.abort()  # also when the session has ended before
        elif ends:
            transport.close()
            self._close_in_time()

    def _take_in(self, data: bytes) -> None:
        waiting = bool(self._frames)
        self._protocol.receive_data(data)
        self._frames += [frame for frame in self._protocol.events_received() if isinstance(frame, Frame)]
        self._send()  # the answers to pings, and to a close frame
        if not waiting:
            self._handle_frames()
        elif self._transport is not None:
            self._transport.pause_reading()

    def _handle_frames(self) -> None:
        while self._frames:
            handled = self._handle(self._frames[0])
            if handled is not None:
                self._keeper.spawn(self._go_on_after(handled))
                return
            del self._frames[:1]

    async def _go_on_after(self, handled: Awaitable[None]) -> None:
        try:
            await handled
        except ProtocolError as error:
            self._session.drop(str(error))
        except Exception:
            logger.exception("a message could not be handled")
            self.abort()
        del self._frames[:1]
        self._handle_frames()
        self._resume_reading()

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._frames:
            self._transport.resume_reading()

    def _handle(self, frame: Frame) -> Awaitable[None] | None:
        """Hands a message on when its last frame is there; returns what to wait for before the next one."""
        if frame.opcode in CONTROL:
            return None
        data = bytes(frame.data)
        if frame.opcode is Opcode.CONT:
            data = self._fragments + data
        else:
            self._kind = frame.opcode
        if not frame.fin:
            self._fragments = data  # no longer than a message may be: the library counts it
            return None
        self._fragments = b""
        message: str | bytes = data
        if self._kind is Opcode.TEXT:
            try:
                message = data.decode()
            except UnicodeDecodeError:
                self._protocol.fail(CloseCode.INVALID_DATA)
                self._send()
                self._frames.clear()
                return None
        return self._session.receive_from(self, message)
