"""A Participant joins a lesson, from its handshake to the end of its connection."""

EVENT = "join_lesson"
CLIENT = "participant"

STATES: dict[str, str] = {
    "connected": "The handshake named a participant and a lesson; nothing is held for it anywhere.",
    "lesson_validated": "RDS has the lesson, the access token, if any, is good, and the sid is in the lesson's room.",
    "seated": "The session holds the number of seats, and Redis the seat map of the lesson. A guest stays here.",
    "registered": "Redis holds the presence of this client in this lesson, with this sid; the session says who it is.",
    "disconnected": "The client is gone, and nothing of the connection is left.",
}

INITIAL = "connected"
FINAL: tuple[str, ...] = ("disconnected",)

PATH: tuple[str, ...] = ("validate_lesson", "seat", "register")

SEATED: tuple[str, ...] = ("seated", "registered")
PRESENT: tuple[str, ...] = ("registered",)
RESTING: tuple[str, ...] = ("seated", "registered")
GUEST: tuple[str, ...] = ("seated",)

TRANSITIONS: list[dict[str, object]] = [
    # The join
    {
        "trigger": "validate_lesson",
        "source": "connected",
        "dest": "lesson_validated",
        "before": ["check_lesson_exists", "check_access_token", "enter_room"],
    },
    {
        "trigger": "seat",
        "source": "lesson_validated",
        "dest": "seated",
        "before": ["get_seat", "get_session", "add_seat", "save_session", "ensure_seat_map"],
    },
    {
        "trigger": "register",
        "source": "seated",
        "dest": "registered",
        "conditions": ["has_access_token"],
        "before": ["get_client_id", "save_client", "set_client_presence", "report_reconnect"],
    },
    # Back to the initial state after a failed join
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
    # After Redis has lost its data
    {"trigger": "restore", "source": "seated", "dest": "seated", "before": ["ensure_seat_map"]},
    {
        "trigger": "restore",
        "source": "registered",
        "dest": "registered",
        "before": ["ensure_seat_map", "restore_presence", "restore_seat"],
    },
    # Somebody was removed from the lesson, by the roster API
    {"trigger": "remove", "source": "connected", "dest": "disconnected", "before": ["close_connection"]},
    {
        "trigger": "remove",
        "source": "lesson_validated",
        "dest": "disconnected",
        "before": ["leave_room", "close_connection"],
    },
    {
        "trigger": "remove",
        "source": "seated",
        "dest": "disconnected",
        "before": ["leave_room", "undo_presence", "close_connection"],
    },
    {
        "trigger": "remove",
        "source": "registered",
        "dest": "disconnected",
        "before": ["leave_room", "remove_presence", "close_connection"],
    },
    # The end of the connection
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
