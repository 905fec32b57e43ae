"""Engine.IO 4: all input from clients is validated, and the connections of refused clients are closed.

python-engineio keeps the Engine.IO sockets by id. Its Tornado driver is not used: that driver does not validate input,
buffers without limit in both directions, compresses each connection (229 kB of memory instead of 42), and never closes
the connections of refused clients. polling.py serves polling, with Tornado; websocket.py serves websockets.
"""

import asyncio
import base64
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl

import engineio
import orjson
from picows import WSUpgradeRequest

from lesson_server.errors import ServiceBusy
from lesson_server.protocol import engine_socket, limits
from lesson_server.protocol.engine_packets import MESSAGE, OPEN, RequestRefused
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.limits import MAX_HEADER_LINES, MAX_PARAMETERS, MAX_URL_SIZE
from lesson_server.protocol.places import Places
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.worker import Worker

# Random bytes per id, a multiple of 3 so that base64 needs no padding; ids generated per system call.
ID_BYTES = 15
IDS_AT_ONCE = 256
# Seconds between two checks of whether the websockets have closed.
CLOSE_INTERVAL = 0.01
PATHS = ("/socket.io/", "/socket.io")


class Engine(engineio.AsyncServer):  # type: ignore[misc]
    """The Engine.IO server of python-socketio.

    A polling request or a websocket handshake opens an Engine.IO socket.

    Args:
        socket_places: one for each Engine.IO socket.
        allowed_origins: values of ``Origin`` that are allowed besides the server's own; ``*`` allows all.
        worker: this worker, if there are several; None for a single process.
        observe_drop: called with the reason for each client that is dropped.
        kwargs: the options that python-socketio passes to every Engine.IO server.
    """

    sockets: dict[str, EngineSocket]

    def __init__(
        self,
        *,
        socket_places: Places,
        allowed_origins: tuple[str, ...] = (),
        worker: Worker | None = None,
        observe_drop: Callable[[str], None] = lambda why: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(async_mode="tornado", **kwargs)
        self._socket_places = socket_places
        self._allowed_origins = frozenset(allowed_origins)
        self._final_payloads: dict[str, list[str]] = {}
        self._takes_new_clients = True
        self._worker = worker
        self.observe_drop = observe_drop
        self._ids: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.websockets: set[Websocket] = set()

    def refuse_new_clients(self) -> None:
        """Stop opening Engine.IO sockets; the open sockets stay open."""
        self._takes_new_clients = False

    def allows(self, origin: str, host: str) -> bool:
        """Return whether a page of that origin may connect to this host."""
        authority = origin.lower().partition("://")[2]
        same = authority == host.lower() and authority != ""  # the origin "null" has no authority
        return same or "*" in self._allowed_origins or origin.lower() in self._allowed_origins

    def find_socket(self, query: Mapping[str, str], transport: str) -> EngineSocket | None:
        """Return the Engine.IO socket that a request names; None when the request asks for a new socket.

        Raises:
            RequestRefused: the parameters are wrong, the ``sid`` is unknown, or the server opens no new socket.
        """
        if query.get("transport") != transport or transport not in self.transports:
            raise RequestRefused(0, "Transport unknown")
        if query.get("EIO") != "4":
            raise RequestRefused(5, "Unsupported protocol version")
        sid = query.get("sid")
        if not sid:
            if not self._takes_new_clients:  # the server is about to stop; another server will accept the client
                raise RequestRefused(3, str(ServiceBusy()), 503)
            return None
        socket = self.sockets.get(sid)
        if socket is None or socket.closed:
            raise RequestRefused(1, "Session ID unknown")
        return socket

    def accept(self, websocket: Websocket, request: WSUpgradeRequest) -> EngineSocket:
        """Open the Engine.IO socket that a websocket handshake asks for, or begin the upgrade of an open one.

        Raises:
            RequestRefused: the handshake is refused.
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
        """Return an Engine.IO or Socket.IO id of 15 random bytes.

        Ids are generated in batches: one system call per id takes up to a twentieth of the time of a class start.
        """
        if not self._ids:
            text = base64.urlsafe_b64encode(secrets.token_bytes(IDS_AT_ONCE * ID_BYTES)).decode()
            size = len(text) // IDS_AT_ONCE
            self._ids = [text[start : start + size] for start in range(0, len(text), size)]
        return self._ids.pop()

    def open(self, transport: str) -> EngineSocket:
        """Open an Engine.IO socket, and queue its OPEN packet for the first poll or the websocket.

        Raises:
            RequestRefused: all places are kept.
        """
        try:
            sid = self.generate_id() if self._worker is None else self._worker.sid(self.generate_id())
            socket = EngineSocket(self, sid, self._socket_places, transport)
        except ServiceBusy as busy:
            raise RequestRefused(3, str(busy), 503) from None
        self.sockets[socket.sid] = socket
        self.handlers["connect"](socket.sid, {})  # an empty WSGI environ: no handler reads it
        opening = {
            "sid": socket.sid,
            "upgrades": ["websocket"] if transport == "polling" and "websocket" in self.transports else [],
            "pingInterval": engine_socket.PING_INTERVAL * 1000,
            "pingTimeout": engine_socket.PING_TIMEOUT * 1000,
            "maxPayload": limits.MAX_MESSAGE_SIZE,
        }
        socket.write(OPEN + orjson.dumps(opening).decode())
        return socket

    def on_message(self, socket: EngineSocket, data: str) -> None:
        """Pass a message to python-socketio."""
        self.handlers["message"](socket.sid, data)

    async def on_close(self, socket: EngineSocket, reason: str) -> None:
        """Notify python-socketio, and through python-socketio the application, that an Engine.IO socket has ended."""
        try:
            await self.handlers["disconnect"](socket.sid, reason)
        finally:
            del self.sockets[socket.sid]

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run ``work`` as a task, and reference the task so that it is not garbage-collected before it is done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # If no poll is pending when the socket of a polling client ends, the client's next poll gets the final payload.

    def keep_final_payloads(self, sid: str, payloads: list[str]) -> None:
        if payloads:
            self._final_payloads[sid] = payloads
            asyncio.get_running_loop().call_later(limits.HANDSHAKE_TIMEOUT, self._final_payloads.pop, sid)

    def take_final_payload(self, sid: str) -> str | None:
        payloads = self._final_payloads.get(sid)
        return payloads.pop(0) if payloads else None

    # What python-socketio calls

    def _get_socket(self, sid: str) -> EngineSocket:
        """Return an Engine.IO socket, even one that is ending.

        Running handlers may use the socket until its end has been handled.
        """
        return self.sockets[sid]

    async def send(self, sid: str, data: str | bytes) -> None:
        socket = self.sockets.get(sid)
        if socket is not None:
            socket.send(data)

    def broadcast(self, sids: Iterable[str], message: str | bytes) -> None:
        """Send a message to several Engine.IO sockets."""
        packet = MESSAGE + message if isinstance(message, str) else message
        for sid in sids:
            socket = self.sockets.get(sid)
            if socket is not None:
                socket.send_packet(packet)

    async def send_packet(self, sid: str, pkt: engineio.packet.Packet) -> None:
        await self.send(sid, pkt.data)

    async def disconnect(self, sid: str | None = None) -> None:
        """End one Engine.IO socket, or all sockets."""
        sockets = list(self.sockets.values()) if sid is None else [self.sockets[sid]] if sid in self.sockets else []
        await asyncio.gather(*(socket.close(self.reason.SERVER_DISCONNECT) for socket in sockets))

    async def wait_closed(self, seconds: float) -> None:
        """Wait at most ``seconds`` until the clients have answered the close frames."""
        end = asyncio.get_running_loop().time() + seconds
        while self.websockets and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 (only at a stop)
            await asyncio.sleep(CLOSE_INTERVAL)

    async def abort(self) -> None:
        """Close the websockets whose clients have not answered the close frame."""
        while self.websockets:
            for websocket in list(self.websockets):
                websocket.abort()
            await asyncio.sleep(0)
