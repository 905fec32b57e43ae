"""The base of handlers that answer with HTML pages."""

from http import HTTPStatus
from importlib.resources import files
from typing import Any

from tornado.template import Loader
from tornado.web import HTTPError, RequestHandler

from lesson_server.errors import StoreUnavailable
from lesson_server.http.access import Access, Unauthorized
from lesson_server.http.api import SENTENCES, ApiError
from lesson_server.log import EventLogger

logger = EventLogger(__name__)

PACKAGE = files("lesson_server").joinpath("http")
# No script, style, picture or connection from anywhere else, and none in the page itself.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send "Origin: null" with the forms of the login
    "X-Content-Type-Options": "nosniff",
}
LOGIN_PATH = "/console/login"


class PageHandler(RequestHandler):
    """Answers with HTML; without a session, it leads to the login."""

    loader = Loader(str(PACKAGE.joinpath("templates")))

    def initialize(self, access: Access, **_: Any) -> None:
        self.access = access

    async def prepare(self) -> None:
        try:
            await self.access.require(self)
        except Unauthorized:
            self.redirect(LOGIN_PATH, status=HTTPStatus.SEE_OTHER)

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def show(self, template: str, **values: object) -> None:
        """Finish the response with a page."""
        self.finish(self.loader.load(template).generate(try_is_on=self.access.is_open, **values))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        if isinstance(error, StoreUnavailable):
            status_code = 503
            self.set_status(503)
        # The message of an HTTPError of Tornado would contain client input.
        sentence = error.sentence if isinstance(error, ApiError) else None
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(f"{status_code}: {sentence or SENTENCES.get(status_code, 'the request failed')}\n")

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        # Tornado's own log line would contain the URL, and with the URL any client input.
        if not isinstance(value, HTTPError | StoreUnavailable):
            logger.exception("request_failed", "{method} request failed", value, method=self.request.method)
