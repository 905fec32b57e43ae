"""The base of handlers that answer in JSON."""

import socket
from typing import Any

import orjson
from tornado.web import HTTPError, RequestHandler

from lesson_server.errors import StoreUnavailable
from lesson_server.http.access import Access
from lesson_server.log import EventLogger

logger = EventLogger(__name__)

# Bytes of a response for which the send buffer of a connection is large enough, and a buffer for larger responses. The
# acceptor makes the buffers small, because clients get acknowledgements: a megabyte would take 0.3 s.
SMALL_RESPONSE = 16 * 1024
LARGE_SEND_BUFFER = 512 * 1024

SENTENCES = {
    400: "the request is malformed",
    401: "the request needs the admin token",
    403: "the request comes from another origin",
    404: "there is no such resource",
    405: "the method is not allowed here",
    429: "too many failed tries, try again in a minute",
    500: "internal error",
    503: "Redis is unavailable, try again",
}


class ApiError(HTTPError):
    """An error with a sentence of its own.

    Args:
        status: the status code.
        sentence: one plain sentence without any client input.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status)
        self.sentence = sentence


class ApiHandler(RequestHandler):
    """Answers in JSON, also with errors: ``{"error": "<one plain sentence>"}``."""

    def initialize(self, access: Access, **_: Any) -> None:
        self.access = access

    async def prepare(self) -> None:
        await self.access.require(self)

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")

    def answer(self, data: object) -> None:
        """Finish the response with data as JSON."""
        body = orjson.dumps(data)
        if len(body) > SMALL_RESPONSE:
            self._enlarge_send_buffer()
        self.finish(body)

    def _enlarge_send_buffer(self) -> None:
        stream = self.request.connection.stream  # type: ignore[union-attr]
        if stream.socket is not None:  # the client may have disconnected
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGE_SEND_BUFFER)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        if isinstance(error, StoreUnavailable):
            status_code = 503
            self.set_status(503)
        if status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if status_code == 429:
            self.set_header("Retry-After", "60")
        if status_code == 405:
            self.set_header("Allow", ", ".join(self._methods()))
        # The message of an HTTPError of Tornado would contain client input.
        sentence = error.sentence if isinstance(error, ApiError) else None
        self.answer({"error": sentence or SENTENCES.get(status_code, "the request failed")})

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        # A part of the path that is not UTF-8 names nothing that there is: 404. Tornado would answer 400, and would do
        # so before it is known whether the request has access.
        return value.decode("utf-8", "replace") if name is None else super().decode_argument(value, name)

    def _methods(self) -> list[str]:
        unimplemented = RequestHandler._unimplemented_method
        return [name for name in self.SUPPORTED_METHODS if getattr(type(self), name.lower()) is not unimplemented]

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        # Tornado's own log line would contain the URL, and with the URL any client input.
        if not isinstance(value, HTTPError | StoreUnavailable):
            logger.exception("request_failed", "{method} request failed", value, method=self.request.method)


class ApiNotFoundHandler(ApiHandler):
    """Answers any other path of the API."""

    async def prepare(self) -> None:
        await super().prepare()
        raise HTTPError(404)
