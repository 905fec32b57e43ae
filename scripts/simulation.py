"""The common part of the client simulators: one client, many clients at once, and the command line.

The server sees only what a client sends: nothing here imports the server. Terms used below:

* to *join* is to connect with a handshake, emit ``join_lesson`` and get its acknowledgement;
* an *outcome* is the result of a join, and of ``take_seat`` if the client takes a seat: ``SUCCESS``, the server's
  message of an ERROR or of a refused handshake, or else ``timeout``, ``connection lost`` and the like;
* the clients *attend* from their joins until all of them leave together.
"""

import argparse
import asyncio
import json
import math
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import jwt
import socketio
from report import SUCCESS, Report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

INTERRUPTED = "interrupted"
TIMEOUT = "timeout"
LOST = "connection lost"
DROPPED = "dropped while held"

# Seconds for a connect, and for a join. The server answers a join within 5 s whatever fails; the rest is network time.
PATIENCE = 10.0

# Seconds for a disconnect: a server may never answer the last request of a polling client, though it has read it.
FAREWELL = 2.0

# Seconds until a token expires: longer than any simulated lesson.
TOKEN_TTL = 24 * 60 * 60

# The exit status that shells report for a process ended by SIGINT.
EXIT_INTERRUPTED = 130

DEFAULT_PORTS = {"http": 80, "https": 443}

ALGORITHMS = sorted(jwt.algorithms.get_default_algorithms().keys() - {"none"})

TRANSPORTS = {"websocket": ["websocket"], "polling": ["polling"], "both": ["polling", "websocket"]}


class SigningError(Exception):
    """There is no key to sign access tokens with, or the key does not fit the algorithm."""


class UnreachableError(Exception):
    """No server listens at the URL."""


@dataclass(frozen=True)
class Signer:
    """Mints access tokens.

    Args:
        source: the key itself (an HMAC secret or a PEM), or ``@`` and the file that holds the key. The file is read
            for the first token, because guests need no key.
        algorithm: the JWT algorithm that the server expects.
    """

    source: str
    algorithm: str = "HS256"

    @cached_property
    def _key(self) -> str:
        if not self.source.startswith("@"):
            return self.source
        try:
            return Path(self.source[1:]).read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SigningError(f"no key for access tokens (start the server, or give --key): {error}") from None

    def __call__(self, subject: str, role: str) -> str:
        """Return a token for ``subject``, or raise SigningError."""
        claims = {"sub": subject, "role": role, "exp": int(time.time()) + TOKEN_TTL}
        try:
            return jwt.encode(claims, self._key, self.algorithm)
        except (jwt.PyJWTError, TypeError, ValueError) as error:
            raise SigningError(f"the key can't sign with {self.algorithm}: {error}") from None


class Client:
    """One simulated client and its outcome.

    Args:
        takes_seat: whether the client takes a seat after its join.
        auth: the ``auth`` object of the client's handshake.
    """

    def __init__(self, *, takes_seat: bool = False, **auth: str) -> None:
        self.auth = auth
        self.outcome = INTERRUPTED
        self.connect_ms: float | None = None
        self.join_ms: float | None = None
        self.seat_ms: float | None = None
        self._takes_seat = takes_seat
        self._sio: socketio.AsyncClient | None = None

    async def join(self, url: str, transport: str, http_session: Callable[[], aiohttp.ClientSession]) -> None:
        """Connect, join, and perhaps take a seat.

        Set ``outcome`` and the latency of each completed step; raise nothing.
        """
        self._sio = sio = socketio.AsyncClient(
            reconnection=False, handle_sigint=False, request_timeout=PATIENCE, http_session=http_session
        )
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def end(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)

        sio.on("connect_error", lambda *reason: end(_message(reason)))
        sio.on("disconnect", lambda _reason: end(LOST))
        try:
            started = time.perf_counter()
            async with asyncio.timeout(PATIENCE):
                await sio.connect(url, auth=self.auth, transports=TRANSPORTS[transport], wait_timeout=PATIENCE)
            self.connect_ms = _milliseconds_since(started)

            started = time.perf_counter()
            self.outcome = _outcome(await _call(sio, "join_lesson", ended), has_no_data)
            self.join_ms = _milliseconds_since(started)

            if self._takes_seat and self.outcome == SUCCESS:
                started = time.perf_counter()
                self.outcome = _outcome(await _call(sio, "take_seat", ended), has_seat)
                self.seat_ms = _milliseconds_since(started)
        except TimeoutError:
            self.outcome = TIMEOUT
        except Exception as error:  # socketio raises TypeError and more when a server closes during the handshake
            self.outcome = ended.result() if ended.done() else str(error) or type(error).__name__

    async def leave(self) -> None:
        """Disconnect; set ``outcome`` to DROPPED if the server has dropped the client since its join."""
        if self._sio is None:
            return
        if self.outcome == SUCCESS and not self._sio.connected:
            self.outcome = DROPPED
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await self._sio.disconnect()


def _message(reason: tuple[object, ...]) -> str:
    """Return the server's message from the arguments of connect_error, or the library's own text."""
    match reason:
        case ({"message": str(message)},):
            return message
        case _:
            return " ".join(map(str, reason))


async def _call(sio: socketio.AsyncClient, event: str, ended: asyncio.Future[str]) -> tuple[object, ...] | str:
    """Emit an event, and return the arguments of its acknowledgement, or why the connection ended before."""
    answer: asyncio.Future[tuple[object, ...]] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(PATIENCE):
        # Not sio.call(), which goes on waiting when the connection is lost.
        await sio.emit(event, callback=lambda *arguments: answer.set_result(arguments))
        results: tuple[asyncio.Future[Any], ...] = (answer, ended)
        await asyncio.wait(results, return_when=asyncio.FIRST_COMPLETED)
    return answer.result() if answer.done() else ended.result()


