"""A Participant leaves its seat."""

EVENT = "leave_seat"
CLIENT = "participant"

STATES: dict[str, str] = {
    "connected": "The participant may leave its seat. A seat belongs to the person, not to the connection: "
    "the seat map in Redis says who has which.",
    "disconnected": "The client is gone.",
}

INITIAL = "connected"
FINAL: tuple[str, ...] = ("disconnected",)

PATH: tuple[str, ...] = ("leave_seat",)

SEATED: tuple[str, ...] = ()
PRESENT: tuple[str, ...] = ()
RESTING: tuple[str, ...] = ("connected",)
GUEST: tuple[str, ...] = ()

TRANSITIONS: list[dict[str, object]] = [
    {
        "trigger": "leave_seat",
        "source": "connected",
        "dest": "connected",
        "before": ["check_joined", "check_access_token", "check_data", "get_session", "clear_seat"],
    },
    {"trigger": "disconnect", "source": "connected", "dest": "disconnected"},
]
