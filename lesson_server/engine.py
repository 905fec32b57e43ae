"""Engine.IO 4 on Tornado, as we run it: every message, buffer and wait has a bound, and what is refused is closed.

python-engineio keeps the sessions and the ids; its Tornado driver is not used. That one trusts what arrives, buffers
without limit in both directions, compresses each connection (229 kB of memory instead of 42), and leaves the sockets of
refused clients open for ever.

A :class:`Session` is one client; its transport is polling until a websocket is attached, at once or by an upgrade.
"""

import asyncio
import base64
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import engineio
import orjson
from tornado.iostream import StreamBufferFullError, StreamClosedError
from tornado.web import HTTPError
from tornado.websocket import WebSocketHandler

logger = logging.getLogger(__name__)

# Bytes of a message or a polling request. Ours have no data but an access token in the handshake.
MAX_MESSAGE_SIZE = 16 * 1024
# Packets in the body of a POST, as in the reference implementations.
MAX_PACKETS_IN_POST = 16
# Bytes and packets that a client may leave unread before it is dropped. An acknowledgement has about 40 bytes.
MAX_UNREAD_BYTES = 64 * 1024
MAX_UNREAD_PACKETS = 256
# Seconds for a socket to complete its handshake, an upgrade included.
HANDSHAKE_TIMEOUT = 10
# Seconds between pings, and to answer one: the defaults of Socket.IO.
PING_INTERVAL = 25
PING_TIMEOUT = 20

TEXT_FRAME, BINARY_FRAME = 0x1, 0x2
OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP = "0123456"
SEPARATOR = "\x1e"


class ProtocolError(Exception):
    """The client broke the protocol; its session ends. The text is ours, nothing of what the client sent."""


