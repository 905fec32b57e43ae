"""One class for each refusal: its message, and whose fault it is.

A :class:`Refusal` is the client's fault or a passing condition of ours; its message is safe to send and is part of the
contract with clients, so it never changes silently. Whatever else is raised during a join is a defect: the gateway logs
it and answers with a bare :class:`Refusal`, which tells nothing.
"""


class Refusal(Exception):
    """What a client is told, in one plain sentence.

    ``outcome`` is the short stable name used as a metric label; ``retryable`` says whether the same request may succeed
    later without the client changing anything.
    """

    message = "internal error"
    outcome = "internal_error"
    retryable = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(self.message if message is None else message)


# The handshake (connect_error). The client must be mended; trying again can't help.


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


# The acknowledgement of an event: the client's fault. What only one event refuses stands in the module of the event.


class EventNotAllowed(Refusal):
    """The event is not one of this client's."""

    outcome = "not_allowed"

    def __init__(self, client: str, event: str) -> None:
        super().__init__(f"a {client} can't send {event}")


class UnexpectedData(Refusal):
    """The event carried data, and it takes none."""

    outcome = "unexpected_data"

    def __init__(self, event: str) -> None:
        super().__init__(f"{event} takes no data")


class LessonNotFound(Refusal):
    """RDS has no such lesson. It may be created later, so trying again can help."""

    outcome = "lesson_not_found"
    retryable = True

    def __init__(self, lesson_id: str) -> None:
        super().__init__(f"lesson {lesson_id} not found")


class AccessTokenExpired(Refusal):
    message = "access token has expired"
    outcome = "token_expired"


class AccessTokenInvalid(Refusal):
    """Any fault of a token but its age. Which fault is not told: that would help only a forger."""

    message = "access token is invalid"
    outcome = "token_invalid"


class AccessTokenRequired(Refusal):
    message = "access token is required"
    outcome = "token_required"


# The handshake or the acknowledgement: our fault.


class ServiceBusy(Refusal):
    """More clients than this process takes on at once; see admission.py."""

    message = "the lesson service is busy, try again"
    outcome = "busy"
    retryable = True


class StoreUnavailable(Refusal):
    """RDS or Redis failed or was too slow. ``cause`` is for the operator; the client gets only the plain sentence."""

    message = "the lesson service is unavailable, try again"
    outcome = "store_unavailable"
    retryable = True

    def __init__(self, store: str, cause: str) -> None:
        super().__init__()
        self.cause = f"{store}: {cause}"


class StoreRefused(StoreUnavailable):
    """Redis has a key of another type where a record belongs. Somebody must remove the key."""


class InvalidTransition(Exception):
    """The chart has no such row: the trigger is refused and nothing has changed.

    Args:
        trigger: the event that was fired.
        state: the state of the connection, which it keeps.
        history: the transitions before, oldest first.
    """

    def __init__(self, trigger: str, state: str, history: tuple[str, ...]) -> None:
        super().__init__(f"can't {trigger} in state {state} (before: {', '.join(history) or 'nothing'})")
        self.trigger = trigger
        self.state = state
