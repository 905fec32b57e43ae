"""A Participant raises a hand. Known to the tests only: an event needs nothing outside of its own modules."""

EVENT = "raise_hand"
CLIENT = "participant"

STATES: dict[str, str] = {
    "hand_down": "The participant asks for nothing.",
    "hand_raised": "The participant waits for the teacher; the reason is known.",
    "disconnected": "The client is gone.",
}

INITIAL = "hand_down"
FINAL: tuple[str, ...] = ("disconnected",)

PATH: tuple[str, ...] = ("raise_hand",)

SEATED: tuple[str, ...] = ()
PRESENT: tuple[str, ...] = ()
RESTING: tuple[str, ...] = ("hand_down", "hand_raised")
GUEST: tuple[str, ...] = ()

TRANSITIONS: list[dict[str, object]] = [
    {
        "trigger": "raise_hand",
        "source": "hand_down",
        "dest": "hand_raised",
        "before": ["check_joined", "keep_reason"],
    },
    {
        "trigger": "raise_hand",
        "source": "hand_raised",
        "dest": "hand_raised",
        "before": ["keep_reason"],
    },
    {"trigger": "disconnect", "source": "hand_down", "dest": "disconnected"},
    {"trigger": "disconnect", "source": "hand_raised", "dest": "disconnected", "before": ["forget_reason"]},
]
