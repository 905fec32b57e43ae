"""A Teacher App asks to leave a seat, and is refused: only a participant takes a seat."""

EVENT = "leave_seat"
CLIENT = "teacher"

STATES: dict[str, str] = {
    "connected": "A teacher has no seat to leave.",
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
        "before": ["check_joined", "check_participant"],
    },
    {"trigger": "disconnect", "source": "connected", "dest": "disconnected"},
]
