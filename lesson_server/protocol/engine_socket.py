"""Engine.IO sockets: one a client, its transport polling until a websocket is attached, at once or by an upgrade.

Every message, buffer and wait of an Engine.IO socket has a bound. See engine.py for how requests and websockets reach
the socket.
"""

import asyncio
import base64
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import orjson

from lesson_server.protocol.places import Places

logger = logging.getLogger(__name__)

# Bytes of a message or a polling request. Ours have no data but an access token in the handshake.
MAX_MESSAGE_SIZE = 16 * 1024
# Packets in the body of a POST, as in the reference implementations.
MAX_PACKETS_IN_POST = 16
# Bytes and packets that a client may leave unread before it is dropped. An acknowledgement has about 40 bytes.
MAX_UNREAD_BYTES = 32 * 1024
MAX_UNREAD_PACKETS = 256
# Seconds for a connection to complete its handshake, an upgrade included.
HANDSHAKE_TIMEOUT = 10
# Seconds between pings, and to answer one: the defaults of Socket.IO.
PING_INTERVAL = 25
PING_TIMEOUT = 20

OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP = "0123456"
SEPARATOR = "\x1e"


class ProtocolError(Exception):
    """The client broke the protocol, and its Engine.IO socket ends. The text holds nothing that the client sent."""


