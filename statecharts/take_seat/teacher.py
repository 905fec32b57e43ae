"""A Teacher App asks for a seat, and is refused: only a participant takes a seat."""

EVENT = "take_seat"
CLIENT = "teacher"

STATES: dict[str, str] = {
    "connected": "A teacher has no seat.",
    "disconnected": "The client is gone.",
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
        "before": ["check_joined", "check_participant"],
    },
    {"trigger": "disconnect", "source": "connected", "dest": "disconnected"},
]
