"""The Teacher App's connection, from its handshake to its end.

Rules of the charts:

* Everything that moves a connection is written here, row by row; what is not written is refused and changes nothing.
* States are past participles (what is now true), triggers imperatives (what is asked), steps verb + object (what is
  done). Each arrow of the sequence diagram that the server performs is a step, in the diagram's order; the table of
  arrows is in docs/arrows.md.
* The steps of ``before`` run in order. One that raises leaves the state as it was, so every step that can fail stands
  there.
* ``abandon`` is the way back after a failed join, ``disconnect`` the end. Each row says what its state must give back,
  the failed step of the *next* state included: a write that timed out may have happened. Giving back is idempotent.
* ``restore`` writes again what Redis has lost; the state does not change, for nothing has happened to the client.
* Not drawn: a second ``join_lesson``. It fires what is left of JOIN from the state that the connection is in.
"""

STATES: dict[str, str] = {
    "connected": "The handshake named a teacher and a lesson; nothing is held anywhere.",
    "lesson_validated": "RDS has the lesson, the access token is a teacher's, and the sid is in the lesson's room.",
    "seated": "The session holds the number of seats, and Redis the seat map of the lesson.",
    "registered": "Redis says that this teacher is in this lesson, by this sid.",
    "disconnected": "The client is gone; what the connection held has been given back.",
}

INITIAL = "connected"

JOIN: tuple[str, ...] = ("validate_lesson", "take_seat", "register")

# The states of a connection whose lesson has a seat map in Redis, and of one that Redis tells to be there.
SEATED: tuple[str, ...] = ("seated", "registered")
PRESENT: tuple[str, ...] = ("registered",)

TRANSITIONS: list[dict[str, object]] = [
    # The join
    {
        "trigger": "validate_lesson",
        "source": "connected",
        "dest": "lesson_validated",
        "before": ["check_lesson_exists", "check_access_token", "enter_room"],
    },
    {
        "trigger": "take_seat",
        "source": "lesson_validated",
        "dest": "seated",
        "before": ["get_seat", "get_session", "add_seat", "save_session", "ensure_seat_map"],
    },
    {
        "trigger": "register",
        "source": "seated",
        "dest": "registered",
        "before": ["set_teacher_presence"],
    },
    # The way back after a failed join
    {"trigger": "abandon", "source": "connected", "dest": "connected", "before": ["leave_room"]},
    {
        "trigger": "abandon",
        "source": "lesson_validated",
        "dest": "connected",
        "before": ["clear_session", "leave_room"],
    },
    {
        "trigger": "abandon",
        "source": "seated",
        "dest": "connected",
        "before": ["clear_session", "leave_room", "undo_presence"],
    },
    # After Redis has lost what it held
    {"trigger": "restore", "source": "seated", "dest": "seated", "before": ["ensure_seat_map"]},
    {
        "trigger": "restore",
        "source": "registered",
        "dest": "registered",
        "before": ["ensure_seat_map", "restore_presence"],
    },
    # The end
    {"trigger": "disconnect", "source": "connected", "dest": "disconnected"},
    {
        "trigger": "disconnect",
        "source": "lesson_validated",
        "dest": "disconnected",
        "before": ["leave_room"],
    },
    {
        "trigger": "disconnect",
        "source": "seated",
        "dest": "disconnected",
        "before": ["leave_room", "undo_presence"],
    },
    {
        "trigger": "disconnect",
        "source": "registered",
        "dest": "disconnected",
        "before": ["leave_room", "remove_presence"],
    },
]
