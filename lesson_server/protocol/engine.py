"""Engine.IO 4, as we run it: what is refused is closed, and nothing that a client sends is believed.

python-engineio keeps the sessions and the ids; its Tornado driver is not used. That one trusts what arrives, buffers
without limit in both directions, compresses each connection (229 kB of memory instead of 42), and leaves the sockets of
refused clients open for ever. Polling is served here, by Tornado; websockets are served by websocket.py.
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
from lesson_server.protocol import sessions
from lesson_server.protocol.http_server import MAX_HEADER_LINES, MAX_PARAMETERS, MAX_URL_SIZE, ClientStream
from lesson_server.protocol.places import Place, Places
from lesson_server.protocol.sessions import OPEN, ProtocolError, RequestRefused, Session
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.worker import Worker

logger = logging.getLogger(__name__)

# Bytes of an id, a multiple of 3 for base64; how many ids are drawn at once.
ID_BYTES = 15
IDS_AT_ONCE = 256
PATHS = ("/socket.io/", "/socket.io")


class EngineHandler(RequestHandler):
    """One HTTP request of Engine.IO: a polling GET or POST, or a preflight."""

    _session: Session | None = None

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
            farewell = self._engine.take_farewell(query.get("sid", ""))
            if farewell is not None:
                self._answer(farewell)
                return
            session = self._engine.find_session(query, "polling")
            if session is None:
                session = self._engine.open("polling")
            elif session.upgraded:
                raise RequestRefused(3, "Bad request")
            self._session = session
            self._answer(await self._poll(session))
        except RequestRefused as refusal:
            self._refuse(refusal)

    def post(self) -> None:
        try:
            session = self._engine.find_session(self._query(), "polling")
            if session is None:
                raise RequestRefused(2, "Bad handshake method")
            if session.upgraded:
                raise RequestRefused(3, "Bad request")
            try:
                for packet in session.receive_post(self.request.body):
                    session.receive(packet)
            except ProtocolError as error:
                session.drop(str(error))
                raise RequestRefused(3, "Bad request") from None
            self._answer("ok")
        except RequestRefused as refusal:
            self._refuse(refusal)

    def options(self) -> None:
        self.set_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        self.set_header("Access-Control-Allow-Headers", "Content-Type")
        self.set_status(204)

    def _query(self) -> dict[str, str]:
        """The last value of each parameter. Tornado's own way cleans each value by a regular expression."""
        return {name: values[-1].decode("latin-1") for name, values in self.request.query_arguments.items()}

    async def _poll(self, session: Session) -> str:
        """Waits for what is to be sent. Meanwhile the socket carries the session, and gives way to no other."""
        self._place.keep()
        try:
            return await session.poll(self)
        finally:
            self._place.release()

    @property
    def _place(self) -> Place:
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)
        assert isinstance(connection.stream, ClientStream)
        return connection.stream.place

    def _answer(self, payload: str) -> None:
        """Sends a payload. Nobody waits until the client has read it, and would hold it a second time."""
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
        """The client has gone while its request waited."""
        if self._session is not None:
            self._session.lost(self)


