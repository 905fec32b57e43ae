"""What the tests of seats look at in Redis, and what is told of the changes."""

import json

from pydantic import TypeAdapter

from lesson_server.events.seat_changed import SEAT_CHANGED, SeatChanged

MAP = "lesson_seat_1"
INDEX = "lesson_node_seats:{lesson_seat_1}"
FREED = "lesson_node_freed_seats:{lesson_seat_1}"
DEADLINES = "lesson_node_seat_deadlines"
CHANNEL = "lesson_node_room:{lesson_seat_1}"

# In this grace nothing is freed while a test runs.
GRACE = 60.0


def taken(redis_client, key=MAP):
    """Who sits where: seat → occupant, without the free seats."""
    return {int(seat): occupant for seat, occupant in redis_client.hgetall(key).items() if occupant}


def known(redis_client, person, key=INDEX):
    """The seat that the index has of a person, and the milliseconds until it is due; None if it has none."""
    value = redis_client.hget(key, person)
    if value is None:
        return None
    seat, due = value.split()
    seconds, microseconds = redis_client.time()
    return int(seat), int(due) - seconds * 1000 - microseconds // 1000


def deadlines(redis_client):
    """Who is to be looked at: person → milliseconds from now."""
    seconds, microseconds = redis_client.time()
    entries = redis_client.zrange(DEADLINES, 0, -1, withscores=True)
    return {json.loads(entry)[1]: int(at) - seconds * 1000 - microseconds // 1000 for entry, at in entries}


def make_due(redis_client, person, *, lesson="1"):
    """Lets the grace of a person pass: in the index, and in the deadlines."""
    key = INDEX.replace("_1}", f"_{lesson}}}")
    seat, _ = redis_client.hget(key, person).split()
    redis_client.hset(key, person, f"{seat} 1")
    assert redis_client.zadd(DEADLINES, {json.dumps([lesson, person], separators=(",", ":")): 1}, xx=True, ch=True) == 1


class Onlooker:
    """Reads what is published on the channel of lesson 1."""

    def __init__(self, redis_client):
        self._pubsub = redis_client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.ssubscribe(CHANNEL)
        assert self._pubsub.get_sharded_message(timeout=5) is None  # the subscription

    def changes(self, count):
        """The next changes, each as seat and occupant; fails if there are more or fewer."""
        messages = [self._pubsub.get_sharded_message(timeout=5) for _ in range(count)]
        assert self._pubsub.get_sharded_message(timeout=0.05) is None
        changes = []
        for message in messages:
            emit = json.loads(message["data"])
            (data,) = emit.pop("data")
            assert emit == {"method": "emit", "event": SEAT_CHANGED.name, "namespace": "/", "room": "1"}
            TypeAdapter(SEAT_CHANGED.data).validate_python(data, strict=True)
            assert data.keys() == SeatChanged.__annotations__.keys()
            changes.append((data["seat"], data["client_id"]))
        return changes

    def close(self):
        self._pubsub.close()
