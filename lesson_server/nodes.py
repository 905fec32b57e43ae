"""Redis: which processes ("nodes") are alive, and what each of them wrote, so that nobody's presence outlives its node.

==========================  ========================================================================================
``lesson_nodes``            node id → when it was last heard of, in ms of Redis' clock; or ``lost:`` + node id → when
                            another node began to sweep it
``lesson_node_{node_id}``   the node's index, written in the round trip that writes the presence: sid → its record
==========================  ========================================================================================

A node is heard of every HEARTBEAT_INTERVAL seconds. One that was not heard of for LEASE seconds is lost: the first that
notices sweeps it, which takes away exactly what still holds a sid of its index. A sweep that was begun and not ended is
begun again by another node. So a ghost lives at most LEASE + HEARTBEAT_INTERVAL seconds and the time of the sweep.

What a heartbeat costs does not grow with the number of connections: it counts the index and does not read it.
"""

import asyncio
import contextlib
import logging
from functools import partial
from typing import Protocol

from lesson_server.errors import StoreUnavailable
from lesson_server.presence import BATCH_SIZE, REMOVAL_PATIENCE, Presence
from lesson_server.redis_store import RedisStore

logger = logging.getLogger(__name__)

# Seconds.
HEARTBEAT_INTERVAL = 10.0
LEASE = 30.0
# A sweep that takes longer than this is taken over; it works in batches, each of which is a round trip or two.
SWEEP_PATIENCE = 30.0
# While Redis is away, or this node is being swept: soon after it is over, the node must know.
RETRY_INTERVAL = 1.0
# The index of a node that died is swept long before; should nobody be there to do it, it ends with the records.
INDEX_LIFE = 7 * 24 * 60 * 60

# Answers whether the node was still known, whether somebody is sweeping it, and which lost nodes it is to sweep.
HEARTBEAT = """
local node, lease, patience = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HEXISTS', KEYS[1], node)
local swept = redis.call('HEXISTS', KEYS[1], 'lost:' .. node)
local to_sweep = {}
local entries = redis.call('HGETALL', KEYS[1])
for position = 1, #entries, 2 do
    local name, age = entries[position], now - tonumber(entries[position + 1])
    local lost = string.match(name, '^lost:(.*)$')
    if lost and age > patience then
        redis.call('HSET', KEYS[1], name, now)
        to_sweep[#to_sweep + 1] = lost
    elseif not lost and name ~= node and age > lease then
        redis.call('HDEL', KEYS[1], name)
        redis.call('HSET', KEYS[1], 'lost:' .. name, now)
        to_sweep[#to_sweep + 1] = name
    end
end
if swept == 0 then
    redis.call('HSET', KEYS[1], node, now)
end
return {known, swept, to_sweep}
"""


class Connections(Protocol):
    """What a node asks of the connections that it holds."""

    def holds(self, sid: str) -> bool:
        """Whether there is such a connection, in whatever state."""

    def may_be_present(self, sid: str) -> bool:
        """Whether there is such a connection, and it is registered or joins at the moment."""

    async def restore(self, indexed: set[str]) -> None:
        """Writes again what the connections hold in Redis, except the presence of those that the index still has.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """


