"""Redis: which processes ("nodes") are alive, so that presence does not outlive its node, and Redis stays correct.

==========================  ========================================================================================
``lesson_node_counts``      node id → the count of the node's writes and heartbeats; below 0: the node is lost
``lesson_node_figures``     node id → the numbers of its connections and guests, and the time of its last heartbeat
``lesson_node_{node_id}``   the node's index: claim number → record; see claims.py
==========================  ========================================================================================

*Lost nodes.* A node adds 1 to its count every HEARTBEAT_INTERVAL seconds. A node is lost if its count is the same in
LOST_AFTER + 1 successive heartbeats of another node. No clocks are compared, so the clock of Redis may jump. While
Redis is unavailable, no heartbeats are counted. All nodes that notice a lost node sweep it together, a random part of
its index at a time, so that it does not matter if a sweeping node dies in mid-sweep.

*Lost data.* A node knows how many of its writes Redis has acknowledged. If its count in Redis is lower, Redis came back
empty or with older data, or another node has marked this node as lost. The node then begins a new *incarnation* under a
new id, writes again what its connections hold, and sweeps its former id. A node checks all of its records after each
failure of Redis and each new subscription. Otherwise it checks a few records at a time, each within CHECK_PERIOD.

The cost of a heartbeat does not grow with the number of connections.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import orjson

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.stores.redis.presence import Presence
from lesson_server.stores.redis.removals import BATCH_SIZE, REMOVAL_PATIENCE
from lesson_server.stores.redis.seats import Seats
from lesson_server.stores.redis.store import Store
from lesson_server.tasks import end

logger = EventLogger(__name__)

# Seconds between two heartbeats.
HEARTBEAT_INTERVAL = 1.0
# Heartbeats of another node in which a node's count may stay the same: a node that stalls for 5 s is not lost.
LOST_AFTER = 9
# The count of a lost node, so far below 0 that the node's own increments never reach 0.
LOST = -(2**52)
# Seconds in which every record is checked once. A record that Redis loses is written again within twice this time.
CHECK_PERIOD = 30.0
# Seconds until a failed check of the records is repeated.
CHECK_RETRY_INTERVAL = 1.0
# TTL in seconds of an index. Other nodes sweep a dead node long before; without other nodes, it ends with the records.
INDEX_LIFE = 7 * 24 * 60 * 60


class Connections(Protocol):
    """What a node needs from its connections."""

    def figures(self) -> Mapping[str, int]:
        """Return the numbers of ``connections`` and ``guests``."""

    def present(self) -> Sequence[str]:
        """Return the sids of the connections whose presence Redis should hold."""

    def seated(self) -> Mapping[str, Sequence[str]]:
        """Return the lessons whose seat map Redis should hold, each with the sids of the connections in the lesson."""

    def holders(self) -> Mapping[str, tuple[str, str]]:
        """Return the connections of people who have a seat: sid → the lesson and the ``client_id``."""

    async def restore(self, sids: Sequence[str]) -> int:
        """Write again what these connections hold in Redis.

        Returns:
            number of these connections that still exist.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """


class Node:
    """This process as one of the nodes.

    Args:
        store: the connection to Redis.
        presence: writes and removes the records, and maintains the index.
        seats: the seat maps.
        connections: the connections of this node.
        observe_lost: called for each node that this node is the first to find lost.
        observe_correction: called with a kind of correction and a number of presence records: ``swept`` of a lost node,
            ``restored`` after a loss of data, ``removed`` because they have no connection.
    """

    def __init__(
        self,
        store: Store,
        presence: Presence,
        seats: Seats,
        connections: Connections,
        observe_lost: Callable[[], None] = lambda: None,
        observe_correction: Callable[[str, int], None] = lambda correction, count: None,
    ) -> None:
        self._store = store
        self._presence = presence
        self._claims = presence.claims
        self._seats = seats
        self._connections = connections
        self._observe_lost = observe_lost
        self._observe_correction = observe_correction
        # Node id → the node's count, and the number of successive heartbeats that have found it unchanged.
        self._silences: dict[str, tuple[int | None, int]] = {}
        self._former: set[str] = set()  # earlier ids of this node, still to be swept
        self._sweeps: dict[str, asyncio.Task[None]] = {}
        self._wanted = asyncio.Event()  # all records are to be checked now
        self._failures = 0  # failures of Redis for which a check of all records has been requested
        self._tasks: list[asyncio.Task[None]] = []
        presence.removals.on_removed = self._note_removed

    async def start(self) -> None:
        """Register the node, and start its heartbeats and checks.

        Raises:
            StoreUnavailable: Redis can't be reached.
        """
        await self.beat()
        self._tasks = [asyncio.create_task(self._send_heartbeats()), asyncio.create_task(self._check_repeatedly())]

    async def close(self) -> None:
        """Stop, and unregister unless the index has entries: other nodes sweep a node that stays registered."""
        if not self._tasks:
            return
        await asyncio.gather(*map(end, [*self._tasks, *self._sweeps.values()]))
        node_id = self._claims.incarnation.node_id
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(REMOVAL_PATIENCE):
                (indexed,) = await self._store.execute(("HLEN", self._claims.index_key(node_id)))
                if not indexed:
                    await self._unregister(node_id)

    def check_all(self) -> None:
        """Request a check of all records now, because Redis may have lost some without a heartbeat noticing."""
        self._wanted.set()

    @property
    def alive(self) -> int:
        """The number of nodes that were alive at the last heartbeat, this node included."""
        silences = self._silences.values()
        return 1 + sum(count is not None and count >= 0 and beats < LOST_AFTER for count, beats in silences)

    # Heartbeats

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL)
            try:
                await self.beat()
            except StoreRefused as error:
                logger.error("heartbeat_refused", "heartbeat refused: {cause}", cause=error.cause)
            except StoreUnavailable:
                pass  # the outage has been logged
            except Exception:
                logger.exception("heartbeat_failed", "heartbeat failed")

    async def beat(self) -> None:
        """Send one heartbeat, and act on the answer.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        incarnation = self._claims.incarnation
        acknowledged = incarnation.acknowledged
        figures = orjson.dumps({**self._connections.figures(), "heard_of": time.time()})
        _, count, counts, _ = await self._store.execute(
            ("HINCRBY", self._claims.nodes_key, incarnation.node_id, 1),
            ("HGETALL", self._claims.nodes_key),
            ("EXPIRE", self._claims.index_key(incarnation.node_id), INDEX_LIFE),
            bookkeeping=(("HSET", self._claims.figures_key, incarnation.node_id, figures),),
        )
        incarnation.acknowledged += 1
        if count <= acknowledged:
            logger.warning("redis_data_lost", "Redis has lost what this node wrote: it is written again")
            self._former.add(incarnation.node_id)
            self._claims.begin_incarnation()
            self.check_all()
        if self._store.failures != self._failures:
            self._failures = self._store.failures
            self.check_all()
        self._note_silences({name: int(value) for name, value in counts.items()})

    def _note_silences(self, counts: dict[str, int]) -> None:
        """Note which nodes are silent, and begin to sweep the lost nodes.

        A node whose count is gone is silent too: either it has unregistered with an empty index, or Redis has lost the
        count.
        """
        silences: dict[str, tuple[int | None, int]] = {}
        for node_id in counts.keys() | self._silences.keys():
            if node_id == self._claims.incarnation.node_id or node_id in self._former:
                continue
            count = counts.get(node_id)
            last_count, beats = self._silences.get(node_id, (None, -1))
            beats = beats + 1 if count == last_count else 0
            is_lost = beats >= LOST_AFTER or (count is not None and count < 0)
            if is_lost:
                if beats == LOST_AFTER and count is not None and count >= 0:  # no other node has marked it before
                    self._observe_lost()
                self._begin_sweep(node_id)
            if not is_lost or count is not None:
                silences[node_id] = count, beats
        self._silences = silences

    # Sweeps. Each is a separate task: if heartbeats waited for the sweep of a large node, this node would become lost.

    def _begin_sweep(self, node_id: str) -> None:
        if node_id not in self._sweeps:
            task = self._sweeps[node_id] = asyncio.create_task(self._sweep(node_id))
            task.add_done_callback(partial(self._end_sweep, node_id))

    def _end_sweep(self, node_id: str, task: asyncio.Task[None]) -> None:
        del self._sweeps[node_id]
        error = None if task.cancelled() else task.exception()
        if error is not None and (isinstance(error, StoreRefused) or not isinstance(error, StoreUnavailable)):
            logger.exception("node_sweep_failed", "sweep of node {node} failed", error, node=node_id)

    async def _sweep(self, node_id: str) -> None:
        """Remove everything that a lost node has written."""
        # A node that is still alive finds LOST at its next heartbeat. If this node dies, other nodes sweep at once.
        await self._store.execute(("HSET", self._claims.nodes_key, node_id, LOST))
        swept = await self._remove_all_of(node_id)
        if swept:
            logger.warning(
                "node_lost",
                "node {node} is lost; the presence of {connections} connections was removed",
                node=node_id,
                connections=swept,
            )

    async def _remove_all_of(self, node_id: str) -> int:
        swept = 0
        while removed := await self._presence.removals.sweep(node_id):
            swept += removed
        await self._unregister(node_id)
        return swept

    def _note_removed(self, node_id: str, count: int) -> None:
        if node_id == self._claims.incarnation.node_id:
            self._observe_correction("removed", count)
        elif node_id not in self._former:  # claims under a former id have been replaced
            self._observe_correction("swept", count)

    async def _unregister(self, node_id: str) -> None:
        await self._store.execute(
            ("HDEL", self._claims.nodes_key, node_id), ("HDEL", self._claims.figures_key, node_id)
        )

    # The records of this node

    async def _check_repeatedly(self) -> None:
        """Check the records forever: all at once when requested, else a few at a time."""
        while True:
            wanted = self._wanted.is_set()
            self._wanted.clear()
            try:
                await self.check_records(paced=not wanted)
                continue
            except StoreRefused as error:
                logger.error("record_check_refused", "check of the records refused: {cause}", cause=error.cause)
            except StoreUnavailable:
                pass  # the outage has been logged
            except Exception:
                logger.exception("record_check_failed", "check of the records failed")
            self.check_all()
            await asyncio.sleep(CHECK_RETRY_INTERVAL)

    async def check_records(self, *, paced: bool = False) -> None:
        """Make Redis match the connections: write lost records again, and remove records without a connection.

        Args:
            paced: spread the check over CHECK_PERIOD; :meth:`check_all` ends it early.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        present = self._connections.present()
        batches = [present[start : start + BATCH_SIZE] for start in range(0, len(present), BATCH_SIZE)]
        pause = min(CHECK_PERIOD, self._claims.shortest_ttl / 3) / (len(batches) + 1) if paced else 0.0
        restored = removed = 0
        for batch in batches:
            missing = await self._presence.check(batch)
            restored_now = await self._connections.restore(missing)
            self._observe_correction("restored", restored_now)
            restored += restored_now
            if await self._is_interrupted(pause):
                return
        await self._check_seat_maps()
        await self._check_seats()
        for former in list(self._former):  # its claims have just been replaced
            removed += await self._remove_all_of(former)
            self._former.discard(former)
            self.check_all()  # a join in progress may have been written under the former id
        async for strays in self._presence.removals.strays():
            removed += strays
        if restored or removed:
            logger.warning(
                "records_repaired",
                "Redis and this node differed: {restored} records written again, {removed} removed",
                restored=restored,
                removed=removed,
            )
        await self._is_interrupted(pause)

    async def _check_seat_maps(self) -> None:
        seated = self._connections.seated()
        lessons = list(seated)
        for start in range(0, len(lessons), BATCH_SIZE):
            for lesson_id in await self._seats.missing(lessons[start : start + BATCH_SIZE]):
                for first in range(0, len(seated[lesson_id]), BATCH_SIZE):
                    await self._connections.restore(seated[lesson_id][first : first + BATCH_SIZE])

    async def _check_seats(self) -> None:
        """Restore seats in a seat map that another node has written again without them."""
        holders = self._connections.holders()
        sids = list(holders)
        for start in range(0, len(sids), BATCH_SIZE):
            batch = {sid: holders[sid] for sid in sids[start : start + BATCH_SIZE]}
            if lost := await self._seats.lost(batch):
                await self._connections.restore(lost)

    async def _is_interrupted(self, pause: float) -> bool:
        """Wait, and return whether a check of all records has been requested."""
        if not pause:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._wanted.wait()
        return self._wanted.is_set()