class RequestRefused(Exception):
    """An HTTP request or websocket handshake is refused, with the status and the code of Engine.IO's protocol."""

    def __init__(self, code: int, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.body = orjson.dumps({"code": code, "message": message})
        self.status = status


class Session:
    """One Engine.IO session. Its first ten seconds are for the handshake; then it is pinged until it ends.

    Args:
        engine: where the session is kept.
        sid: its id.
    """

    __slots__ = (
        "_engine",
        "_outbox",
        "_pinged",
        "_poll_request",
        "_poller",
        "_timer",
        "_upgrading",
        "_websocket",
        "closed",
        "session",
        "sid",
        "waiting_events",
    )

    def __init__(self, engine: "Engine", sid: str) -> None:
        self.sid = sid
        self.session: dict[str, Any] = {}  # python-socketio keeps its sessions here
        self.closed = False
        self.waiting_events = 0  # counted by transport.py
        self._engine = engine
        self._websocket: EngineHandler | None = None
        self._upgrading: EngineHandler | None = None
        self._outbox: list[str] = []
        self._poller: asyncio.Future[None] | None = None
        self._poll_request: EngineHandler | None = None
        self._pinged = False
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT, self.drop, "handshake timeout")

    @property
    def upgraded(self) -> bool:
        """Whether the transport is a websocket; the name is python-engineio's."""
        return self._websocket is not None

    def establish(self) -> None:
        """The handshake is complete: from now on the client is pinged."""
        self._wait(PING_INTERVAL, self._ping)

    # Sending

    def send(self, message: str | bytes) -> None:
        """Sends a message, or drops the client if it has left too much unread."""
        if self.closed:
            return
        if isinstance(message, str):
            self._write(MESSAGE + message)
        elif self._websocket is not None:
            self._websocket.write_frame(BINARY_FRAME, message)
        else:
            self._write("b" + base64.b64encode(message).decode())

    def _write(self, packet: str) -> None:
        if self._websocket is not None:
            self._websocket.write_frame(TEXT_FRAME, packet.encode())
            return
        self._outbox.append(packet)
        if len(self._outbox) > MAX_UNREAD_PACKETS or sum(map(len, self._outbox)) > MAX_UNREAD_BYTES:
            self.drop("slow reader")
        else:
            self._release_poller()

    # Receiving

    def receive(self, packet: str | bytes) -> Awaitable[None] | None:
        """Takes a packet in.

        Returns:
            what to wait for before the next packet may be taken in, if anything.

        Raises:
            ProtocolError: the packet is none of a client's in this state.
        """
        if self.closed:
            return None
        if isinstance(packet, bytes):
            return self._engine.on_message(self, packet)
        kind, data = packet[:1], packet[1:]
        if kind == MESSAGE:
            return self._engine.on_message(self, data)
        if kind == PONG:
            if self._pinged:  # one that nobody asked for must not put a deadline off
                self._pinged = False
                self._wait(PING_INTERVAL, self._ping)
            return None
        if kind == CLOSE:
            return self.close(self._engine.reason.CLIENT_DISCONNECT)
        raise ProtocolError("unknown packet")

    def receive_post(self, body: bytes) -> list[str | bytes]:
        """The packets of a polling request's body.

        Raises:
            ProtocolError: it is not a list of packets.
        """
        try:
            packets = body.decode().split(SEPARATOR)
            if len(packets) > MAX_PACKETS_IN_POST:
                raise ProtocolError("too many packets")
            return [base64.b64decode(packet[1:], validate=True) if packet[:1] == "b" else packet for packet in packets]
        except ValueError:
            raise ProtocolError("malformed payload") from None

    # The polling transport

    async def poll(self, request: "EngineHandler") -> str:
        """Waits until there is something to send, and takes it.

        Raises:
            RequestRefused: another request of this session waits already. The session ends, as in the protocol.
        """
        if self._poller is not None:
            self.drop("two polls at once")
            raise RequestRefused(3, "Bad request")
        if self._upgrading is not None:
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
        payload = SEPARATOR.join(self._outbox) or NOOP
        self._outbox.clear()
        return payload

    # The websocket transport

    def attach(self, websocket: "EngineHandler") -> None:
        """The transport is this websocket from now on."""
        self._websocket = websocket
        self._upgrading = None
        for packet in self._outbox:
            websocket.write_frame(TEXT_FRAME, packet.encode())
        self._outbox = []
        self._release_poller()

    def is_transport(self, websocket: "EngineHandler") -> bool:
        """Whether the packets of the session come by this websocket."""
        return self._websocket is websocket

    def receive_from(self, websocket: "EngineHandler", packet: str | bytes) -> Awaitable[None] | None:
        """Takes a packet in from a websocket: its own, or one that would take the place of polling."""
        if self.closed:
            websocket.disconnect(abort=True)
            return None
        try:
            if self.is_transport(websocket):
                return self.receive(packet)
            self._probe(websocket, packet)
        except ProtocolError as error:
            if self.is_transport(websocket):
                self.drop(str(error))
            else:
                websocket.disconnect(abort=True)
        return None

    def _probe(self, websocket: "EngineHandler", packet: str | bytes) -> None:
        if packet == PING + "probe" and self._upgrading is None and self._websocket is None:
            self._upgrading = websocket
            websocket.write_frame(TEXT_FRAME, (PONG + "probe").encode())
            self._release_poller()
        elif packet == UPGRADE and self._upgrading is websocket:
            self.attach(websocket)
        else:
            raise ProtocolError("not an upgrade")

    def lost(self, handler: "EngineHandler") -> None:
        """A websocket, or the request that waited for packets, is gone."""
        if handler is self._upgrading:
            self._upgrading = None  # polling goes on
        elif handler is self._websocket or handler is self._poll_request:
            self._engine.spawn(self.close(self._engine.reason.TRANSPORT_CLOSE))

    # The end

    def drop(self, why: str) -> None:
        """Ends the session of a client that broke the rules or went away; nothing more is sent."""
        if self._shut(abort=True):
            logger.info("client dropped: %s", why)
            self._engine.spawn(self._engine.on_close(self, self._engine.reason.TRANSPORT_ERROR))

    async def close(self, reason: str) -> None:
        """Ends the session: first the transport, then what the application holds for it. Idempotent.

        Args:
            reason: one of ``engineio.Server.reason``.
        """
        if self._shut(abort=False):
            await self._engine.on_close(self, reason)

    def _shut(self, *, abort: bool) -> bool:
        """Ends the transport, at once: frames that have been read already must not be taken in any more.

        Args:
            abort: don't wait for the client to read what was sent to it.

        Returns:
            False when the session has ended before.
        """
        if self.closed:
            return False
        self.closed = True
        self._timer.cancel()
        if self._upgrading is not None:
            self._upgrading.disconnect(abort=True)
        if self._websocket is not None:
            self._websocket.disconnect(abort=abort)
            return True
        if abort:
            self._outbox.clear()
        self._outbox.append(CLOSE)
        if self._poller is None:
            self._engine.keep_farewell(self.sid, self._take_outbox())
        self._release_poller()
        return True

    def _ping(self) -> None:
        self._pinged = True
        self._wait(PING_TIMEOUT, lambda: self.drop("ping timeout"))
        self._write(PING)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """The one timer of a session: for the handshake, then for the next ping or its answer."""
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)


