"""Parse the ``auth`` object of a handshake into a :class:`~lesson_server.events.connection.Handshake`."""

from collections.abc import Collection

from lesson_server.errors import HubRefused, LessonIdMalformed, LessonIdRequired, UnknownClient
from lesson_server.events.connection import Handshake
from lesson_server.stores.rds.lesson import LESSON_ID
from lesson_server.tokens import MAX_TOKEN_LENGTH


def parse_handshake(auth: object, clients: Collection[str]) -> Handshake:
    """Parse a handshake; nothing of ``auth`` is kept except the fields of the result.

    Args:
        auth: what the client sent.
        clients: the kinds of clients that may send an event.

    Source: contract, section 2.

    Raises:
        HandshakeRefused: ``auth`` is not a valid handshake.
    """
    fields = auth if isinstance(auth, dict) else {}
    client = fields.get("client")
    if client == "hub":
        raise HubRefused
    if not isinstance(client, str) or client not in clients:
        raise UnknownClient
    lesson_id = fields.get("lesson_id")
    if lesson_id is None:
        raise LessonIdRequired
    # JSON's true is an int in Python.
    if isinstance(lesson_id, bool) or not isinstance(lesson_id, str | int):
        raise LessonIdMalformed
    if LESSON_ID.fullmatch(str(lesson_id)) is None:
        raise LessonIdMalformed
    return Handshake(
        client, str(lesson_id), _credential(fields.get("access_token")), _credential(fields.get("user_id"))
    )


def _credential(value: object) -> str | None:
    """Return a string of the handshake, or an empty string for a value that can be neither a token nor a subject.

    The connection keeps the value, and 16 kB of JSON can become 400 kB of objects.
    """
    if value is None:
        return None
    return value if isinstance(value, str) and value.isascii() and len(value) <= MAX_TOKEN_LENGTH else ""
