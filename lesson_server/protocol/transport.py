"""Socket.IO on python-socketio: strict packets, a closed transport after a refused handshake, limits on events.

The library does not validate events: an event ``disconnect`` would run the handler of that name with forged arguments,
a binary event may announce billions of attachments, and each event starts a task, without limit. Here, a packet that a
client may not send at this point ends its Engine.IO socket. So does a binary event: no handler accepts one, and a
binary event whose attachments never arrive would be held until the connection ends.

JSON becomes 20 to 40 times its size in Python objects. So no parsed data beyond :data:`MAX_EVENT_SIZE` is held while
another task runs.

Uses private parts of python-socketio 5.18; ``tests/protocol/test_transport.py`` names each part and fails when one
changes.
"""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
import socketio
from socketio.packet import ACK, CONNECT, CONNECT_ERROR, DISCONNECT, EVENT, Packet

from lesson_server.errors import NoSuchNamespace
from lesson_server.log import EventLogger
from lesson_server.protocol.engine import Engine
from lesson_server.protocol.engine_packets import ProtocolError
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.places import Places
from lesson_server.protocol.worker import Worker

logger = EventLogger(__name__)

NAMESPACE = "/"

# Events of one client that may be under way. A client waits for the acknowledgement of its join; a client that sends
# more events without waiting is broken or malicious.
MAX_WAITING_EVENTS = 16
# Characters of an event whose data is passed to the handler; `["take_seat",{"seat":10000}]` has 29. A waiting handler
# holds its data: 16 events at once are 60 kB of objects.
MAX_EVENT_SIZE = 64
# Names that belong to the protocol; python-socketio would run its own handlers for them.
RESERVED_EVENTS = frozenset({"connect", "connect_error", "disconnect"})


class TooMuchData:
    """Replaces the data of an event that is larger than any handler accepts."""


class Json:
    """orjson with the signatures of the standard library's json."""

    @staticmethod
    def dumps(value: Any, *, separators: tuple[str, str]) -> str:
        return orjson.dumps(value).decode()

    loads = staticmethod(orjson.loads)


class StrictPacket(Packet):  # type: ignore[misc]
    """A Socket.IO packet that a client may send; decoding any other packet raises an exception of any type."""

    json = Json
    data: Any

    def decode(self, encoded_packet: str) -> int:
        if super().decode(encoded_packet):
            raise ProtocolError("attachments")
        if self.packet_type == EVENT:
            name = self.data[0]
            if not isinstance(self.data, list) or not isinstance(name, str) or name in RESERVED_EVENTS:
                raise ProtocolError("reserved event")
            if len(encoded_packet) > MAX_EVENT_SIZE and len(self.data) > 1:
                self.data = [name, TooMuchData()]
        elif self.packet_type not in (CONNECT, DISCONNECT, ACK):
            raise ProtocolError("not a client's packet")
        return 0


