"""A Redis Cluster of three masters, lessons whose keys are all on one of them, and participants of these lessons."""

import contextlib
from itertools import islice

from clients import client
from redis.crc import key_slot
from valkeys import Valkeys, eventually

SLOTS = ((0, 5460), (5461, 10922), (10923, 16383))
# Seconds in which a master counts as failed for the others. Its slots are not served then, those of the others are.
NODE_TIMEOUT = 1000


class Cluster:
    """Three masters, each with a third of the slots and no replica."""

    def __init__(self, directory):
        self.valkeys = Valkeys(directory)
        options = ("cluster-enabled yes", "cluster-require-full-coverage no", f"cluster-node-timeout {NODE_TIMEOUT}")
        self.ports = [self.valkeys.start(*options) for _ in SLOTS]
        for port, (first, last) in zip(self.ports, SLOTS, strict=True):
            self.valkeys.ask(port, "CLUSTER", "ADDSLOTSRANGE", first, last)
        for port in self.ports[1:]:
            self.valkeys.ask(self.ports[0], "CLUSTER", "MEET", "127.0.0.1", port)

    def wait_until_it_serves(self):
        for port in self.ports:
            eventually(lambda port=port: self._knows_all(port))

    def _knows_all(self, port):
        info = self.valkeys.ask(port, "CLUSTER", "INFO")
        return "cluster_state:ok" in info and "cluster_slots_ok:16384" in info

    @property
    def url(self):
        return f"redis+cluster://127.0.0.1:{self.ports[0]}"

    def master_of(self, key):
        """The index of the master that serves a key."""
        slot = key_slot(key.encode())
        return next(index for index, (first, last) in enumerate(SLOTS) if first <= slot <= last)

    def names(self, master, count):
        """Keys that are served by that master."""
        numbered = (f"n{number}" for number in range(10_000))
        return list(islice((name for name in numbered if self.master_of(name) == master), count))

    def signal(self, master, number):
        self.valkeys._running[self.ports[master]].send_signal(number)

    def hgetall(self, key):
        return self.valkeys.ask(self.ports[self.master_of(key)], "HGETALL", key)

    def id_of(self, port):
        return self.valkeys.ask(port, "CLUSTER", "MYID")

    def add_replica(self, master):
        """Starts a replica of that master, with all of its data, and returns its port."""
        port = self.valkeys.start("cluster-enabled yes", f"cluster-node-timeout {NODE_TIMEOUT}")
        self.valkeys.ask(port, "CLUSTER", "MEET", "127.0.0.1", self.ports[0])
        eventually(lambda: self._knows_all(port))
        self.valkeys.ask(self.ports[master], "CONFIG", "SET", "repl-diskless-sync-delay", 0)
        self.valkeys.ask(port, "CLUSTER", "REPLICATE", self.id_of(self.ports[master]))
        eventually(lambda: self.valkeys.ask(port, "INFO", "replication")["master_link_status"] == "up")
        return port

    def migrate(self, key, source, target):
        """Moves the slot of a key, with all of its keys, from one master to another."""
        slot = key_slot(key.encode())
        from_port, to_port = self.ports[source], self.ports[target]
        self.valkeys.ask(to_port, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(from_port))
        self.valkeys.ask(from_port, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to_port))
        keys = self.valkeys.ask(from_port, "CLUSTER", "GETKEYSINSLOT", slot, 100)
        self.valkeys.ask(from_port, "MIGRATE", "127.0.0.1", to_port, "", 0, 5000, "KEYS", *keys)
        for port in (to_port, from_port):
            self.valkeys.ask(port, "CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to_port))

    def subscribers(self, lesson_id, ports=None):
        """How many nodes are subscribed to the channel of a lesson on each master."""
        channel = f"lesson_node_room:{{lesson_seat_{lesson_id}}}"
        return [self.valkeys.ask(port, "PUBSUB", "SHARDNUMSUB", channel)[1] for port in ports or self.ports]


def lesson_on(cluster, sql, master):
    """A lesson whose keys in Redis are all on one master."""
    sql.execute("SELECT id FROM lessons")
    made = {lesson_id for (lesson_id,) in sql.fetchall()}
    for lesson_id in (f"L{number}" for number in range(10_000)):
        if lesson_id in made:
            continue
        if cluster.master_of(f"lesson_seat_{lesson_id}") == cluster.master_of(f"lesson_student_{lesson_id}") == master:
            sql.execute("INSERT INTO lessons (id, seat_count) VALUES (%s, 3)", (lesson_id,))
            return lesson_id
    raise AssertionError


@contextlib.asynccontextmanager
async def participants(server, mint, lesson_id, people):
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                client(server, client="participant", lesson_id=lesson_id, access_token=mint(person))
            )
            for person in people
        ]
