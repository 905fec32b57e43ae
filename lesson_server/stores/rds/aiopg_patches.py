"""Fixes for aiopg 1.4, which mishandles the file descriptors of its connections, mostly when RDS closes them.

The fixes depend on private parts of aiopg; ``tests/stores/rds/test_aiopg_patches.py`` fails when one changes.
"""

import asyncio
import select
from types import SimpleNamespace
from weakref import ref

import aiopg.connection
from aiopg import Connection

BAD = select.POLLERR | select.POLLHUP | select.POLLNVAL

_ready = Connection._ready


def apply() -> None:
    """Replace the faulty parts of aiopg."""
    aiopg.connection.select = SimpleNamespace(select=_select)  # type: ignore[assignment,attr-defined]
    Connection._ready = staticmethod(_ready_and_watched)  # type: ignore[assignment]


def _select(readable: list[int], _writable: object, _exceptional: object, _timeout: float) -> None:
    """Replace the ``select.select`` by which aiopg checks after an SQL error whether its descriptor is still open.

    ``select`` raises ValueError for a descriptor above 1023. aiopg does not catch it, and the query waits forever.
    """
    if _events(readable[0]) & select.POLLNVAL:
        # aiopg removes only the reader of such a descriptor from the loop. uvloop would then refuse to watch the next
        # descriptor with the same number, e.g. that of a client.
        asyncio.get_running_loop().remove_writer(readable[0])
        raise OSError(9, "Bad file descriptor")


def _ready_and_watched(weak_connection: "ref[Connection]") -> None:
    """Do what aiopg does when a descriptor is ready, and watch the descriptor again.

    uvloop stops watching a descriptor once it has reported an error on it. If aiopg has not read up to that error, its
    query would wait forever.
    """
    _ready(weak_connection)
    connection = weak_connection()
    if connection is not None and connection._waiter is not None and not connection._waiter.done():
        descriptor = connection._fileno
        if descriptor is not None and _events(descriptor) & BAD:
            asyncio.get_running_loop().call_soon(_watch_again, connection, descriptor)


def _watch_again(connection: Connection, descriptor: int) -> None:
    if not connection.closed and connection.raw.fileno() == descriptor == connection._fileno:
        loop = asyncio.get_running_loop()
        loop.remove_reader(descriptor)
        loop.add_reader(descriptor, connection._ready, connection._weakref)


def _events(descriptor: int) -> int:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return sum(events for _, events in poller.poll(0))
