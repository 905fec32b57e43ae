"""Lets teachers (teacher-1, teacher-2, ...) join a lesson; prints outcomes; exits with 1 if a join failed."""

import sys
from collections.abc import Sequence

from simulation import Client, Signer, argument_parser, run


def teachers(lesson: str, count: int, sign: Signer) -> list[Client]:
    """Return ``count`` teachers, not yet connected, for ``lesson``."""
    return [
        Client(client="teacher", lesson_id=lesson, access_token=sign(f"teacher-{number}", "teacher"))
        for number in range(1, count + 1)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = argument_parser(__doc__, count=1).parse_args(argv)
    return run(args, "Teachers", lambda sign: teachers(args.lesson, args.count, sign))


if __name__ == "__main__":
    sys.exit(main())
