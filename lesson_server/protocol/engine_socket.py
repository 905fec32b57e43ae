"""Engine.IO sockets: one per client, with polling until a websocket is attached, at once or by an upgrade.

Every message, buffer and wait of an Engine.IO socket has a limit. engine.py passes requests and websockets to the
socket.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from lesson_server.protocol import limits
from lesson_server.protocol.engine_packets import (
    CLOSE,
    MESSAGE,
    NOOP,
    PING,
    PONG,
    UPGRADE,
    ProtocolError,
    RequestRefused,
    encode_payload,
)
from lesson_server.protocol.limits import MAX_UNREAD_BYTES
from lesson_server.protocol.places import Places

logger = logging.getLogger(__name__)

# Packets that a client may leave unread before it is dropped.
MAX_UNREAD_PACKETS = 256
# Seconds between pings, and for a client to answer a ping: the defaults of Socket.IO.
PING_INTERVAL = 25
PING_TIMEOUT = 20


class Transport(Protocol):
    """A websocket, as its Engine.IO socket uses it.

    Attributes:
        is_writable: whether the kernel accepts data. When it does so again, :meth:`EngineSocket.flush` is called.
    """

    is_writable: bool

    def keep(self) -> None: ...
    def write(self, packet: str | bytes) -> None: ...
    def disconnect(self, *, abort: bool) -> None: ...


class Callbacks(Protocol):
    """The callbacks of an Engine.IO socket."""

    reason: Any

    def on_message(self, socket: "EngineSocket", data: str) -> None: ...
    async def on_close(self, socket: "EngineSocket", reason: str) -> None: ...
    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]": ...
    def keep_final_payloads(self, sid: str, payloads: list[str]) -> None: ...


class EngineSocket:
    """One Engine.IO socket.

    The client has ten seconds for the handshake; then it is pinged until the socket ends.

    Args:
        callbacks: called when something happens to the socket.
        sid: the id of the socket.
        places: the socket takes one place until it ends. After the handshake, no newer socket can evict this socket.

    Raises:
        ServiceBusy: all places are kept.
    """

    __slots__ = (
        "_callbacks",
        "_ending",
        "_outbox",
        "_pinged",
        "_place",
        "_poll_request",
        "_poller",
        "_probed",
        "_timer",
        "_upgrade_timer",
        "_upgrading",
        "_websocket",
        "session",
        "sid",
        "waiting_events",
    )

    def __init__(self, callbacks: Callbacks, sid: str, places: Places) -> None:
        self.sid = sid
        self._place = places.take(self._give_way)
        self.session: dict[str, Any] = {}  # python-socketio stores the session here
        self.waiting_events = 0  # counted by transport.py
        self._callbacks = callbacks
        self._ending: asyncio.Task[None] | None = None
        self._websocket: Transport | None = None
        self._upgrading: Transport | None = None  # the websocket that is to replace polling
        self._probed = False  # whether that websocket's probe has been answered
        self._outbox: list[str | bytes] = []
        self._poller: asyncio.Future[None] | None = None
        self._poll_request: object = None  # the HTTP request of the pending poll
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
        return self._upgrading is not None

    def establish(self) -> None:
        """Keep the place and ping the client from now on, because the handshake is complete."""
        if not self.closed:
            self._place.keep()
            self._wait(PING_INTERVAL, self._ping)

    # Sending

    def send(self, message: str | bytes) -> None:
        """Send a message, unless the Engine.IO socket has ended."""
        if not self.closed:
            self.write(MESSAGE + message if isinstance(message, str) else message)

    def write(self, packet: str | bytes) -> None:
        """Send or queue a packet; drop the client if it has left too much unread."""
        if self._websocket is not None and self._websocket.is_writable:
            self._websocket.write(packet)
            return
        self._outbox.append(packet)
        if len(self._outbox) > MAX_UNREAD_PACKETS or sum(map(len, self._outbox)) > MAX_UNREAD_BYTES:
            self.drop("slow reader")
        else:
            self._release_poller()

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

    # The polling transport

    async def poll(self, request: object) -> str:
        """Wait until there are packets to send, and return them as one payload.

        Raises:
            RequestRefused: a poll of this Engine.IO socket is already pending. The socket ends, as in the protocol.
        """
        if self._poller is not None:
            self.drop("two polls at once")
            raise RequestRefused(3, "Bad request")
        if self._probed:
            return NOOP  # the client pauses polling, and waits for this last response
        if not self._outbox:
            self._poller = asyncio.get_running_loop().create_future()
            self._poll_request = request
            await self._poller
            self._poller = self._poll_request = None
        return self._take_outbox()

    def _release_poller(self) -> None:
        if self._poller is not None and not self._poller.done():
            self._poller.set_result(None)

    def _take_outbox(self) -> str:
        payload = encode_payload(self._outbox)
        self._outbox.clear()
        return payload

    # The websocket transport

    def attach(self, websocket: Transport) -> None:
        """Use this websocket as the transport from now on."""
        self._websocket = websocket
        websocket.keep()
        if self._upgrading is not None:
            self._upgrade_timer.cancel()
        self._upgrading = None
        self.flush()

    def begin_upgrade(self, websocket: Transport) -> None:
        """Begin the upgrade to this websocket, with a timeout; only one upgrade may run at a time."""
        self._upgrading = websocket
        expire = partial(websocket.disconnect, abort=True)
        self._upgrade_timer = asyncio.get_running_loop().call_later(limits.HANDSHAKE_TIMEOUT, expire)

    def receive_from(self, websocket: Transport, packet: str | bytes) -> None:
        """Handle a packet from a websocket: the transport, or the websocket of an upgrade.

        Packets from any other websocket are ignored: it has just been closed.
        """
        if websocket is self._websocket:
            try:
                self.receive(packet)
            except ProtocolError as error:
                self.drop(str(error))
        elif websocket is self._upgrading and not self.closed:
            try:
                self._probe(websocket, packet)
            except ProtocolError:
                self.lost(websocket)
                websocket.disconnect(abort=True)

    def _probe(self, websocket: Transport, packet: str | bytes) -> None:
        if packet == PING + "probe" and not self._probed:
            self._probed = True
            websocket.write(PONG + "probe")
            self._release_poller()
        elif packet == UPGRADE and self._probed:
            self.attach(websocket)
        else:
            raise ProtocolError("not an upgrade")

    def lost(self, transport: object) -> None:
        """Handle the loss of a websocket or of the pending poll."""
        if transport is self._upgrading:
            self._upgrading = None  # polling continues
            self._upgrade_timer.cancel()  # the timer references the websocket
            self._probed = False
        elif transport is self._websocket or transport is self._poll_request:
            self.end(self._callbacks.reason.TRANSPORT_CLOSE, abort=True)

    # The end

    def drop(self, why: str) -> None:
        """End the Engine.IO socket of a client that violated the protocol or disappeared; discard the unsent packets.

        Args:
            why: for the log; one of a fixed set of texts, without client input.
        """
        if not self.closed:
            logger.info("client dropped: %s", why, extra={"kind": why})
            self.end(self._callbacks.reason.TRANSPORT_ERROR, abort=True)

    def _give_way(self) -> None:
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
            self._place.leave()
            self._end_transport(abort)
        return self._ending

    def _end_transport(self, abort: bool) -> None:
        if self._upgrading is not None:
            self._upgrading.disconnect(abort=True)
        if abort:
            self._outbox.clear()
        if self._websocket is not None:
            for packet in self._outbox:
                self._websocket.write(packet)
            self._websocket.disconnect(abort=abort)
            self._websocket = None  # else this socket and the websocket would wait for the garbage collector
            return
        # CLOSE gets a payload of its own: the JavaScript client would handle it before a message in the same payload.
        final_payload = [self._take_outbox(), CLOSE] if self._outbox else [CLOSE]
        if self._poller is not None:
            self._outbox.append(final_payload.pop(0))
            self._release_poller()
        self._callbacks.keep_final_payloads(self.sid, final_payload)

    def _ping(self) -> None:
        self._pinged = True
        self._wait(PING_TIMEOUT, lambda: self.drop("ping timeout"))
        self.write(PING)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """Restart the socket's only timer, which is for the handshake, then for the next ping or its answer."""
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)