class Node:
    """This process among the others.

    Args:
        node_id: names it.
        store: the connection to Redis.
        presence: writes and removes the records, and keeps the index.
        connections: the connections of this node.
    """

    def __init__(self, node_id: str, store: RedisStore, presence: Presence, connections: Connections) -> None:
        self._node_id = node_id
        self._store = store
        self._presence = presence
        self._connections = connections
        self._differed = False  # the last heartbeat found the index and the connections to differ
        self._sweeps: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Makes the node known, and keeps it so.

        Raises:
            StoreUnavailable: Redis can't be reached.
        """
        _, _, lost, _ = await self._send_heartbeat()
        self._begin_sweeps(lost)
        self._task = asyncio.create_task(self._live())

    async def close(self) -> None:
        """Leaves. While its index has something in it, the node stays known, so that the others will sweep it."""
        if self._task is None:
            return
        tasks = [self._task, *self._sweeps.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(REMOVAL_PATIENCE):
                (indexed,) = await self._store.run(("HLEN", self._presence.index_key(self._node_id)))
                if not indexed:
                    await self._store.run(("HDEL", self._nodes_key, self._node_id))

    async def _live(self) -> None:
        complete = True
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL if complete else RETRY_INTERVAL)
            try:
                complete = await self._beat(complete)
            except StoreUnavailable:
                complete = False
            except Exception:
                logger.exception("heartbeat failed")
                complete = False

    async def _beat(self, complete: bool) -> bool:
        """One heartbeat and what follows from it.

        Args:
            complete: whether the last one was.

        Returns:
            whether everything that had to follow was done; if not, it is tried again soon.
        """
        known, swept, lost, indexed = await self._send_heartbeat()
        self._begin_sweeps(lost)
        if swept:
            return False  # another node takes our presence for a ghost's; when it is done, we write it again
        differs = indexed != len(self._presence.held)
        if not known or not complete or (differs and self._differed):
            await self._reconcile()
            differs = False
        # A join or an end that is under way makes them differ for a moment.
        self._differed = differs
        return True

    @property
    def _nodes_key(self) -> str:
        return self._store.key("lesson_nodes")

    async def _send_heartbeat(self) -> tuple[bool, bool, list[str], int]:
        index_key = self._presence.index_key(self._node_id)
        lease, patience = int(LEASE * 1000), int(SWEEP_PATIENCE * 1000)
        (known, swept, lost), indexed, _ = await self._store.run(
            ("EVAL", HEARTBEAT, 1, self._nodes_key, self._node_id, lease, patience),
            ("HLEN", index_key),
            ("EXPIRE", index_key, INDEX_LIFE),
        )
        return bool(known), bool(swept), lost, indexed

    def _begin_sweeps(self, lost: list[str]) -> None:
        """Beside the heartbeat: a node that was busy with the sweep of a large one would be taken for lost itself."""
        for node_id in lost:
            if node_id not in self._sweeps:
                task = self._sweeps[node_id] = asyncio.create_task(self._sweep(node_id))
                task.add_done_callback(partial(self._end_sweep, node_id))

    def _end_sweep(self, node_id: str, task: asyncio.Task[None]) -> None:
        del self._sweeps[node_id]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, StoreUnavailable):  # of an outage the log knows
            logger.error("sweep of node %s failed", node_id, exc_info=error)

    async def _sweep(self, node_id: str) -> None:
        """Takes back everything that a lost node has written."""
        swept = 0
        async for records in self._presence.index(node_id):
            for start in range(0, len(records), BATCH_SIZE):
                batch = records[start : start + BATCH_SIZE]
                await asyncio.gather(*(self._presence.take_back_of(node_id, record) for record in batch))
                swept += len(batch)
        await self._store.run(("DEL", self._presence.index_key(node_id)), ("HDEL", self._nodes_key, f"lost:{node_id}"))
        logger.warning("node %s is lost; the presence of its %d connections was removed", node_id, swept)

    async def _reconcile(self) -> None:
        """Makes Redis agree with the connections: it came back empty or stale, or did a write that we had given up."""
        records = [record async for batch in self._presence.index(self._node_id) for record in batch]
        strays = [record for record in records if not self._connections.may_be_present(record.sid)]
        for record in strays:
            # Of a connection that is still here, it is the write of a join that failed: as if it had not been tried.
            await self._presence.remove(record, forget=self._connections.holds(record.sid))
        indexed = {record.sid for record in records}
        lost = self._presence.held - indexed
        await self._connections.restore(indexed)
        if lost or strays:
            logger.warning("Redis and this node differed: %d records written again, %d removed", len(lost), len(strays))