class RequestRefused(Exception):
    """An HTTP request or websocket handshake is refused, with the status and the code of Engine.IO's protocol."""

    def __init__(self, code: int, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.body = orjson.dumps({"code": code, "message": message})
        self.status = status


class Transport(Protocol):
    """A websocket, seen from its Engine.IO socket.

    Attributes:
        is_writable: whether the system takes what is written. When it does again, :meth:`EngineSocket.flush` is called.
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
    """One Engine.IO socket. Its first ten seconds are for the handshake; then it is pinged until it ends.

    Args:
        callbacks: called when something happens to the socket.
        sid: its id.
        places: the socket has one of them until it ends. Once its handshake is complete, no newer one gets the place.

    Raises:
        ServiceBusy: there is no place.
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
        self.session: dict[str, Any] = {}  # python-socketio keeps its sessions here
        self.waiting_events = 0  # counted by transport.py
        self._callbacks = callbacks
        self._ending: asyncio.Task[None] | None = None
        self._websocket: Transport | None = None
        self._upgrading: Transport | None = None  # a websocket that wants to take over from polling
        self._probed = False  # and has been told that it may
        self._outbox: list[str | bytes] = []
        self._poller: asyncio.Future[None] | None = None
        self._poll_request: object = None  # the HTTP request that waits for packets
        self._pinged = False
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT, self.drop, "handshake timeout")

    @property
    def closed(self) -> bool:
        """Whether the Engine.IO socket is ending or has ended: nothing is received or sent any more."""
        return self._ending is not None

    @property
    def upgraded(self) -> bool:
        """Whether the transport is a websocket; the name is python-engineio's."""
        return self._websocket is not None

    @property
    def upgrading(self) -> bool:
        """Whether a websocket wants to take over from polling."""
        return self._upgrading is not None

    def establish(self) -> None:
        """Ping the client from now on: the handshake is complete."""
        if not self.closed:
            self._place.keep()
            self._wait(PING_INTERVAL, self._ping)

    # Sending

    def send(self, message: str | bytes) -> None:
        """Send a message, unless the Engine.IO socket has ended."""
        if not self.closed:
            self.write(MESSAGE + message if isinstance(message, str) else message)

    def write(self, packet: str | bytes) -> None:
        """Send a packet, or drop the client if it has left too much unread."""
        if self._websocket is not None and self._websocket.is_writable:
            self._websocket.write(packet)
            return
        self._outbox.append(packet)
        if len(self._outbox) > MAX_UNREAD_PACKETS or sum(map(len, self._outbox)) > MAX_UNREAD_BYTES:
            self.drop("slow reader")
        else:
            self._release_poller()

    def flush(self) -> None:
        """Send what has waited until the websocket is writable again."""
        while self._outbox and self._websocket is not None and self._websocket.is_writable:
            self._websocket.write(self._outbox.pop(0))

    # Receiving

    def receive(self, packet: str | bytes) -> None:
        """Take a packet in.

        Raises:
            ProtocolError: the packet is none of a client's in this state.
        """
        if self.closed:
            return
        if isinstance(packet, bytes):
            raise ProtocolError("binary message")
        kind, data = packet[:1], packet[1:]
        if kind == MESSAGE:
            self._callbacks.on_message(self, data)
        elif kind == PONG:
            if self._pinged:  # one that nobody asked for must not put a deadline off
                self._pinged = False
                self._wait(PING_INTERVAL, self._ping)
        elif kind == CLOSE:
            self.end(self._callbacks.reason.CLIENT_DISCONNECT)
        else:
            raise ProtocolError("unknown packet")

    def receive_post(self, body: bytes) -> list[str]:
        """Return the packets of a polling request's body.

        Raises:
            ProtocolError: it is not a list of packets.
        """
        try:
            packets = body.decode().split(SEPARATOR)
        except UnicodeDecodeError:
            raise ProtocolError("malformed payload") from None
        if len(packets) > MAX_PACKETS_IN_POST:
            raise ProtocolError("too many packets")
        return packets

    # The polling transport

    async def poll(self, request: object) -> str:
        """Wait until there is something to send, and take it.

        Raises:
            RequestRefused: another request of this Engine.IO socket waits already. The socket ends, as in the protocol.
        """
        if self._poller is not None:
            self.drop("two polls at once")
            raise RequestRefused(3, "Bad request")
        if self._probed:
            return NOOP  # the client pauses its polling, and waits for this last answer
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
        packets = (p if isinstance(p, str) else "b" + base64.b64encode(p).decode() for p in self._outbox)
        payload = SEPARATOR.join(packets) or NOOP
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
        """Let this websocket take over from polling, if it does so in time; one at a time."""
        self._upgrading = websocket
        expire = partial(websocket.disconnect, abort=True)
        self._upgrade_timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT, expire)

    def receive_from(self, websocket: Transport, packet: str | bytes) -> None:
        """Take a packet in from a websocket: the Engine.IO socket's own, or one that would take the place of polling.

        From any other, one that has just been closed, nothing is taken in.
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
        """Handle the loss of a websocket, or of the request that waited for packets."""
        if transport is self._upgrading:
            self._upgrading = None  # polling goes on
            self._upgrade_timer.cancel()  # it holds what is left of the websocket
            self._probed = False
        elif transport is self._websocket or transport is self._poll_request:
            self.end(self._callbacks.reason.TRANSPORT_CLOSE, abort=True)

    # The end

    def drop(self, why: str) -> None:
        """End the Engine.IO socket of a client that broke the rules or went away; nothing more is sent.

        Args:
            why: for the log; one of a fixed set of texts, nothing of what the client sent.
        """
        if not self.closed:
            logger.info("client dropped: %s", why, extra={"kind": why})
            self.end(self._callbacks.reason.TRANSPORT_ERROR, abort=True)

    def _give_way(self) -> None:
        self.drop("handshake cancelled for a newer one")

    async def close(self, reason: str) -> None:
        """End the Engine.IO socket: first the transport, then what the application holds for it.

        Idempotent; whoever calls it later waits for the same end. That is how a server that stops sees the end of
        clients that have just gone.

        Args:
            reason: one of ``engineio.Server.reason``.
        """
        await asyncio.shield(self.end(reason))

    def end(self, reason: str, *, abort: bool = False) -> "asyncio.Task[None]":
        """End the transport at once, since frames that have been read already must not be taken in any more.

        Args:
            reason: one of ``engineio.Server.reason``.
            abort: the client is not to get what it has not been sent, or can't.

        Returns:
            what ends the rest.
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
            self._websocket = None  # else the two would wait for the garbage collector
            return
        # CLOSE comes by itself: the JavaScript client would take it before the message that it came with.
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
        """Set the one timer: for the handshake, then for the next ping or its answer."""
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)