class SocketServer(socketio.AsyncServer):  # type: ignore[misc]
    """The Socket.IO server.

    Args:
        socket_places: see :class:`~lesson_server.protocol.engine.Engine`.
        allowed_origins: likewise.
        worker: likewise.
        observe_drop: likewise.
    """

    eio: Engine

    def __init__(
        self,
        *,
        socket_places: Places,
        allowed_origins: tuple[str, ...] = (),
        worker: Worker | None = None,
        observe_drop: Callable[[str], None] = lambda why: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            serializer=StrictPacket,
            socket_places=socket_places,
            allowed_origins=allowed_origins,
            worker=worker,
            observe_drop=observe_drop,
            logger=_logger_without_packets("socketio.server"),
            engineio_logger=_logger_without_packets("engineio.server"),
            **kwargs,
        )

    def start_rooms(self) -> None:
        """Subscribe to the other nodes now; the library would do so only for the first client."""
        self.manager.initialize()

    def close_connection(self, sid: str) -> None:
        """Send a client a Socket.IO disconnect, and end its Engine.IO socket; do nothing if the client is gone.

        The ``disconnect`` handler runs later, in a task.
        """
        socket = self.eio.sockets.get(self.manager.eio_sid_from_sid(sid, NAMESPACE))
        if socket is not None:
            socket.send(StrictPacket(DISCONNECT).encode())
            socket.end(self.reason.SERVER_DISCONNECT)

    def _engineio_server_class(self) -> type[Engine]:
        return Engine

    def _handle_eio_connect(self, eio_sid: str, environ: dict[str, Any]) -> None:
        self.environ[eio_sid] = environ

    def _handle_eio_message(self, eio_sid: str, data: str) -> None:
        """Handle an Engine.IO message.

        Raises:
            ProtocolError: the client may not send this message at this point.
        """
        packet = self._decode(data)
        if packet.packet_type == CONNECT:
            self._connect(self.eio.sockets[eio_sid], packet)
        elif packet.namespace not in (None, NAMESPACE):
            raise ProtocolError("unknown namespace")
        elif packet.packet_type == DISCONNECT:
            self.eio.sockets[eio_sid].end(self.reason.CLIENT_DISCONNECT)
        elif packet.packet_type == EVENT:
            self._begin_event(self.eio.sockets[eio_sid], packet)
        # ACK packets are ignored: the server requests none

    @staticmethod
    def _decode(data: str) -> StrictPacket:
        if not data:
            raise ProtocolError("empty packet")  # the library would treat it as an event, without decoding it
        try:
            return StrictPacket(encoded_packet=data)
        except ProtocolError:
            raise
        except Exception as error:  # any error of the decoder
            raise ProtocolError(f"malformed packet ({type(error).__name__})") from None

    def _connected_sid(self, eio_sid: str) -> str:
        """Return the Socket.IO id of an Engine.IO socket whose handshake is complete."""
        sid: str | None = self.manager.sid_from_eio_sid(eio_sid, NAMESPACE)
        if not self.manager.is_connected(sid, NAMESPACE):
            raise ProtocolError("event before the handshake")
        assert sid is not None
        return sid

    def _connect(self, socket: EngineSocket, packet: StrictPacket) -> None:
        """Answer a Socket.IO handshake, and end the Engine.IO socket if the handshake is refused."""
        if self.manager.sid_from_eio_sid(socket.sid, NAMESPACE) is not None:
            raise ProtocolError("connected twice")
        if packet.namespace not in (None, NAMESPACE):
            # The library would send a string; the JavaScript client expects an object with a ``message``.
            refusal = StrictPacket(CONNECT_ERROR, {"message": str(NoSuchNamespace())}, packet.namespace)
            socket.send(refusal.encode())
            socket.end(self.reason.SERVER_DISCONNECT)
            return
        try:
            run(self._handle_connect(socket.sid, packet.namespace, packet.data))
        except Exception:
            logger.exception("handshake_failed", "the handler of a handshake failed")
            self._remove_client(socket.sid)
        sid = self.manager.sid_from_eio_sid(socket.sid, NAMESPACE)
        if sid is None:
            socket.end(self.reason.SERVER_DISCONNECT)
        else:
            socket.establish(sid)

    async def _handle_eio_disconnect(self, eio_sid: str, reason: str) -> None:
        """Remove the library's state for an Engine.IO socket, even if the ``disconnect`` handler raises."""
        try:
            await super()._handle_eio_disconnect(eio_sid, reason)
        finally:
            self._remove_client(eio_sid)

    def _remove_client(self, eio_sid: str) -> None:
        sid = self.manager.sid_from_eio_sid(eio_sid, NAMESPACE)
        if sid is not None:
            self.manager.basic_disconnect(sid, NAMESPACE)
        self.environ.pop(eio_sid, None)

    def _begin_event(self, socket: EngineSocket, packet: StrictPacket) -> None:
        """Run the handler of an event in a task, so that a disconnect can be read while the handler runs."""
        sid = self._connected_sid(socket.sid)
        if packet.data[0] not in self.handlers[NAMESPACE]:
            return
        socket.waiting_events += 1
        if socket.waiting_events > MAX_WAITING_EVENTS:
            raise ProtocolError("too many events at once")
        self.eio.spawn(self._run_event(socket, sid, packet))

    async def _run_event(self, socket: EngineSocket, sid: str, packet: StrictPacket) -> None:
        try:
            await self._handle_event_internal(self, sid, socket.sid, packet.data, NAMESPACE, packet.id)
        finally:
            socket.waiting_events -= 1


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine of the library that never suspends; the handler of ``connect`` does not suspend either.

    So a handshake is atomic: no other packet and no end of the connection is handled in the middle of the handshake.
    """
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise RuntimeError("the handler of a handshake must not wait")


def _logger_without_packets(name: str) -> logging.Logger:
    """Return the library's logger, without the packets that it logs at INFO: these contain access tokens."""
    library_logger = logging.getLogger(name)
    library_logger.setLevel(logging.WARNING)
    return library_logger
