"""The Lua scripts by their names, for those who look at what is carried out, and for people. See explorer.py."""

from lesson_server.stores.redis import presence_scripts, seat_deadlines, seats
from lesson_server.stores.redis.store import Command

_MODULES = (presence_scripts, seat_deadlines, seats)


def script_names() -> dict[str, str]:
    """Script → its name: ``seats.TAKE``. What a test has put in place of a script has the name of that."""
    return {
        text: f"{module.__name__.rpartition('.')[2].removesuffix('_scripts')}.{name}"
        for module in _MODULES
        for name, text in vars(module).items()
        if name.isupper() and isinstance(text, str) and "redis.call" in text
    }


def short(command: Command, names: dict[str, str]) -> str:
    """A command for people: a script by its name."""
    if command[0] == "EVAL":
        command = (names[str(command[1])], *command[3:])
    words = [word.decode() if isinstance(word, bytes) else str(word) for word in command]
    return " ".join(words)
