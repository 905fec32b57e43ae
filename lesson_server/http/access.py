"""Who may use the roster API and the console (contract, sections 10 and 11).

There are three kinds of access:

* a bearer token, ``admin.token``, in the header ``Authorization``: for programs;
* a session of the console in a cookie, begun by a login with ``admin.token``: for browsers. The cookie is signed, and a
  logout ends the session on every node;
* none, in the embedded set-up without ``admin.token``, if the server listens on a loopback address and the request is
  addressed to a loopback address: a page of another site, or a DNS name of an attacker that resolves to 127.0.0.1, is
  not.

A change needs the same origin, unless it carries a bearer token: a browser sends a cookie with any request.
"""

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from urllib.parse import urlsplit

from tornado.httputil import HTTPServerRequest
from tornado.web import HTTPError, RequestHandler, create_signed_value, decode_signed_value

from lesson_server.stores.redis.console_sessions import SESSION_LIFE, ConsoleSessions

COOKIE = "lesson_console"
# Failed tries of one address within this many seconds after which further tries are refused.
MAX_FAILURES = 10
FAILURE_WINDOW = 60.0
# Addresses whose failed tries are remembered; the oldest is forgotten first.
MAX_ADDRESSES = 10_000
# Bits of an IPv6 address that name the network of a host.
IPV6_NETWORK = 64
SAFE_METHODS = ("GET", "HEAD")


class TooManyFailures(HTTPError):
    """Too many failed tries from one address."""

    def __init__(self) -> None:
        super().__init__(429, reason="Too Many Requests")


class Unauthorized(HTTPError):
    """The request carries no valid token and no valid session."""

    def __init__(self) -> None:
        super().__init__(401, reason="Unauthorized")


class Access:
    """Decides whether a request may use the roster API or the console.

    Args:
        token: ``admin.token``; None if there is none.
        is_open: whether requests from this machine need no token.
        sessions: the sessions of the console.

    Attributes:
        is_open: whether requests from this machine need no token.
    """

    def __init__(self, token: str | None, is_open: bool, sessions: ConsoleSessions) -> None:
        self._token = None if token is None else token.encode()
        self.is_open = is_open and token is None
        self._sessions = sessions
        self._failures = FailedTries()
        # A key of its own: who finds out how a cookie is signed has not got the token.
        self._cookie_key = hmac.digest(self._token or b"", b"lesson-server console cookie", hashlib.sha256)

    @property
    def needs_login(self) -> bool:
        """Whether a browser has to log in."""
        return self._token is not None

    def require_on(self, request: HTTPServerRequest) -> None:
        """Refuse a request if the roster API and the console are off for this request.

        Raises:
            HTTPError: 404.
        """
        if self._token is None and not (self.is_open and is_from_this_machine(request)):
            raise HTTPError(404)

    async def require(self, handler: RequestHandler) -> None:
        """Refuse a request that carries no valid token and no valid session.

        Raises:
            HTTPError: 404: both are off. 401: the credentials are missing or wrong. 403: a change from another origin.
                429: too many failed tries.
            StoreUnavailable: Redis failed, which has the sessions.
        """
        request = handler.request
        self.require_on(request)
        if self._token is None:
            return
        credentials = request.headers.get("Authorization")
        if credentials is not None:
            scheme, _, token = credentials.partition(" ")
            # Tornado decodes headers as Latin-1, which gives back the bytes that the client sent.
            if scheme.lower() != "bearer" or not self._is_token(request, token.strip().encode("latin-1")):
                raise Unauthorized
            return
        if not await self.has_session(handler):
            raise Unauthorized
        require_same_origin(request)

    async def login(self, handler: RequestHandler, token: str) -> bool:
        """Begin a session, and set its cookie.

        Returns:
            False if the token is wrong.

        Raises:
            HTTPError: 429: too many failed tries.
            StoreUnavailable: Redis failed or was too slow.
        """
        if self._token is None or not self._is_token(handler.request, token.encode()):
            return False
        value = create_signed_value(self._cookie_key, COOKIE, await self._sessions.begin())
        handler.set_cookie(
            COOKIE,
            value.decode(),
            path="/",
            max_age=SESSION_LIFE,
            httponly=True,
            samesite="Strict",
            secure=handler.request.headers.get("X-Forwarded-Proto", handler.request.protocol) == "https",
        )
        return True

    async def logout(self, handler: RequestHandler) -> None:
        """End the session of a request, and delete its cookie.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        session = self._session_of(handler)
        if session is not None:
            await self._sessions.end(session)
        handler.clear_cookie(COOKIE, path="/", httponly=True, samesite="Strict")

    async def has_session(self, handler: RequestHandler) -> bool:
        """Return whether a request has a valid session, or needs none.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        if self._token is None:
            return True
        session = self._session_of(handler)
        return session is not None and await self._sessions.is_valid(session)

    def _session_of(self, handler: RequestHandler) -> str | None:
        value = decode_signed_value(
            self._cookie_key,
            COOKIE,
            handler.get_cookie(COOKIE),
            max_age_days=SESSION_LIFE / 86_400,
            min_version=2,  # version 1 is signed with SHA-1
        )
        return None if value is None else value.decode()

    def _is_token(self, request: HTTPServerRequest, token: bytes) -> bool:
        assert self._token is not None
        address = address_of(request)
        if self._failures.are_too_many(address):
            raise TooManyFailures
        if hmac.compare_digest(token, self._token):
            return True
        self._failures.add(address)
        return False


