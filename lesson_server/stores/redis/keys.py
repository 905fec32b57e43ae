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
# person in a lesson → the time at which it is to be checked whether the person's seat is free again, in milliseconds.
SEAT_DEADLINES = "lesson_node_seat_deadlines"
# The pub/sub channel of all nodes, for what is emitted to rooms by other programs, or to single clients.
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


def seat_index(seat_map_key: str) -> str:
    """Return the key of the index of a seat map, with which a seat is found without reading the whole map.

    Args:
        seat_map_key: the key of the seat map, with the prefix. The braces keep both keys in one slot of a cluster.
    """
    return f"lesson_node_seats:{{{seat_map_key}}}"


def freed_seats(seat_map_key: str) -> str:
    """Return the key of the sorted set of seats that were taken and are free again; the braces as in seat_index."""
    return f"lesson_node_freed_seats:{{{seat_map_key}}}"


def room(seat_map_key: str) -> str:
    """Return the sharded pub/sub channel of what is emitted to the room of a lesson.

    Args:
        seat_map_key: the key of the lesson's seat map, with the prefix. The braces keep the channel in the slot of the
            key, so that a script that changes the map can publish the change.
    """
    return f"lesson_node_room:{{{seat_map_key}}}"


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
