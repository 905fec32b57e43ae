"""Nodes in one process, and what the tests of nodes look at in Redis."""

import asyncio
from collections import Counter

from presences import GRACE, KEYS_OF_NODES, new_presence

from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.nodes import Node
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord
from lesson_server.stores.redis.seats import Seats

RETENTION = 7 * 86_400

TEACHER = TeacherRecord("a-t", "1", "ms-hill")

CLIENT = ClientRecord("a-p", "1", "p1", "student")


class House:
    """A node with connections of its own, which are no more than their records."""

    def __init__(self, url, retention=RETENTION):
        self.store = RedisStore(url, "", 2.0, 8)
        self.presence = new_presence(self.store, retention)
        self.seats = Seats(self.store, RETENTION, GRACE)
        self.lost = []  # for each node that this one was the first to find lost, how often it had been so before
        self.corrected = Counter()
        self.node = Node(self.store, self.presence, self.seats, self, self._note_lost, self._note_correction)
        self.records = {}
        self.lessons = {}
        self.seat_of = {}  # sid → seat

    @property
    def node_id(self):
        return self.presence.claims.incarnation.node_id

    def _note_lost(self):
        self.lost.append(len(self.lost))

    def _note_correction(self, correction, count):
        self.corrected[correction] += count

    async def join(self, *records):
        for record in records:
            self.records[record.sid] = record
            await self.presence.write(record)

    async def leave(self, record):
        del self.records[record.sid]
        await self.presence.remove(record.sid)
        await self.presence.removals.settled()

    async def beat(self, times=1):
        """Heartbeats, with the sweeps that they begin."""
        for _ in range(times):
            await self.node.beat()
            await asyncio.gather(*self.node._sweeps.values())

    async def close(self):
        await self.node.close()
        await self.presence.removals.close()
        await self.store.close()

    # The protocol nodes.Connections

    def figures(self):
        return {"connections": len(self.records), "guests": 0}

    def present(self):
        return list(self.records)

    def seated(self):
        return self.lessons

    def holders(self):
        return {
            sid: (record.lesson_id, record.client_id) for sid, record in self.records.items() if sid in self.seat_of
        }

    async def restore(self, sids):
        for sid in sids:
            for lesson_id, seated in self.lessons.items():
                if sid in seated:
                    await self.seats.ensure_map(lesson_id, 3)
            if sid in self.records:
                await self.presence.restore(self.records[sid])
            if sid in self.seat_of:
                lesson_id, person = self.holders()[sid]
                await self.seats.restore(lesson_id, person, self.seat_of[sid])
        return len(self.records.keys() & sids)


def own_keys(redis_client):
    """What the server keeps for itself, but the counts of the nodes."""
    return sorted(key for key in redis_client.keys("lesson_node*") if key not in KEYS_OF_NODES)


def known(redis_client):
    return set(redis_client.hkeys("lesson_node_counts"))


def snapshot(redis_client):
    return {key: redis_client.hgetall(key) for key in redis_client.keys("*")}


def logged(caplog):
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def commands_of(redis_client):
    return sum(stat["calls"] for stat in redis_client.info("commandstats").values())
