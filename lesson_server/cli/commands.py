"""The command line: ``lesson-server run | token | lesson | settings``."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import SecretStr

from lesson_server import __version__
from lesson_server.cli.failures import CommandFailed, status_of
from lesson_server.cli.run import run
from lesson_server.embedded.data_dir import read_key
from lesson_server.embedded.stores import lesson_database
from lesson_server.settings.schema import Settings
from lesson_server.settings.sources import Configuration, load
from lesson_server.stores.rds.lesson import LESSON_ID, MAX_SEATS
from lesson_server.stores.rds.lesson_admin import add_lesson, list_lessons
from lesson_server.tokens import TokenVerifier

# Seconds until a token of `lesson-server token` expires: a school day.
DEFAULT_TTL = 12 * 60 * 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments without the program's name; None: ``sys.argv[1:]``.

    Returns:
        the exit status: 0, 1 when the command failed, 2 when a setting or an argument is wrong, 130 after Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    options = {"server.host": args.host, "server.port": args.port, "server.workers": args.workers}
    return status_of(lambda: args.command(load(args.config, options), args))


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
    """Print every setting in force and its origin."""
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


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
