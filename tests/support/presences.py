"""What the tests of presence look at in Redis."""

import asyncio

import pytest
from fakes import store_down

from lesson_server.stores.redis.claims import Claims
from lesson_server.stores.redis.presence import Presence
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord
from lesson_server.stores.redis.removals import Removals
from lesson_server.stores.redis.seats import Seats

RETENTION = 7 * 86_400

GRACE = 60.0

DAY = 86_400

# What nodes say of themselves, as long as they live.
KEYS_OF_NODES = {"lesson_node_counts", "lesson_node_figures"}

# The server's own keys that are neither of one node nor of one entry.
SHARED_KEYS = {*KEYS_OF_NODES, "lesson_node_lessons", "lesson_node_seat_deadlines"}

TEACHER = TeacherRecord("sid-t", "1", "ms-hill")

CLIENT = ClientRecord("sid-p", "1", "p1", "student")

RECORDS = pytest.mark.parametrize("record", [TEACHER, CLIENT], ids=["teacher", "participant"])


def new_presence(store, retention=RETENTION, claims=Claims, removals=Removals, grace=GRACE):
    """The presence of a node, made as the server makes it; a test may give a class with a planted defect."""
    own_claims = claims(store, retention, Seats(store, retention, grace))
    return Presence(store, own_claims, removals(store, own_claims))


def other(record, sid, **more):
    return type(record)(**{**{field: getattr(record, field) for field in record.__slots__}, "sid": sid, **more})


def lesson_field(redis_client, record):
    """The sid by which Redis tells that somebody is in the lesson."""
    if isinstance(record, TeacherRecord):
        return redis_client.hget(f"lesson_teacher_{record.lesson_id}", record.user_id)
    return redis_client.hget(f"lesson_student_{record.lesson_id}", record.client_id)


def own_keys(redis_client):
    """The keys of the server's own, but what nodes say of themselves."""
    return [key for key in redis_client.keys("lesson_node*") if key not in KEYS_OF_NODES]


class MasterDown:
    """Of the masters of a cluster, the one that has a certain key fails, and with it each step that needs the key.

    Attributes:
        failed: how many steps have failed.
    """

    def __init__(self, monkeypatch, presence, key):
        self.failed = 0
        execute = presence._store.execute

        async def fails(*commands, bookkeeping=()):
            if any(key in command for command in commands):
                self.failed += 1
                raise store_down()
            return await execute(*commands, bookkeeping=bookkeeping)

        monkeypatch.setattr(presence._store, "execute", fails)

    async def until_failed(self, times):
        while self.failed < times:
            await asyncio.sleep(0.001)
