"""The names of all keys in Redis, without ``redis.key_prefix``.

Source: contract, section 5. A ``user_id`` and a ``client_id`` are keys too, so none may begin with ``lesson_``. The
server's internal keys begin with ``lesson_node``.
"""

# node id → the count of the node's writes and heartbeats.
NODE_COUNTS = "lesson_node_counts"
# node id → its connections and guests, and when its last heartbeat was, as JSON.
NODE_FIGURES = "lesson_node_figures"
# The lessons in which somebody is, sorted.
LESSONS = "lesson_node_lessons"
# The pub/sub channel on which nodes publish what is emitted to rooms.
ROOMS = "lesson_node_rooms"
# The pub/sub channel of the messages between nodes.
MESSAGES = "lesson_node_messages"


def console_session(digest: str) -> str:
    """Return the key of a session of the console, whose value is empty."""
    return f"lesson_node_console:{digest}"


def echoes(name: str) -> str:
    """Return the pub/sub channel on which a node publishes echoes for itself."""
    return f"lesson_node_echoes_{name}"


def seat_map(lesson_id: str) -> str:
    """Return the key of the seat map of a lesson: seat number → occupant, or an empty string."""
    return f"lesson_seat_{lesson_id}"


def teachers(lesson_id: str) -> str:
    """Return the key of the teachers in a lesson: user_id → sid."""
    return f"lesson_teacher_{lesson_id}"


def teacher(user_id: str) -> str:
    """Return the key of a teacher: ``lesson_id``, the lesson of the newest open connection."""
    return user_id


def students(lesson_id: str) -> str:
    """Return the key of the participants in a lesson: client_id → sid."""
    return f"lesson_student_{lesson_id}"


def client(client_id: str) -> str:
    """Return the key of a participant: ``sid``, ``client_id``, ``role``."""
    return client_id


def node_index(node_id: str) -> str:
    """Return the key of the index of what a node has written: claim number → record."""
    return f"lesson_node_{node_id}"


def claims(field: str, key: str) -> str:
    """Return the key of the sorted set of claims on an entry.

    Args:
        field: the first field of the entry.
        key: the entry's key, with the prefix. The braces make it a hash tag: a cluster keeps both keys in one slot.
    """
    return f"lesson_node_claims:{field}{{{key}}}"
