"""A Participant takes a seat, or moves to another one."""

EVENT = "take_seat"
CLIENT = "participant"

STATES: dict[str, str] = {
    "connected": "The participant may take a seat. A seat belongs to the person, not to the connection: "
    "the seat map in Redis says who has which.",
    "disconnected": "The client is gone. Redis keeps the seat for the grace, so that a reconnect finds it.",
}

INITIAL = "connected"
FINAL: tuple[str, ...] = ("disconnected",)

PATH: tuple[str, ...] = ("take_seat",)

SEATED: tuple[str, ...] = ()
PRESENT: tuple[str, ...] = ()
RESTING: tuple[str, ...] = ("connected",)
GUEST: tuple[str, ...] = ()

TRANSITIONS: list[dict[str, object]] = [
    {
        "trigger": "take_seat",
        "source": "connected",
        "dest": "connected",
        "before": ["check_joined", "check_access_token", "check_data", "get_session", "set_seat"],
    },
    {"trigger": "disconnect", "source": "connected", "dest": "disconnected"},
]
