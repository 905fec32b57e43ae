"""The command line: ``lesson-server run | token | lesson | settings``."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from pydantic import SecretStr

from lesson_server import __version__
from lesson_server.cli.log_limit import LimitedHandler
from lesson_server.cli.shared_folder import SharedFolder
from lesson_server.cli.workers import SIGNALS, Supervisor
from lesson_server.embedded.stores import EmbeddedError, EmbeddedStores, lesson_database, read_key
from lesson_server.errors import StoreUnavailable
from lesson_server.protocol.worker import Worker, make_inboxes
from lesson_server.settings.schema import Settings, SettingsError
from lesson_server.settings.sources import Configuration, load
from lesson_server.stores.rds.lesson_admin import add_lesson, list_lessons
from lesson_server.stores.rds.lessons import LESSON_ID, MAX_SEATS
from lesson_server.tokens import TokenVerifier

# Seconds that a token of `lesson-server token` is good for: a day at school.
DEFAULT_TTL = 12 * 60 * 60

# Objects that may be made, net, before the collector looks at the young ones. Python's default is 700.
GC_THRESHOLD = 50_000

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandFailed(Exception):
    """What the operator asked for can't be done; the text is one line that says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process when None.

    Returns:
        the exit status: 0, 1 when the command failed, 2 when a setting or an argument is wrong, 130 after Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    options = {"server.host": args.host, "server.port": args.port, "server.workers": args.workers}
    return _status_of(lambda: args.command(load(args.config, options), args))


