"""What a client has said of itself when it connected."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Handshake:
    """The client that connects, and its lesson.

    Attributes:
        client: the kind of client, ``teacher`` or ``participant``.
        lesson_id: the lesson; not looked up yet.
        access_token: not verified yet. None if the client sent none; an empty string is an invalid token.
        user_id: used for a teacher if ``auth.trust_teacher_user_id`` is on. None and empty as for ``access_token``.
    """

    client: str
    lesson_id: str
    access_token: str | None
    user_id: str | None
