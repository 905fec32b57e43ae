"""Engine.IO sockets: one per client, with polling until a websocket is attached, at once or by an upgrade.

Every message, buffer and wait of an Engine.IO socket has a limit. engine.py passes requests and websockets to the
socket.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from lesson_server.log import EventLogger
from lesson_server.protocol import limits
from lesson_server.protocol.engine_packets import CLOSE, MESSAGE, PING, PONG, ProtocolError
from lesson_server.protocol.engine_transports import PollingTransport, Upgrade, WebsocketTransport
from lesson_server.protocol.limits import MAX_UNREAD_BYTES
from lesson_server.protocol.places import Places

logger = EventLogger(__name__)

# Packets that a client may leave unread before it is dropped. In a large lesson, hundreds of seats change in a second.
MAX_UNREAD_PACKETS = 512
# Seconds between pings, and for a client to answer a ping: the defaults of Socket.IO.
PING_INTERVAL = 25
PING_TIMEOUT = 20


class Callbacks(Protocol):
    """The callbacks of an Engine.IO socket."""

    reason: Any

    def on_message(self, socket: "EngineSocket", data: str) -> None: ...
    async def on_close(self, socket: "EngineSocket", reason: str) -> None: ...
    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]": ...
    def keep_final_payloads(self, sid: str, payloads: list[str]) -> None: ...
    def observe_drop(self, why: str) -> None: ...


class EngineSocket:
    """One Engine.IO socket.

    The client has ten seconds for the handshake; then it is pinged until the socket ends.

    Args:
        callbacks: called when something happens to the socket.
        sid: the id of the socket.
        places: the socket takes one place until it ends. After the handshake, no newer socket can evict this socket.
        transport: ``polling``, or ``websocket`` if a websocket will be attached at once.

    Attributes:
        polling: the polling transport; None if the client has begun with a websocket.

    Raises:
        ServiceBusy: all places are kept.
    """

    __slots__ = (
        "_callbacks",
        "_ending",
        "_outbox",
        "_pinged",
        "_place",
        "_socketio_sid",
        "_timer",
        "_upgrade",
        "_websocket",
        "polling",
        "session",
        "sid",
        "waiting_events",
    )

    def __init__(self, callbacks: Callbacks, sid: str, places: Places, transport: str) -> None:
        self.sid = sid
        self._place = places.take(self._on_evicted)
        self.session: dict[str, Any] = {}  # python-socketio stores the session here
        self.waiting_events = 0  # counted by transport.py
        self._callbacks = callbacks
        self._socketio_sid: str | None = None
        self._ending: asyncio.Task[None] | None = None
        self._websocket: WebsocketTransport | None = None
        self._upgrade: Upgrade | None = None
        self._outbox: list[str | bytes] = []
        self.polling = PollingTransport(self._outbox) if transport == "polling" else None
        self._pinged = False
        self._timer = asyncio.get_running_loop().call_later(limits.HANDSHAKE_TIMEOUT, self.drop, "handshake timeout")

    @property
    def closed(self) -> bool:
        """Whether the Engine.IO socket is ending or has ended, so that nothing is received or sent any more."""
        return self._ending is not None

    @property
    def upgraded(self) -> bool:
        """Whether the transport is a websocket; the name is python-engineio's."""
        return self._websocket is not None

    @property
    def upgrading(self) -> bool:
        """Whether an upgrade from polling to a websocket is under way."""
        return self._upgrade is not None

    def establish(self, socketio_sid: str) -> None:
        """Keep the place and ping the client from now on, because the handshake is complete.

        Args:
            socketio_sid: the Socket.IO id of the client, for the log.
        """
        if not self.closed:
            self._socketio_sid = socketio_sid
            self._place.keep()
            self._wait(PING_INTERVAL, self._ping)

    # Sending

    def send(self, message: str | bytes) -> None:
        """Send a message, unless the Engine.IO socket has ended."""
        self.send_packet(MESSAGE + message if isinstance(message, str) else message)

    def send_packet(self, packet: str | bytes) -> None:
        """Send a packet, which many sockets may share, unless the Engine.IO socket has ended."""
        if not self.closed:
            self.write(packet)

    def write(self, packet: str | bytes) -> None:
        """Send or queue a packet; drop the client if it has left too much unread."""
        if self._websocket is not None and self._websocket.is_writable:
            self._websocket.write(packet)
            return
        self._outbox.append(packet)
        if len(self._outbox) > MAX_UNREAD_PACKETS or sum(map(len, self._outbox)) > MAX_UNREAD_BYTES:
            self.drop("slow reader")
        elif self.polling is not None:
            self.polling.answer()

    def flush(self) -> None:
        """Send the queued packets while the websocket is writable."""
        while self._outbox and self._websocket is not None and self._websocket.is_writable:
            self._websocket.write(self._outbox.pop(0))

    # Receiving

    def receive(self, packet: str | bytes) -> None:
        """Handle a packet from the client.

        Raises:
            ProtocolError: a client may not send this packet in this state.
        """
        if self.closed:
            return
        if isinstance(packet, bytes):
            raise ProtocolError("binary message")
        kind, data = packet[:1], packet[1:]
        if kind == MESSAGE:
            self._callbacks.on_message(self, data)
        elif kind == PONG:
            if self._pinged:  # an unsolicited PONG must not extend a deadline
                self._pinged = False
                self._wait(PING_INTERVAL, self._ping)
        elif kind == CLOSE:
            self.end(self._callbacks.reason.CLIENT_DISCONNECT)
        else:
            raise ProtocolError("unknown packet")

    # The websocket transport

    def attach(self, websocket: WebsocketTransport) -> None:
        """Use this websocket as the transport from now on."""
        self._websocket = websocket
        websocket.keep()
        self._upgrade = None
        self.flush()

    def begin_upgrade(self, websocket: WebsocketTransport) -> None:
        """Begin the upgrade to this websocket; only one upgrade may run at a time."""
        assert self.polling is not None
        self._upgrade = Upgrade(self.polling, websocket)

    def receive_from(self, websocket: WebsocketTransport, packet: str | bytes) -> None:
        """Handle a packet from a websocket: the transport, or the websocket of an upgrade.

        Packets from any other websocket are ignored: it has just been closed.
        """
        if websocket is self._websocket:
            try:
                self.receive(packet)
            except ProtocolError as error:
                self.drop(str(error))
        elif self._upgrade is not None and websocket is self._upgrade.websocket and not self.closed:
            try:
                if self._upgrade.receive(packet):
                    self.attach(websocket)
            except ProtocolError:
                self.lost(websocket)
                websocket.disconnect(abort=True)

    def lost(self, transport: object) -> None:
        """Handle the loss of a websocket or of the pending poll."""
        if self._upgrade is not None and transport is self._upgrade.websocket:
            self._upgrade.cancel()
            self._upgrade = None
        elif transport is self._websocket or (self.polling is not None and transport is self.polling.request):
            self.end(self._callbacks.reason.TRANSPORT_CLOSE, abort=True)

    # The end

    def drop(self, why: str) -> None:
        """End the Engine.IO socket of a client that violated the protocol or disappeared; discard the unsent packets.

        Args:
            why: for the log and the metrics; one of a fixed set of texts, without client input.
        """
        if not self.closed:
            logger.info("client_dropped", "client dropped: {reason}", reason=why, sid=self._socketio_sid)
            self._callbacks.observe_drop(why)
            self.end(self._callbacks.reason.TRANSPORT_ERROR, abort=True)

    def _on_evicted(self) -> None:
        self.drop("handshake cancelled for a newer one")

    async def close(self, reason: str) -> None:
        """End the Engine.IO socket: first the transport, then the application's state for the socket.

        Idempotent: a later call waits for the same end. So a server that stops also waits for the clean-up of clients
        that have just disconnected.

        Args:
            reason: one of ``engineio.Server.reason``.
        """
        await asyncio.shield(self.end(reason))

    def end(self, reason: str, *, abort: bool = False) -> "asyncio.Task[None]":
        """End the transport at once, and start the task that ends the rest.

        At once, because frames that have already been read must not be handled any more.

        Args:
            reason: one of ``engineio.Server.reason``.
            abort: discard the unsent packets, because the client must not or can't receive them.

        Returns:
            the task that ends the rest.
        """
        if self._ending is None:
            self._ending = self._callbacks.spawn(self._callbacks.on_close(self, reason))
            self._timer.cancel()
            self._place.free()
            self._end_transport(abort)
        return self._ending

    def _end_transport(self, abort: bool) -> None:
        if self._upgrade is not None:
            self._upgrade.websocket.disconnect(abort=True)
        if abort:
            self._outbox.clear()
        if self._websocket is not None:
            for packet in self._outbox:
                self._websocket.write(packet)
            self._websocket.disconnect(abort=abort)
            self._websocket = None  # else this socket and the websocket would wait for the garbage collector
        elif self.polling is not None:
            self._callbacks.keep_final_payloads(self.sid, self.polling.close())

    def _ping(self) -> None:
        self._pinged = True
        self._wait(PING_TIMEOUT, lambda: self.drop("ping timeout"))
        self.write(PING)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """Restart the socket's only timer, which is for the handshake, then for the next ping or its answer."""
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)
