"""What the command line makes of failures: one line on stderr, and an exit status."""

import sys
from collections.abc import Callable

from lesson_server.embedded.errors import EmbeddedError
from lesson_server.errors import StoreUnavailable
from lesson_server.settings.schema import SettingsError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandFailed(Exception):
    """The operator's command can't be carried out; the message is one line with the reason."""


def status_of(work: Callable[[], None]) -> int:
    """Do the work and return the exit status; print a failure as one line on stderr."""
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
