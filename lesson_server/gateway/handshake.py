"""Parse the ``auth`` object of a handshake into a :class:`~lesson_server.events.handshake.Handshake`."""

from collections.abc import Callable, Collection
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, WrapValidator
from typing_extensions import TypedDict

from lesson_server.errors import HubRefused, LessonIdMalformed, LessonIdRequired, Refusal, UnknownClient
from lesson_server.events.handshake import Handshake
from lesson_server.stores.rds.lesson import LESSON_ID
from lesson_server.tokens import MAX_TOKEN_LENGTH

# JSON integers, as the parser of the server reads them.
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1

# The refusals of a handshake, in the order in which they are tried.
REFUSALS: tuple[type[Refusal], ...] = (HubRefused, UnknownClient, LessonIdRequired, LessonIdMalformed)


def _string_or_empty(value: object, validate: Callable[[object], str | None]) -> str | None:
    """Return a string of the handshake, or an empty string for a value that can be neither a token nor a subject.

    The connection keeps the value, and 16 kB of JSON can become 400 kB of objects.
    """
    try:
        string = validate(value)
    except ValueError:
        return ""
    return string if string is None or string.isascii() else ""


Credential = Annotated[
    # A pattern of pydantic would take 16 µs for the longest token, isascii takes none.
    Annotated[str, Field(max_length=MAX_TOKEN_LENGTH, json_schema_extra={"pattern": r"^[\x00-\x7f]*$"})] | None,
    WrapValidator(_string_or_empty),
]


class Auth(TypedDict):
    """What a client says of itself when it connects. Further fields are ignored."""

    client: Annotated[str, Field(description="The kind of client.")]
    lesson_id: Annotated[
        Annotated[str, Field(pattern=f"^{LESSON_ID.pattern}$")] | Annotated[int, Field(ge=MIN_INTEGER, le=MAX_INTEGER)],
        Field(description="The lesson."),
    ]
    access_token: NotRequired[
        Annotated[
            Credential,
            Field(description="A JWT. A teacher needs one; a participant without one is a guest. Null: there is none."),
        ]
    ]
    user_id: NotRequired[
        Annotated[
            Credential,
            Field(description="Of a teacher, in place of a token. Only where `auth.trust_teacher_user_id` is on."),
        ]
    ]


AUTH: TypeAdapter[Any] = TypeAdapter(Auth)


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
    if fields.get("lesson_id") is None:
        raise LessonIdRequired
    try:
        fields = AUTH.validate_python(fields, strict=True)
    except ValueError:  # of the lesson_id: the client has been checked, and a credential is never refused
        raise LessonIdMalformed from None
    return Handshake(client, str(fields["lesson_id"]), fields.get("access_token"), fields.get("user_id"))
