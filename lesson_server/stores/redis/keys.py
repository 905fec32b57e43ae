"""The name of every key in Redis, without ``redis.key_prefix``. Source: contract, section 5.

The names of people become keys too, which is why none of them may begin with ``lesson_``. Keys of the server's own
begin with ``lesson_node``.
"""

# node id → the count of its writes and heartbeats.
NODE_COUNTS = "lesson_node_counts"
# The channel on which nodes publish what is emitted to rooms.
ROOMS = "lesson_node_rooms"


def seat_map(lesson_id: str) -> str:
    """Return the key of the seats of a lesson: seat number → who sits there, or an empty text."""
    return f"lesson_seat_{lesson_id}"


def teachers(lesson_id: str) -> str:
    """Return the key of the teachers in a lesson: user_id → sid."""
    return f"lesson_teacher_{lesson_id}"


def teacher(user_id: str) -> str:
    """Return the key of a teacher: ``lesson_id``, the lesson of the latest live connection."""
    return user_id


def students(lesson_id: str) -> str:
    """Return the key of the participants in a lesson: client_id → sid."""
    return f"lesson_student_{lesson_id}"


def client(client_id: str) -> str:
    """Return the key of a participant: ``sid``, ``client_id``, ``role``."""
    return client_id


def node_index(node_id: str) -> str:
    """Return the key of what a node has written: number of a claim → its record."""
    return f"lesson_node_{node_id}"


def claims(field: str, key: str) -> str:
    """Return the key of the claims on an entry, a sorted set.

    Args:
        field: the first field of the entry.
        key: of the entry, with the prefix. The braces are a hash tag: a cluster keeps both keys in one slot.
    """
    return f"lesson_node_claims:{field}{{{key}}}"
