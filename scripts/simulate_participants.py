"""Lets participants (participant-1, ...) and guests join a lesson; prints outcomes; exits with 1 if one failed."""

import sys
from collections.abc import Sequence

from simulation import Client, Signer, argument_parser, integer_from, run

ROLE = "student"


def participants(lesson: str, count: int, guests: int, sign: Signer, *, take_seats: bool = False) -> list[Client]:
    """Return ``count`` participants, not yet connected, for ``lesson``; the last ``guests`` of them have no token.

    With ``take_seats``, each one with a token takes a seat after the join, without asking for a certain one.
    """
    names = [f"participant-{number}" for number in range(1, count - guests + 1)]
    known = [
        Client(takes_seat=take_seats, client="participant", lesson_id=lesson, access_token=sign(name, ROLE))
        for name in names
    ]
    return known + [Client(client="participant", lesson_id=lesson) for _ in range(guests)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argument_parser(__doc__, count=30)
    parser.add_argument(
        "--guests", type=integer_from(0), default=0, metavar="N", help="so many of them without a token (default: 0)"
    )
    parser.add_argument(
        "--seats", action="store_true", help="each of them with a token takes a seat after the join: any free one"
    )
    args = parser.parse_args(argv)
    if args.guests > args.count:
        parser.error(f"argument --guests: {args.guests} guests are more than the {args.count} participants")
    return run(
        args,
        "Participants",
        lambda sign: participants(args.lesson, args.count, args.guests, sign, take_seats=args.seats),
    )


if __name__ == "__main__":
    sys.exit(main())
