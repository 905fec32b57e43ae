"""Lets participants (participant-1, ...) and guests join a lesson; prints outcomes; exits with 1 if a join failed."""

import sys
from collections.abc import Sequence

from simulation import Client, Signer, argument_parser, integer_from, run

ROLE = "student"


def participants(lesson: str, count: int, guests: int, sign: Signer) -> list[Client]:
    """Return ``count`` participants, not yet connected, for ``lesson``; the last ``guests`` of them have no token."""
    known = [
        Client(client="participant", lesson_id=lesson, access_token=sign(f"participant-{number}", ROLE))
        for number in range(1, count - guests + 1)
    ]
    return known + [Client(client="participant", lesson_id=lesson) for _ in range(guests)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argument_parser(__doc__, count=30)
    parser.add_argument(
        "--guests", type=integer_from(0), default=0, metavar="N", help="so many of them without a token (default: 0)"
    )
    args = parser.parse_args(argv)
    if args.guests > args.count:
        parser.error(f"argument --guests: {args.guests} guests are more than the {args.count} participants")
    return run(args, "Participants", lambda sign: participants(args.lesson, args.count, args.guests, sign))


if __name__ == "__main__":
    sys.exit(main())