def _status_of(work: Callable[[], None]) -> int:
    """Return the exit status of some work; what failed is said in one line."""
    try:
        work()
    except SettingsError as error:
        return _failed(str(error), EXIT_USAGE)
    except StoreUnavailable as error:
        return _failed(error.cause, EXIT_FAILED)
    except (EmbeddedError, CommandFailed, OSError) as error:
        return _failed(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _failed(why: str, status: int) -> int:
    print(f"lesson-server: {why}", file=sys.stderr)
    return status


# lesson-server run


def run(settings: Settings, args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[LimitedHandler()],
    )
    logging.getLogger("lesson_server").setLevel(logging.INFO)
    # Until the event loop takes the signals over, SIGTERM unwinds as SIGINT does, so that no store is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings.require_complete()
    _allow_many_files()
    with contextlib.suppress(KeyboardInterrupt):
        if not settings.embedded:
            _serve(settings)
            return
        with EmbeddedStores(settings.server.data_dir) as stores:
            _say(f"no stores are configured: starting our own PostgreSQL and Valkey in {settings.server.data_dir}")
            stores.start(_say)
            _say(f"PostgreSQL: {stores.dsn}")
            _say(f"Redis: {stores.redis_url}")
            _serve(_with_stores(settings, stores))


def _allow_many_files() -> None:
    """Raise the limit of open files: a connection is one, and the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(settings: Settings) -> None:
    if settings.server.workers == 1:
        uvloop.run(_serve_until_signal(settings))
        return
    metrics = SharedFolder("lesson-server-metrics-", ".db")
    try:
        status = _supervise(settings, metrics)
    finally:
        metrics.leave()
    if status:
        raise SystemExit(status)  # the worker has said why


def _supervise(settings: Settings, metrics: SharedFolder) -> int:
    """Run the workers, as the parent of them all.

    Returns:
        0, or the exit status of a worker that could not start.
    """
    # Before prometheus_client is imported: it then keeps the figures of all workers there, and each tells the sum.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics.path)
    from prometheus_client.multiprocess import mark_process_dead

    from lesson_server.server import open_port, url_of

    sockets = open_port(settings)
    inboxes = make_inboxes(settings.server.workers)

    def serve(number: int, ready: Callable[[], object], parent_gone: int) -> int:
        birth = _Birth(Worker(number, inboxes), sockets, ready, parent_gone)
        try:
            return _status_of(lambda: uvloop.run(_serve_until_signal(settings, birth)))
        finally:
            metrics.leave()  # the parent may have been killed

    supervisor = Supervisor(settings.server.workers, serve, mark_process_dead)
    return supervisor.run(lambda: _say(f"lesson-server listening on {url_of(settings, sockets)}"))


@dataclass(frozen=True)
class _Birth:
    """What a worker is given by its parent.

    Attributes:
        worker: which one it is.
        sockets: its listening sockets.
        ready: to be called once it serves.
        parent_gone: a descriptor that can be read once the parent is gone.
    """

    worker: Worker
    sockets: list[socket.socket]
    ready: Callable[[], object]
    parent_gone: int


async def _serve_until_signal(settings: Settings, birth: _Birth | None = None) -> None:
    """Serve until the first signal, then send the clients away; a second signal stops at once.

    Args:
        settings: with the stores and the key.
        birth: what makes this one of several workers; None for a server alone.
    """
    from lesson_server.server import LessonServer

    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, None)
    if birth is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that has come meanwhile is handled now
        loop.add_reader(birth.parent_gone, _stop_as_orphan, birth.parent_gone, signals)
    server = LessonServer(settings, birth.worker if birth else None)
    try:
        await server.start(birth.sockets if birth else None)
        _spare_the_collector()
        if birth is None:
            _say(f"lesson-server listening on {server.url}")
        else:
            birth.ready()
        await signals.get()
        drain = asyncio.create_task(server.drain())
        second = asyncio.create_task(signals.get())
        await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        second.cancel()
    finally:
        await server.stop()


def _spare_the_collector() -> None:
    """Have the garbage collector look at less, and less often.

    What the start has made stays, so it need not be looked at again; and a join allocates a thousand objects, nearly
    all of which reference counting has freed by its end.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def _stop_as_orphan(parent_gone: int, signals: asyncio.Queue[None]) -> None:
    """Stop a worker whose parent was killed; nobody would do it later."""
    asyncio.get_running_loop().remove_reader(parent_gone)
    signals.put_nowait(None)


def _with_stores(settings: Settings, stores: EmbeddedStores) -> Settings:
    """Return the settings with the embedded stores, and their key where the operator set none."""
    return settings.model_copy(
        update={
            "rds": settings.rds.model_copy(update={"dsn": SecretStr(stores.dsn)}),
            "redis": settings.redis.model_copy(update={"url": SecretStr(stores.redis_url)}),
            "auth": settings.auth.model_copy(update={"key": settings.auth.key or SecretStr(stores.key)}),
        }
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _say(line: str) -> None:
    print(line, flush=True)


# lesson-server token


def token(settings: Settings, args: argparse.Namespace) -> None:
    """Print an access token."""
    auth = settings.auth
    if auth.key is None:
        key = read_key(settings.server.data_dir)
        if key is None:
            raise CommandFailed(
                "no key: set LESSON_AUTH_KEY, or start `lesson-server run` once,"
                f" which makes one in {settings.server.data_dir}"
            )
        auth = auth.model_copy(update={"key": SecretStr(key)})
    try:
        print(TokenVerifier(auth).mint(args.subject, args.role, args.ttl))
    except ValueError as error:
        raise CommandFailed(str(error)) from None


# lesson-server lesson


def lesson_add(settings: Settings, args: argparse.Namespace) -> None:
    """Add a lesson to RDS, or change it."""
    if LESSON_ID.fullmatch(args.id) is None:
        raise CommandFailed(f"lesson id {args.id!r} is malformed: it matches {LESSON_ID.pattern}")
    if args.seats is not None and args.seats > MAX_SEATS:
        raise CommandFailed(f"a lesson has {MAX_SEATS} seats at most")
    with _lesson_database(settings) as dsn:
        added = add_lesson(dsn, args.id, args.seats, args.title)
    print(f"lesson {args.id} {'added' if added else 'changed'}: {args.seats or 'no'} seats")


def lesson_list(settings: Settings, args: argparse.Namespace) -> None:
    """Print the lessons of RDS."""
    with _lesson_database(settings) as dsn:
        lessons = list_lessons(dsn)
    width = max([len("LESSON"), *(len(lesson_id) for lesson_id, _, _ in lessons)])
    print(f"{'LESSON':{width}}  SEATS  TITLE")
    for lesson_id, seat_count, title in lessons:
        print(f"{lesson_id:{width}}  {seat_count or 0:5}  {title}".rstrip())


@contextlib.contextmanager
def _lesson_database(settings: Settings) -> Iterator[str]:
    if settings.rds.dsn is not None:
        yield settings.rds.dsn.get_secret_value()
        return
    with lesson_database(settings.server.data_dir, _tell) as dsn:
        yield dsn


# lesson-server settings


def show_settings(settings: Configuration, args: argparse.Namespace) -> None:
    """Print every setting in force and where it came from."""
    rows = list(settings.rows())
    names = max(len(row.name) for row in rows)
    values = max(len(row.value) for row in rows)
    for row in rows:
        print(f"{row.name:{names}}  {row.value:{values}}  {row.origin}")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings, e.g. conf/production.toml")
    common.set_defaults(host=None, port=None, workers=None)

    parser = argparse.ArgumentParser(
        prog="lesson-server",
        description="A Socket.IO server that teachers and participants join lessons on.",
        epilog="Every setting: lesson-server settings. Without stores configured, `run` starts its own.",
    )
    parser.add_argument("--version", action="version", version=f"lesson-server {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("run", parents=[common], help="serve until SIGTERM or SIGINT")
    command.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", help="TCP port; 0 takes any free one (default 8080)")
    command.add_argument("--workers", metavar="N", help="processes that share the port (default 1)")
    command.set_defaults(command=run)

    command = commands.add_parser("token", parents=[common], help="print an access token")
    command.add_argument("--role", required=True, help='"teacher", or any role of a participant')
    command.add_argument("--subject", required=True, metavar="ID", help="the user_id or client_id")
    command.add_argument(
        "--ttl", type=_positive, default=DEFAULT_TTL, metavar="SECONDS", help="until it expires (default 12 hours)"
    )
    command.set_defaults(command=token)

    lesson = commands.add_parser("lesson", help="add or list lessons")
    actions = lesson.add_subparsers(title="actions", required=True, metavar="ACTION")
    command = actions.add_parser("add", parents=[common], help="add a lesson, or change it")
    command.add_argument("id", metavar="ID")
    command.add_argument("--seats", type=_positive, metavar="N", help="number of seats (default none)")
    command.add_argument("--title", default="", metavar="T")
    command.set_defaults(command=lesson_add)
    command = actions.add_parser("list", parents=[common], help="list the lessons")
    command.set_defaults(command=lesson_list)

    command = commands.add_parser("settings", parents=[common], help="print every setting and where it came from")
    command.set_defaults(command=show_settings)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("should be a whole number above 0")
    return int(text)
