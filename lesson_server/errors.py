"""One class for each refusal: its message, and whose fault it is.

A :class:`Refusal` is the client's fault or a temporary fault of ours. Its message is safe to send and is part of the
contract with clients, so the message never changes silently. Any other exception during a join is a defect: the gateway
logs it and answers with an :class:`InternalError`.

``/asyncapi.json`` describes each refusal by its class, with the first line of the docstring. So that line is for
developers of clients.
"""

from collections.abc import Mapping
from typing import ClassVar


class Refusal(Exception):
    """A request is refused; the message is the one plain sentence that the client gets.

    ``message`` names in braces the fields that differ from case to case. ``fields`` has for a field a regular
    expression that its texts match; a field without one is one word. ``outcome`` is the short stable name used as a
    metric label; ``retryable`` says whether the same request, unchanged, may succeed later.

    Args:
        fields: the fields of the message.
    """

    message: ClassVar[str]
    outcome: ClassVar[str]
    retryable: ClassVar[bool] = False
    fields: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **fields: object) -> None:
        super().__init__(self.message.format(**fields))


# Refusals of the handshake (connect_error). The client must be fixed; a retry can't help.


class HandshakeRefused(Refusal):
    """The ``auth`` object of the connection is wrong."""

    outcome = "handshake_refused"


class UnknownClient(HandshakeRefused):
    """No client of this kind sends an event."""

    message = 'client must be "teacher" or "participant"'


class HubRefused(HandshakeRefused):
    """The client is the Hub of the platform."""

    message = "the Hub does not join lessons"


class LessonIdRequired(HandshakeRefused):
    """The handshake names no lesson."""

    message = "lesson_id is required"


class LessonIdMalformed(HandshakeRefused):
    """No lesson can have this id."""

    message = "lesson_id is malformed"


class NoSuchNamespace(HandshakeRefused):
    """The handshake is for another namespace than the main one, ``/``."""

    message = "no such namespace"


# Refusals in the acknowledgement of an event: the client's fault. A refusal of one event only is in the event's module.


class EventNotAllowed(Refusal):
    """This kind of client can't send this event."""

    message = "a {client} can't send {event}"
    outcome = "not_allowed"


class UnexpectedData(Refusal):
    """The event carried data, and it takes none."""

    message = "{event} takes no data"
    outcome = "unexpected_data"


class LessonNotFound(Refusal):
    """RDS has no such lesson; a retry can help, because the lesson may be created later."""

    message = "lesson {lesson_id} not found"
    outcome = "lesson_not_found"
    retryable = True

    def __init__(self, lesson_id: str) -> None:
        super().__init__(lesson_id=lesson_id)


class AccessTokenExpired(Refusal):
    """The access token is genuine, but past its ``exp``."""

    message = "access token has expired"
    outcome = "token_expired"


class AccessTokenInvalid(Refusal):
    """Any fault of a token except its age; the client does not learn which, because that would help only a forger."""

    message = "access token is invalid"
    outcome = "token_invalid"


class AccessTokenRequired(Refusal):
    """The handshake had no access token, and the event needs one."""

    message = "access token is required"
    outcome = "token_required"


# Refusals of the handshake or in the acknowledgement: our fault.


class ServiceBusy(Refusal):
    """More clients come than the server accepts at once.

    See admission.py.
    """

    message = "the lesson service is busy, try again"
    outcome = "busy"
    retryable = True


class StoreUnavailable(Refusal):
    """A store of the server failed or was too slow.

    ``cause`` is for the operator, the client gets only the message.
    """

    message = "the lesson service is unavailable, try again"
    outcome = "store_unavailable"
    retryable = True

    def __init__(self, store: str, cause: str) -> None:
        super().__init__()
        self.cause = f"{store}: {cause}"


class StoreRefused(StoreUnavailable):
    """Redis has a key of another type in place of a record; an operator must remove the key."""


class InternalError(Refusal):
    """An unforeseen error in the server."""

    message = "internal error"
    outcome = "internal_error"


# What the error budget of joins counts; conf/prometheus/alerts.yaml has their outcomes.
OUR_FAULTS = (InternalError, ServiceBusy, StoreUnavailable)


class InvalidTransition(Exception):
    """The chart has no such transition: the trigger is refused and nothing has changed.

    Args:
        trigger: the event that was fired.
        state: the state of the connection, which it keeps.
        history: the transitions so far, oldest first.
    """

    def __init__(self, trigger: str, state: str, history: tuple[str, ...]) -> None:
        super().__init__(f"can't {trigger} in state {state} (before: {', '.join(history) or 'nothing'})")
        self.trigger = trigger
        self.state = state
