"""One class for each refusal: its message, and whose fault it is.

A :class:`Refusal` is the client's fault or a temporary fault of ours. Its message is safe to send and is part of the
contract with clients, so the message never changes silently. Any other exception during a join is a defect: the gateway
logs it and answers with a plain :class:`Refusal`, whose message is only "internal error".
"""


class Refusal(Exception):
    """A request is refused; the message is the one plain sentence that the client gets.

    ``outcome`` is the short stable name used as a metric label; ``retryable`` says whether the same request, unchanged,
    may succeed later.
    """

    message = "internal error"
    outcome = "internal_error"
    retryable = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(self.message if message is None else message)


# Refusals of the handshake (connect_error). The client must be fixed; a retry can't help.


class HandshakeRefused(Refusal):
    """The ``auth`` object of the connection is wrong."""

    outcome = "handshake_refused"


class UnknownClient(HandshakeRefused):
    message = 'client must be "teacher" or "participant"'


class HubRefused(HandshakeRefused):
    message = "the Hub does not join lessons"


class LessonIdRequired(HandshakeRefused):
    message = "lesson_id is required"


class LessonIdMalformed(HandshakeRefused):
    message = "lesson_id is malformed"


# Refusals in the acknowledgement of an event: the client's fault. A refusal of one event only is in the event's module.


class EventNotAllowed(Refusal):
    """This kind of client can't send this event."""

    outcome = "not_allowed"

    def __init__(self, client: str, event: str) -> None:
        super().__init__(f"a {client} can't send {event}")


class UnexpectedData(Refusal):
    """The event carried data, and it takes none."""

    outcome = "unexpected_data"

    def __init__(self, event: str) -> None:
        super().__init__(f"{event} takes no data")


class LessonNotFound(Refusal):
    """RDS has no such lesson; a retry can help, because the lesson may be created later."""

    outcome = "lesson_not_found"
    retryable = True

    def __init__(self, lesson_id: str) -> None:
        super().__init__(f"lesson {lesson_id} not found")


class AccessTokenExpired(Refusal):
    message = "access token has expired"
    outcome = "token_expired"


class AccessTokenInvalid(Refusal):
    """Any fault of a token except its age; the client does not learn which, because that would help only a forger."""

    message = "access token is invalid"
    outcome = "token_invalid"


class AccessTokenRequired(Refusal):
    message = "access token is required"
    outcome = "token_required"


# Refusals of the handshake or in the acknowledgement: our fault.


class ServiceBusy(Refusal):
    """More clients come than this process accepts at once; see admission.py."""

    message = "the lesson service is busy, try again"
    outcome = "busy"
    retryable = True


class StoreUnavailable(Refusal):
    """RDS or Redis failed or was too slow; ``cause`` is for the operator, the client gets only the message."""

    message = "the lesson service is unavailable, try again"
    outcome = "store_unavailable"
    retryable = True

    def __init__(self, store: str, cause: str) -> None:
        super().__init__()
        self.cause = f"{store}: {cause}"


class StoreRefused(StoreUnavailable):
    """Redis has a key of another type in place of a record; an operator must remove the key."""


# What the error budget of joins counts; conf/prometheus/alerts.yaml has their outcomes.
OUR_FAULTS = (Refusal, ServiceBusy, StoreUnavailable)


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
