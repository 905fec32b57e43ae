"""Tornado's HTTP server with limits on all that a client may send, delay, or leave unread.

Tornado keeps the parsed head while a request waits for its body or its response: 16 kB of tiny headers or URL
parameters are megabytes of objects. Tornado also waits without limit for a client to read a response.
"""

import asyncio
import socket
from collections.abc import Awaitable
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream
from tornado.web import Application, HTTPError, RequestHandler

from lesson_server.log import EventLogger
from lesson_server.protocol import limits
from lesson_server.protocol.limits import (
    MAX_HEAD_SIZE,
    MAX_HEADER_LINES,
    MAX_MESSAGE_SIZE,
    MAX_PARAMETERS,
    MAX_URL_SIZE,
)
from lesson_server.protocol.places import Place

logger = EventLogger(__name__)

# Bytes per read, and bytes buffered per connection: input that a client sends before it has the response.
READ_CHUNK_SIZE = 2 * 1024
READ_BUFFER_SIZE = MAX_MESSAGE_SIZE
# The address of a client that has just disconnected.
NO_ADDRESS = ("", 0)


class ClientStream(IOStream):
    """An HTTP connection of a client, closed if the client does not read a response in time.

    Args:
        connection: the accepted socket.
        place: the place of the connection, until the connection closes.
    """

    def __init__(self, connection: socket.socket, place: Place) -> None:
        super().__init__(connection, max_buffer_size=READ_BUFFER_SIZE, read_chunk_size=READ_CHUNK_SIZE)
        self.place = place
        place.transfer(self.close)

    def write(self, data: bytes | memoryview) -> "asyncio.Future[None]":
        written = super().write(data)
        if not written.done():
            deadline = asyncio.get_running_loop().call_later(limits.HANDSHAKE_TIMEOUT, self.close)
            written.add_done_callback(lambda _: deadline.cancel())
        return written

    def close(self, exc_info: Any = False) -> None:
        super().close(exc_info)
        self.place.free()


class _BoundedRequest(HTTPMessageDelegate):
    """Refuses a request whose head is too large to parse and keep, or that Tornado can't parse."""

    def __init__(self, request: HTTPMessageDelegate) -> None:
        self._request = request
        self.data_received = request.data_received  # type: ignore[method-assign]
        self.finish = request.finish  # type: ignore[method-assign]
        self.on_connection_close = request.on_connection_close  # type: ignore[method-assign]

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        assert isinstance(start_line, RequestStartLine)
        url = start_line.path
        if len(url) > MAX_URL_SIZE or url.count("&") >= MAX_PARAMETERS:
            raise HTTPInputError("URL too large")
        if sum(1 for _ in headers.get_all()) > MAX_HEADER_LINES:
            raise HTTPInputError("too many header lines")
        try:
            return self._request.headers_received(start_line, headers)
        except Exception:  # any error of the parser; Tornado would log it with the client's bytes
            raise HTTPInputError("malformed head") from None


class ClientServer(HTTPServer):
    """The HTTP server for clients, with limits on what Tornado parses."""

    def serve(self, connection: socket.socket, place: Place) -> None:
        """Serve HTTP on an accepted connection."""
        try:
            address = connection.getpeername()
        except OSError:  # the client has just disconnected
            address = NO_ADDRESS
        self.handle_stream(ClientStream(connection, place), address)

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        return _BoundedRequest(super().start_request(server_conn, request_conn))


def make_http_server(application: Application) -> ClientServer:
    """Return an HTTP server for streams of :class:`ClientStream`."""
    return ClientServer(
        application,
        no_keep_alive=True,  # the first request of a connection selects its server; see acceptor.py
        max_header_size=MAX_HEAD_SIZE,
        max_body_size=MAX_MESSAGE_SIZE,
        # For a client that sends nothing, or one byte at a time. Node's default for the first case is 5 s.
        idle_connection_timeout=limits.HANDSHAKE_TIMEOUT,
        body_timeout=limits.HANDSHAKE_TIMEOUT,
    )


class PlainHandler(RequestHandler):
    """Responds in plain text, also with errors."""

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.finish(f"{status_code} {self._reason}\n")

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        # Tornado's own log line would contain the URL, and with the URL any client input.
        if not isinstance(value, HTTPError):
            logger.exception("request_failed", "{method} request failed", value, method=self.request.method)


class NotFoundHandler(PlainHandler):
    """Responds to any other path with 404."""

    def prepare(self) -> None:
        raise HTTPError(404)