def _outcome(answer: tuple[object, ...] | str, is_expected: Callable[[object], bool]) -> str:
    """Return the outcome from the result of a call, whose data ``is_expected`` checks."""
    match answer:
        case str(reason):
            return reason
        case ({"status": "SUCCESS", "data": data},) if is_expected(data):
            return SUCCESS
        case ({"status": "ERROR", "message": str(message)},):
            return message
        case _:
            return f"unexpected answer {json.dumps(answer, default=repr)}"


def has_no_data(data: object) -> bool:
    return data == {}


def has_seat(data: object) -> bool:
    match data:
        case {"seat": int(), **others}:
            return not others
        case _:
            return False


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


@asynccontextmanager
async def attending(
    clients: Sequence[Client],
    url: str,
    *,
    transport: str = "websocket",
    rate: float = 0,
    on_outcome: Callable[[], None] = lambda: None,
) -> AsyncIterator[None]:
    """Let all clients join, and disconnect them at the end of the ``async with``, also after an exception.

    Args:
        transport: a key of TRANSPORTS.
        rate: connections started per second, on schedule even if the server is slow; 0: all at once.
        on_outcome: called once for each client when its join has ended.
    """

    async def join_after(delay: float, client: Client) -> None:
        await asyncio.sleep(delay)
        await client.join(url, transport, http_session)
        on_outcome()

    async with aiohttp.TCPConnector(limit=0) as connector:
        # One session per client: a session keeps cookies, and a load balancer may tell clients apart by cookies.
        http_session = partial(aiohttp.ClientSession, connector=connector, connector_owner=False)
        try:
            async with asyncio.TaskGroup() as joins:
                for number, client in enumerate(clients):
                    joins.create_task(join_after(number / rate if rate else 0, client))
            yield
        finally:
            await asyncio.gather(*(client.leave() for client in clients))


# The command line


def argument_parser(description: str | None, *, count: int) -> argparse.ArgumentParser:
    """Return a parser with the options of all simulators; ``count`` is the default of --count."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--url", type=server_url, default="http://127.0.0.1:8080", help="of the server (default: %(default)s)")
    add("--lesson", default="1", metavar="ID", help="the lesson to join (default: %(default)s)")
    add("--count", type=integer_from(1), default=count, metavar="N", help="clients in all (default: %(default)s)")
    add("--rate", type=number, default=0, metavar="N", help="connections per second (default: all at once)")
    add("--hold", type=number, default=0, metavar="SECONDS", help="stay so long after the last join (default: 0)")
    add(
        "--transport",
        choices=TRANSPORTS,
        default="websocket",
        help="(default: %(default)s; both: polling, then the upgrade)",
    )
    add("--key", metavar="TEXT|@FILE", help="signs the access tokens (default: auth.key in the data directory)")
    add(
        "--data-dir",
        type=Path,
        default=Path(".lesson-server"),
        metavar="DIR",
        help="the server's data directory (default: %(default)s)",
    )
    add("--algorithm", choices=ALGORITHMS, default="HS256", metavar="NAME", help="of the key (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    add("--plot", type=picture, metavar="FILE", help="draw the latencies (.png or .svg)")
    return parser


def server_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.port == 0:
        raise ValueError
    return text.rstrip("/")


def integer_from(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return integer


def number(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 up")
    return value


def picture(text: str) -> Path:
    file = Path(text)
    if file.suffix not in {".png", ".svg"}:
        raise argparse.ArgumentTypeError(f"{text!r} ends in neither .png nor .svg")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {str(file.parent)!r}")
    return file


def run(args: argparse.Namespace, name: str, clients_of: Callable[[Signer], list[Client]]) -> int:
    """Run the simulation of the command line, print the report, and return the exit status.

    Args:
        args: the parsed command line.
        name: the name of the clients in the title of the report.
        clients_of: makes the clients, with tokens of the given signer.

    Returns:
        0 if all clients joined, 1 if a client did not, 2 if there is no usable key, 130 after Ctrl-C. The report is
        printed except with 2, and with 1 if no server was reachable.
    """
    try:
        clients = clients_of(Signer(args.key or f"@{args.data_dir / 'auth.key'}", args.algorithm))
    except SigningError as error:
        print(error, file=sys.stderr)
        return 2
    _raise_open_file_limit()
    report = Report(clients)
    interrupted = False
    try:
        asyncio.run(_simulate(clients, args))
    except UnreachableError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        interrupted = True

    title = f"{name} of lesson {args.lesson} at {args.url}"
    if args.json:
        print(report.as_json())
    else:
        print(title)
        Console().print(report.as_table())
    if args.plot:
        report.plot(args.plot, title)
    if interrupted:
        return EXIT_INTERRUPTED
    return 1 if report.failed else 0


async def _simulate(clients: Sequence[Client], args: argparse.Namespace) -> None:
    await _check_reachable(args.url)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        bar = progress.add_task("joining", total=len(clients))
        async with attending(
            clients, args.url, transport=args.transport, rate=args.rate, on_outcome=partial(progress.advance, bar)
        ):
            progress.update(bar, description="holding")
            await asyncio.sleep(args.hold)


async def _check_reachable(url: str) -> None:
    """Raise UnreachableError if no server listens: one message in place of a library's error for each client."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(PATIENCE):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme])
    except TimeoutError:
        raise UnreachableError(f"no answer from {url} in {PATIENCE:.0f} s") from None
    except OSError as error:
        raise UnreachableError(f"no server at {url}: {error}") from None
    writer.close()


def _raise_open_file_limit() -> None:
    """Raise the limit of open files to the hard limit: the usual soft limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
