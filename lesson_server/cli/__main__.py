"""``python -m lesson_server.cli``."""

import sys

from lesson_server.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
