"""Engine.IO 4: what is refused is closed, and nothing that a client sends is trusted.

python-engineio keeps the sockets by their ids; its Tornado driver is not used. That driver trusts what arrives, buffers
without limit in both directions, compresses each connection (229 kB of memory instead of 42), and leaves the
connections of refused clients open for ever. Polling is served here, by Tornado; websockets are served by websocket.py.
"""

import asyncio
import base64
import logging
import secrets
from collections.abc import Coroutine, Mapping
from typing import Any
from urllib.parse import parse_qsl

import engineio
import orjson
from picows import WSUpgradeRequest
from tornado.http1connection import HTTP1Connection
from tornado.web import HTTPError, RequestHandler

from lesson_server.errors import ServiceBusy
from lesson_server.protocol import engine_socket
from lesson_server.protocol.engine_socket import OPEN, EngineSocket, ProtocolError, RequestRefused
from lesson_server.protocol.http_server import MAX_HEADER_LINES, MAX_PARAMETERS, MAX_URL_SIZE, ClientStream
from lesson_server.protocol.places import Place, Places
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.worker import Worker

logger = logging.getLogger(__name__)

# Bytes of an id, a multiple of 3 for base64; how many ids are drawn at once.
ID_BYTES = 15
IDS_AT_ONCE = 256
# Seconds between two looks at the websockets that are closing.
CLOSE_INTERVAL = 0.01
PATHS = ("/socket.io/", "/socket.io")


class EngineHandler(RequestHandler):
    """One HTTP request of Engine.IO: a polling GET or POST, or a preflight."""

    _socket: EngineSocket | None = None

    def initialize(self, engine: "Engine") -> None:
        self._engine = engine

    def prepare(self) -> None:
        origin = self.request.headers.get("Origin")
        if origin is None:
            return  # not a browser
        if self._engine.allows(origin, self.request.headers.get("Host", "")):
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Allow-Credentials", "true")  # sticky-session cookies of a load balancer
            self.set_header("Vary", "Origin")
        else:
            self._refuse(RequestRefused(4, "origin not allowed", 403))

    # Polling

    async def get(self, *args: str, **kwargs: str) -> None:
        try:
            query = self._query()
            final_payload = self._engine.take_final_payload(query.get("sid", ""))
            if final_payload is not None:
                self._answer(final_payload)
                return
            socket = self._engine.find_socket(query, "polling")
            if socket is None:
                socket = self._engine.open("polling")
            elif socket.upgraded:
                raise RequestRefused(3, "Bad request")
            self._socket = socket
            self._answer(await self._poll(socket))
        except RequestRefused as refusal:
            self._refuse(refusal)

    def post(self) -> None:
        try:
            socket = self._engine.find_socket(self._query(), "polling")
            if socket is None:
                raise RequestRefused(2, "Bad handshake method")
            if socket.upgraded:
                raise RequestRefused(3, "Bad request")
            try:
                for packet in socket.receive_post(self.request.body):
                    socket.receive(packet)
            except ProtocolError as error:
                socket.drop(str(error))
                raise RequestRefused(3, "Bad request") from None
            self._answer("ok")
        except RequestRefused as refusal:
            self._refuse(refusal)

    def options(self) -> None:
        self.set_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        self.set_header("Access-Control-Allow-Headers", "Content-Type")
        self.set_status(204)

    def _query(self) -> dict[str, str]:
        """Return the last value of each parameter. Tornado's own way cleans each value by a regular expression."""
        return {name: values[-1].decode("latin-1") for name, values in self.request.query_arguments.items()}

    async def _poll(self, socket: EngineSocket) -> str:
        """Wait for what is to be sent. Meanwhile no new connection gets the place of this one."""
        self._place.keep()
        try:
            return await socket.poll(self)
        finally:
            self._place.release()

    @property
    def _place(self) -> Place:
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)
        assert isinstance(connection.stream, ClientStream)
        return connection.stream.place

    def _answer(self, payload: str) -> None:
        """Send a payload. Nobody waits until the client has read it, and would hold it a second time."""
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(payload)

    def _refuse(self, refusal: RequestRefused) -> None:
        self.set_status(refusal.status)
        self.set_header("Content-Type", "application/json")
        self.finish(refusal.body)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self._refuse(RequestRefused(3, "Bad request", status_code))

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        # Tornado's own line would hold the URL, and with it whatever a client put there.
        if not isinstance(value, HTTPError):
            logger.error("%s request failed", self.request.method, exc_info=value)

    def on_connection_close(self) -> None:
        """End the Engine.IO socket of a client that has gone while its request waited."""
        if self._socket is not None:
            self._socket.lost(self)


