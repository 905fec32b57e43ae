"""The polling transport of Engine.IO: its HTTP requests, served by Tornado."""

from typing import Any

from tornado.http1connection import HTTP1Connection
from tornado.web import HTTPError, RequestHandler

from lesson_server.log import EventLogger
from lesson_server.protocol.engine import Engine
from lesson_server.protocol.engine_packets import ProtocolError, RequestRefused, decode_payload
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.http_server import ClientStream
from lesson_server.protocol.places import Place

logger = EventLogger(__name__)


class PollingHandler(RequestHandler):
    """One HTTP request of Engine.IO: a polling GET or POST, or a CORS preflight."""

    _socket: EngineSocket | None = None

    def initialize(self, engine: Engine) -> None:
        self._engine = engine

    def prepare(self) -> None:
        origin = self.request.headers.get("Origin")
        if origin is None:
            return  # not a browser
        if self._engine.allows(origin, self.request.headers.get("Host", "")):
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Allow-Credentials", "true")  # for a load balancer's sticky-session cookie
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
                for packet in decode_payload(self.request.body):
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
        """Return the last value of each query parameter.

        Tornado's ``get_query_argument`` would clean each value with a regular expression.
        """
        return {name: values[-1].decode("latin-1") for name, values in self.request.query_arguments.items()}

    async def _poll(self, socket: EngineSocket) -> str:
        """Wait for packets to send; meanwhile, no new connection can evict this connection.

        Raises:
            RequestRefused: another poll is pending. The Engine.IO socket ends, as in the protocol.
        """
        assert socket.polling is not None  # a client that has begun with a websocket never polls
        self._place.keep()
        try:
            return await socket.polling.poll(self)
        except ProtocolError as error:
            socket.drop(str(error))
            raise RequestRefused(3, "Bad request") from None
        finally:
            self._place.allow_eviction()

    @property
    def _place(self) -> Place:
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)
        assert isinstance(connection.stream, ClientStream)
        return connection.stream.place

    def _answer(self, payload: str) -> None:
        """Send a payload, without waiting until the client has read it.

        A waiting caller would hold the payload in memory a second time.
        """
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
        # Tornado's own log line would contain the URL, and with the URL any client input.
        if not isinstance(value, HTTPError):
            logger.exception("request_failed", "{method} request failed", value, method=self.request.method)

    def on_connection_close(self) -> None:
        """End the Engine.IO socket of a client that disconnected while its poll was pending."""
        if self._socket is not None:
            self._socket.lost(self)
