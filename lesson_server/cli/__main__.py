"""``python -m lesson_server.cli``."""

import sys

from lesson_server.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