class Engine(engineio.AsyncServer):  # type: ignore[misc]
    """The Engine.IO server of python-socketio. Its sockets begin with a polling request or a websocket.

    Args:
        socket_places: one for each Engine.IO socket.
        allowed_origins: what ``Origin`` browsers may send besides the server's own; ``*`` allows all.
        worker: which of several workers this is; None for a server alone.
        kwargs: what python-socketio passes on to every Engine.IO server.
    """

    sockets: dict[str, EngineSocket]

    def __init__(
        self,
        *,
        socket_places: Places,
        allowed_origins: tuple[str, ...] = (),
        worker: Worker | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(async_mode="tornado", **kwargs)
        self._socket_places = socket_places
        self._allowed_origins = frozenset(allowed_origins)
        self._final_payloads: dict[str, list[str]] = {}
        self._takes_new_clients = True
        self._worker = worker
        self._ids: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.websockets: set[Websocket] = set()

    def refuse_new_clients(self) -> None:
        """Open no Engine.IO socket any more. Those that are open stay open."""
        self._takes_new_clients = False

    def allows(self, origin: str, host: str) -> bool:
        """Return whether a page of that origin may connect to this host."""
        authority = origin.lower().partition("://")[2]
        same = authority == host.lower() and authority != ""  # of the origin "null" nothing is left
        return same or "*" in self._allowed_origins or origin.lower() in self._allowed_origins

    def find_socket(self, query: Mapping[str, str], transport: str) -> EngineSocket | None:
        """Return the Engine.IO socket that a request names; None when it asks for a new one.

        Raises:
            RequestRefused: there is none of that name, or a new one can't begin.
        """
        if query.get("transport") != transport or transport not in self.transports:
            raise RequestRefused(0, "Transport unknown")
        if query.get("EIO") != "4":
            raise RequestRefused(5, "Unsupported protocol version")
        sid = query.get("sid")
        if not sid:
            if not self._takes_new_clients:  # the server is about to stop; another one will take the client
                raise RequestRefused(3, str(ServiceBusy()), 503)
            return None
        socket = self.sockets.get(sid)
        if socket is None or socket.closed:
            raise RequestRefused(1, "Session ID unknown")
        return socket

    def accept(self, websocket: Websocket, request: WSUpgradeRequest) -> EngineSocket:
        """Give a websocket the Engine.IO socket that its handshake asks for: a new one, or one that is to be upgraded.

        Raises:
            RequestRefused: it gets none.
        """
        path, _, query = request.path.decode("latin-1").partition("?")
        if path not in PATHS:
            raise RequestRefused(3, "Not found", 404)
        if len(request.path) > MAX_URL_SIZE or len(request.headers) > MAX_HEADER_LINES:
            raise RequestRefused(3, "Bad request")
        origin = request.headers.get("Origin")
        if origin is not None and not self.allows(origin, request.headers.get("Host", "")):
            raise RequestRefused(4, "origin not allowed", 403)
        try:
            parameters = dict(parse_qsl(query, encoding="latin-1", max_num_fields=MAX_PARAMETERS))
        except ValueError:
            raise RequestRefused(3, "Bad request") from None
        socket = self.find_socket(parameters, "websocket")
        if socket is None:
            socket = self.open("websocket")
            socket.attach(websocket)
        elif socket.upgraded or socket.upgrading:
            raise RequestRefused(3, "Bad request")
        else:
            socket.begin_upgrade(websocket)
        return socket

    def generate_id(self) -> str:
        """Return an id of 15 random bytes, of Engine.IO or Socket.IO.

        They are drawn many at a time: a system call for each id is up to a twentieth of a class start.
        """
        if not self._ids:
            text = base64.urlsafe_b64encode(secrets.token_bytes(IDS_AT_ONCE * ID_BYTES)).decode()
            size = len(text) // IDS_AT_ONCE
            self._ids = [text[start : start + size] for start in range(0, len(text), size)]
        return self._ids.pop()

    def open(self, transport: str) -> EngineSocket:
        """Open an Engine.IO socket. Its OPEN packet waits for the first poll, or for a websocket.

        Raises:
            RequestRefused: there is no place for one more.
        """
        try:
            sid = self.generate_id() if self._worker is None else self._worker.sid(self.generate_id())
            socket = EngineSocket(self, sid, self._socket_places)
        except ServiceBusy as busy:
            raise RequestRefused(3, str(busy), 503) from None
        self.sockets[socket.sid] = socket
        self.handlers["connect"](socket.sid, {})  # what WSGI would tell of the request; no handler asks for it
        opening = {
            "sid": socket.sid,
            "upgrades": ["websocket"] if transport == "polling" and "websocket" in self.transports else [],
            "pingInterval": engine_socket.PING_INTERVAL * 1000,
            "pingTimeout": engine_socket.PING_TIMEOUT * 1000,
            "maxPayload": engine_socket.MAX_MESSAGE_SIZE,
        }
        socket.write(OPEN + orjson.dumps(opening).decode())
        return socket

    def on_message(self, socket: EngineSocket, data: str) -> None:
        """Hand a message to python-socketio."""
        self.handlers["message"](socket.sid, data)

    async def on_close(self, socket: EngineSocket, reason: str) -> None:
        """Tell python-socketio, and through it the application, that an Engine.IO socket has ended."""
        try:
            await self.handlers["disconnect"](socket.sid, reason)
        finally:
            del self.sockets[socket.sid]

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run ``work`` beside the caller, and keep it from being collected before it is done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # A polling client that is between two requests when its socket ends gets the final payload by the next request.

    def keep_final_payloads(self, sid: str, payloads: list[str]) -> None:
        if payloads:
            self._final_payloads[sid] = payloads
            asyncio.get_running_loop().call_later(engine_socket.HANDSHAKE_TIMEOUT, self._final_payloads.pop, sid)

    def take_final_payload(self, sid: str) -> str | None:
        payloads = self._final_payloads.get(sid)
        return payloads.pop(0) if payloads else None

    # What python-socketio calls

    def _get_socket(self, sid: str) -> EngineSocket:
        """Return a socket, also one that is ending: what runs for it may use it until its end has been handled."""
        return self.sockets[sid]

    async def send(self, sid: str, data: str | bytes) -> None:
        socket = self.sockets.get(sid)
        if socket is not None:
            socket.send(data)

    async def send_packet(self, sid: str, pkt: engineio.packet.Packet) -> None:
        await self.send(sid, pkt.data)

    async def disconnect(self, sid: str | None = None) -> None:
        """End one Engine.IO socket, or all of them."""
        sockets = list(self.sockets.values()) if sid is None else [self.sockets[sid]] if sid in self.sockets else []
        await asyncio.gather(*(socket.close(self.reason.SERVER_DISCONNECT) for socket in sockets))

    async def wait_closed(self, seconds: float) -> None:
        """Wait, so many seconds at most, until the clients have answered the close frames."""
        end = asyncio.get_running_loop().time() + seconds
        while self.websockets and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 (only at a stop)
            await asyncio.sleep(CLOSE_INTERVAL)

    async def abort(self) -> None:
        """Close the websockets whose clients have not answered the close frame."""
        while self.websockets:
            for websocket in list(self.websockets):
                websocket.abort()
            await asyncio.sleep(0)