class EngineHandler(WebSocketHandler):
    """One HTTP request of Engine.IO: a polling GET or POST, a preflight, or a websocket."""

    _session: Session | None = None

    def initialize(self, engine: "Engine") -> None:
        self._engine = engine

    def prepare(self) -> None:
        origin = self.request.headers.get("Origin")
        if origin is None:
            return  # not a browser
        if not self._engine.allows(origin, self.request.headers.get("Host", "")):
            self._refuse(RequestRefused(4, "origin not allowed", 403))
            return
        self.set_header("Access-Control-Allow-Origin", origin)
        self.set_header("Access-Control-Allow-Credentials", "true")  # sticky-session cookies of a load balancer
        self.set_header("Vary", "Origin")

    def check_origin(self, origin: str) -> bool:
        return True  # prepare() has checked it, for polling too

    def get_compression_options(self) -> None:
        return None  # a compressor costs 187 kB a connection, and our messages have 40 bytes

    @property
    def max_message_size(self) -> int:
        return MAX_MESSAGE_SIZE

    # Polling

    async def get(self, *args: str, **kwargs: str) -> None:
        try:
            if self.request.headers.get("Upgrade", "").lower() == "websocket":
                session = self._find_session("websocket")
                if session is not None and session.upgraded:
                    raise RequestRefused(3, "Bad request")
                self._session = session
                await super().get()
                return
            farewell = self._engine.take_farewell(self.get_query_argument("sid", ""))
            if farewell is not None:
                await self._answer(farewell)
                return
            session = self._find_session("polling")
            if session is None:
                session = await self._engine.open(self, "polling")
            elif session.upgraded:
                raise RequestRefused(3, "Bad request")
            self._session = session
            await self._answer(await session.poll(self))
        except RequestRefused as refusal:
            self._refuse(refusal)

    async def post(self) -> None:
        try:
            session = self._find_session("polling")
            if session is None:
                raise RequestRefused(2, "Bad handshake method")
            if session.upgraded:
                raise RequestRefused(3, "Bad request")
            try:
                for packet in session.receive_post(self.request.body):
                    handled = session.receive(packet)
                    if handled is not None:
                        await handled
            except ProtocolError as error:
                session.drop(str(error))
                raise RequestRefused(3, "Bad request") from None
            await self._answer("ok")
        except RequestRefused as refusal:
            self._refuse(refusal)

    def options(self) -> None:
        self.set_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        self.set_header("Access-Control-Allow-Headers", "Content-Type")
        self.set_status(204)

    def _find_session(self, transport: str) -> Session | None:
        """The session that the request names; None when it asks for a new one."""
        sid = self.get_query_argument("sid", None)
        if self.get_query_argument("transport", "") != transport or transport not in self._engine.transports:
            raise RequestRefused(0, "Transport unknown")
        if self.get_query_argument("EIO", "") != "4":
            raise RequestRefused(5, "Unsupported protocol version")
        if sid is None:
            return None
        session: Session | None = self._engine.sockets.get(sid)
        if session is None or session.closed:
            raise RequestRefused(1, "Session ID unknown")
        return session

    async def _answer(self, payload: str) -> None:
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")
        with contextlib.suppress(StreamClosedError):  # the client has gone while it waited
            await self.finish(payload)

    def _refuse(self, refusal: RequestRefused) -> None:
        self.set_status(refusal.status)
        self.set_header("Content-Type", "application/json")
        self.finish(refusal.body)

    def finish(self, chunk: str | bytes | dict[str, Any] | None = None) -> "asyncio.Future[None]":
        """Sends the answer. A refusal closes the connection, Tornado's own too: the client has no business to keep it."""
        refused = self.get_status() >= 400
        if refused:
            self.set_header("Connection", "close")
        connection = self.request.connection
        sent = super().finish(chunk)
        if refused:
            sent.add_done_callback(lambda _: connection.close())  # type: ignore[union-attr]
        return sent

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self._refuse(RequestRefused(3, "Bad request", status_code))

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        # Tornado's own line would hold the URL, and with it whatever a client put there. The buffer is full when the
        # answer to a ping, or to a close frame, found no room: a slow reader, whose websocket Tornado aborts then.
        if not isinstance(value, HTTPError | StreamBufferFullError):
            logger.error("%s request failed", self.request.method, exc_info=value)

    # The websocket

    async def open(self, *args: str, **kwargs: str) -> None:
        assert self.ws_connection is not None
        assert self.ws_connection.stream is not None
        self.ws_connection.stream.max_write_buffer_size = MAX_UNREAD_BYTES
        if self._session is None:
            self._session = await self._engine.open(self, "websocket")
        else:
            asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT, self._expire_probe)

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        assert self._session is not None
        return self._session.receive_from(self, message)

    def write_frame(self, opcode: int, data: bytes) -> None:
        """Sends a frame without the task that Tornado's ``write_message`` makes for each."""
        if self.ws_connection is None or self.ws_connection.is_closing():
            return
        try:
            self.ws_connection._write_frame(True, opcode, data)  # type: ignore[attr-defined]
        except StreamClosedError:
            pass  # on_close follows
        except StreamBufferFullError:
            if self._session is not None:
                self._session.drop("slow reader")

    def disconnect(self, *, abort: bool) -> None:
        """Closes the websocket; with ``abort``, without waiting for what the client has not read."""
        if self.ws_connection is None:
            return
        stream = self.ws_connection.stream
        assert stream is not None
        if abort:
            stream.close()
            return
        try:
            self.close()  # waits 5 s for the client's close frame
        except StreamBufferFullError:
            stream.close()

    def on_close(self) -> None:
        """Tornado: the websocket has ended, or a client has gone while its request waited."""
        if self._session is not None:
            self._session.lost(self)

    def _expire_probe(self) -> None:
        if self._session is not None and not self._session.is_transport(self):
            self.disconnect(abort=True)


