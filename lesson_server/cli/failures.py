"""What the command line makes of failures: one line, and an exit status."""

import sys
from collections.abc import Callable

from lesson_server.embedded.errors import EmbeddedError
from lesson_server.errors import StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.settings.schema import SettingsError

logger = EventLogger(__name__)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandFailed(Exception):
    """The operator's command can't be carried out; the message is one line with the reason."""


def print_failure(why: str) -> None:
    """Print a failure as one line on stderr."""
    print(f"lesson-server: {why}", file=sys.stderr)


def log_failure(why: str) -> None:
    """Log a failure."""
    logger.error("server_failed", "{cause}", cause=why)


def status_of(work: Callable[[], None], report: Callable[[str], None] = print_failure) -> int:
    """Do the work and return the exit status.

    Args:
        work: the work.
        report: called with the line that says why the work failed.
    """
    try:
        work()
    except SettingsError as error:
        report(str(error))
        return EXIT_USAGE
    except StoreUnavailable as error:
        report(error.cause)
        return EXIT_FAILED
    except (EmbeddedError, CommandFailed, OSError) as error:
        report(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0
