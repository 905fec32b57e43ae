"""The console script ``lesson-server``: handles SIGTERM from the first moment, then imports and runs the commands.

The imports take half a second. Before them, SIGTERM would end ``lesson-server run`` with another status than 0. Process
1 of a container would even ignore SIGTERM, and the container would be killed at the end of its grace period.
"""

import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line; see :func:`lesson_server.cli.commands.main`."""
    if sys.argv[1:2] == ["run"]:
        signal.signal(signal.SIGTERM, _stop)  # until run() sets a handler
    from lesson_server.cli.commands import main

    return main()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