class Engine(engineio.AsyncServer):  # type: ignore[misc]
    """The Engine.IO server that python-socketio drives. It takes its sessions from :class:`EngineHandler`.

    Args:
        allowed_origins: what ``Origin`` browsers may send besides the server's own; ``*`` allows all.
        kwargs: what python-socketio passes on to every Engine.IO server.
    """

    sockets: dict[str, Session]

    def __init__(self, *, allowed_origins: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(async_mode="tornado", monitor_clients=False, **kwargs)
        self._allowed_origins = frozenset(allowed_origins)
        self._farewells: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def allows(self, origin: str, host: str) -> bool:
        """Whether a page of that origin may connect to this host."""
        authority = origin.lower().partition("://")[2]
        same = authority == host.lower() and authority != ""  # of the origin "null" nothing is left
        return same or "*" in self._allowed_origins or origin.lower() in self._allowed_origins

    async def open(self, handler: EngineHandler, transport: str) -> Session:
        """Begins a session and sends its OPEN packet."""
        session = Session(self, self.generate_id())
        self.sockets[session.sid] = session
        await self.handlers["connect"](session.sid, {"REMOTE_ADDR": handler.request.remote_ip})
        if transport == "websocket":
            session.attach(handler)
        opening = {
            "sid": session.sid,
            "upgrades": ["websocket"] if transport == "polling" and "websocket" in self.transports else [],
            "pingInterval": PING_INTERVAL * 1000,
            "pingTimeout": PING_TIMEOUT * 1000,
            "maxPayload": MAX_MESSAGE_SIZE,
        }
        session._write(OPEN + orjson.dumps(opening).decode())
        return session

    def on_message(self, session: Session, data: str | bytes) -> Awaitable[None] | None:
        """Hands a message to python-socketio."""
        handled: Awaitable[None] | None = self.handlers["message"](session.sid, data)
        return handled

    async def on_close(self, session: Session, reason: str) -> None:
        """Tells python-socketio, and through it the application, that a session has ended."""
        try:
            await self.handlers["disconnect"](session.sid, reason)
        finally:
            self.sockets.pop(session.sid, None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` beside the caller, and keeps it from being collected before it is done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # A polling client that is between two requests when its session ends learns of it by the next one.

    def keep_farewell(self, sid: str, payload: str) -> None:
        self._farewells[sid] = payload
        asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT, self._farewells.pop, sid, None)

    def take_farewell(self, sid: str) -> str | None:
        return self._farewells.pop(sid, None)

    # What python-socketio calls

    def _get_socket(self, sid: str) -> Session:
        """A session, also one that is ending: what runs for it still may use it until its end has been handled."""
        return self.sockets[sid]

    async def send(self, sid: str, data: str | bytes) -> None:
        session = self.sockets.get(sid)
        if session is not None:
            session.send(data)

    async def send_packet(self, sid: str, pkt: engineio.packet.Packet) -> None:
        await self.send(sid, pkt.data)

    async def disconnect(self, sid: str | None = None) -> None:
        """Ends one session, or all of them."""
        sessions = list(self.sockets.values()) if sid is None else [self.sockets[sid]] if sid in self.sockets else []
        for session in sessions:
            await session.close(self.reason.SERVER_DISCONNECT)