class Engine(engineio.AsyncServer):  # type: ignore[misc]
    """The Engine.IO server that python-socketio drives. Its sessions begin with a polling request or a websocket.

    Args:
        session_places: one for each session.
        allowed_origins: what ``Origin`` browsers may send besides the server's own; ``*`` allows all.
        worker: which of several workers this is; None for a server alone.
        kwargs: what python-socketio passes on to every Engine.IO server.
    """

    sockets: dict[str, Session]

    def __init__(
        self,
        *,
        session_places: Places,
        allowed_origins: tuple[str, ...] = (),
        worker: Worker | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(async_mode="tornado", **kwargs)
        self._session_places = session_places
        self._allowed_origins = frozenset(allowed_origins)
        self._farewells: dict[str, list[str]] = {}
        self._takes_newcomers = True
        self._worker = worker
        self._ids: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.websockets: set[Websocket] = set()

    def refuse_newcomers(self) -> None:
        """From now on no session begins; those that are here go on."""
        self._takes_newcomers = False

    def allows(self, origin: str, host: str) -> bool:
        """Whether a page of that origin may connect to this host."""
        authority = origin.lower().partition("://")[2]
        same = authority == host.lower() and authority != ""  # of the origin "null" nothing is left
        return same or "*" in self._allowed_origins or origin.lower() in self._allowed_origins

    def find_session(self, query: Mapping[str, str], transport: str) -> Session | None:
        """The session that a request names; None when it asks for a new one.

        Raises:
            RequestRefused: there is none of that name, or a new one can't begin.
        """
        if query.get("transport") != transport or transport not in self.transports:
            raise RequestRefused(0, "Transport unknown")
        if query.get("EIO") != "4":
            raise RequestRefused(5, "Unsupported protocol version")
        sid = query.get("sid")
        if not sid:
            if not self._takes_newcomers:  # the server is about to stop; another one will take the client
                raise RequestRefused(3, str(ServiceBusy()), 503)
            return None
        session = self.sockets.get(sid)
        if session is None or session.closed:
            raise RequestRefused(1, "Session ID unknown")
        return session

    def accept(self, websocket: Websocket, request: WSUpgradeRequest) -> Session:
        """Gives a websocket the session that its handshake asks for: a new one, or one that is to be upgraded.

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
        session = self.find_session(parameters, "websocket")
        if session is None:
            session = self.open("websocket")
            session.attach(websocket)
        elif session.upgraded or session.upgrading:
            raise RequestRefused(3, "Bad request")
        else:
            session.begin_upgrade(websocket)
        return session

    def generate_id(self) -> str:
        """An id of 15 random bytes, of Engine.IO or Socket.IO. They are drawn many at a time: a system call for each id
        is up to a twentieth of a class start."""
        if not self._ids:
            text = base64.urlsafe_b64encode(secrets.token_bytes(IDS_AT_ONCE * ID_BYTES)).decode()
            size = len(text) // IDS_AT_ONCE
            self._ids = [text[start : start + size] for start in range(0, len(text), size)]
        return self._ids.pop()

    def open(self, transport: str) -> Session:
        """Begins a session; its OPEN packet waits for the first poll, or for a websocket.

        Raises:
            RequestRefused: there is no place for one more.
        """
        try:
            sid = self.generate_id() if self._worker is None else self._worker.sid(self.generate_id())
            session = Session(self, sid, self._session_places)
        except ServiceBusy as busy:
            raise RequestRefused(3, str(busy), 503) from None
        self.sockets[session.sid] = session
        self.handlers["connect"](session.sid, {})  # what WSGI would tell of the request; no handler asks for it
        opening = {
            "sid": session.sid,
            "upgrades": ["websocket"] if transport == "polling" and "websocket" in self.transports else [],
            "pingInterval": sessions.PING_INTERVAL * 1000,
            "pingTimeout": sessions.PING_TIMEOUT * 1000,
            "maxPayload": sessions.MAX_MESSAGE_SIZE,
        }
        session._write(OPEN + orjson.dumps(opening).decode())
        return session

    def on_message(self, session: Session, data: str) -> None:
        """Hands a message to python-socketio."""
        self.handlers["message"](session.sid, data)

    async def on_close(self, session: Session, reason: str) -> None:
        """Tells python-socketio, and through it the application, that a session has ended."""
        try:
            await self.handlers["disconnect"](session.sid, reason)
        finally:
            del self.sockets[session.sid]

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Runs ``work`` beside the caller, and keeps it from being collected before it is done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # A polling client that is between two requests when its session ends learns of it by the next one.

    def keep_farewell(self, sid: str, payloads: list[str]) -> None:
        if payloads:
            self._farewells[sid] = payloads
            asyncio.get_running_loop().call_later(sessions.HANDSHAKE_TIMEOUT, self._farewells.pop, sid)

    def take_farewell(self, sid: str) -> str | None:
        payloads = self._farewells.get(sid)
        return payloads.pop(0) if payloads else None

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
        await asyncio.gather(*(session.close(self.reason.SERVER_DISCONNECT) for session in sessions))

    async def abort(self) -> None:
        """Closes the websockets whose clients have not answered the close frame."""
        while self.websockets:
            for websocket in list(self.websockets):
                websocket.abort()
            await asyncio.sleep(0)