class FailedTries:
    """The failed tries of each address in the last :data:`FAILURE_WINDOW` seconds."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def add(self, address: str) -> None:
        """Note a failed try."""
        self._failures[address] = [*self._recent(address)[1 - MAX_FAILURES :], time.monotonic()]
        self._failures.move_to_end(address)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)

    def are_too_many(self, address: str) -> bool:
        """Return whether an address may not try again now."""
        return len(self._recent(address)) >= MAX_FAILURES

    def _recent(self, address: str) -> list[float]:
        start = time.monotonic() - FAILURE_WINDOW
        return [when for when in self._failures.get(address, ()) if when > start]


def is_from_this_machine(request: HTTPServerRequest) -> bool:
    """Return whether a request is addressed to a loopback address, and comes from no page of another origin."""
    return is_loopback(_host_name(request.headers.get("Host", ""))) and not _is_foreign(request)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is a loopback one."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_same_origin(request: HTTPServerRequest) -> None:
    """Refuse a change that a page of another origin may have requested.

    Raises:
        HTTPError: 403.
    """
    if request.method not in SAFE_METHODS and ("Origin" not in request.headers or _is_foreign(request)):
        raise HTTPError(403, reason="Forbidden")


def _is_foreign(request: HTTPServerRequest) -> bool:
    # The scheme is not compared: behind a proxy that ends TLS, the server sees another one than the browser.
    origin = request.headers.get("Origin")
    if origin is None:
        return False
    host = origin.partition("://")[2].lower()  # empty for "null"
    return not host or host != request.headers.get("Host", "").lower()


def _host_name(host: str) -> str:
    """Return the name or address in a header ``Host``; an empty text if the header is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # such as [zz]
        return ""


def address_of(request: HTTPServerRequest) -> str:
    """Return the address whose failed tries are counted.

    Behind a proxy on this machine, it is the address that the proxy has added. Of an IPv6 address it is the network,
    because a host may use every address of a /64.
    """
    address = request.remote_ip or ""
    forwarded = request.headers.get("X-Forwarded-For", "")
    if forwarded and is_loopback(address):
        address = forwarded.rpartition(",")[2].strip()
    try:
        if ipaddress.ip_address(address).version == 6:
            return str(ipaddress.ip_network((address, IPV6_NETWORK), strict=False))
    except ValueError:  # not an address: the proxy has added a name, or a port
        pass
    return address
