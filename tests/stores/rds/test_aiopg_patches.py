"""aiopg_patches.py on the loop of the server, whose way with errors it makes up for."""

import importlib.metadata
import inspect
import select
import socket
from types import SimpleNamespace

import aiopg.connection
import pytest

from lesson_server.stores.rds import aiopg_patches
from lesson_server.stores.rds.lesson import Lesson


@pytest.fixture
def lessons(open_lessons):
    return open_lessons(timeout=60.0, pool_size=1)


def test_a_query_on_a_connection_that_the_loop_has_dropped_does_not_wait_for_ever(io_loop, lessons, sql):
    """The loop drops one on whose descriptor there is an error, whatever is still to be read."""
    (dead,) = lessons._rds._for_lookups._idle
    sql.execute("SELECT pg_terminate_backend(%s)", (dead.raw.get_backend_pid(),))
    poller = select.poll()
    poller.register(dead.raw.fileno(), 0)
    poller.poll(10_000)
    io_loop.asyncio_loop.remove_reader(dead.raw.fileno())
    assert not dead.closed
    assert io_loop.run_sync(lambda: lessons.get("1"), timeout=20) == Lesson("1", 30)
    assert dead.closed


@pytest.mark.gen_test
async def test_who_gets_the_number_of_a_closed_descriptor_can_be_watched(io_loop):
    loop = io_loop.asyncio_loop
    dead, other = socket.socketpair()
    descriptor = dead.fileno()
    loop.add_writer(descriptor, lambda: None)
    dead.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        aiopg_patches._select([descriptor], [], [], 0)
    near, far = socket.socketpair()
    assert near.fileno() == descriptor
    heard = loop.create_future()
    loop.add_reader(near, lambda: heard.done() or heard.set_result(None))
    far.send(b"!")
    await heard
    loop.remove_reader(near)
    for end in (near, far, other):
        end.close()


def test_the_private_parts_that_we_lean_on_are_as_they_were(lessons):
    assert importlib.metadata.version("aiopg").startswith("1.4.")
    assert isinstance(vars(aiopg.connection)["select"], SimpleNamespace)
    source = inspect.getsource(aiopg_patches._ready)
    assert "select.select([self._fileno], [], [], 0)" in source
    assert list(inspect.signature(aiopg_patches._ready).parameters) == ["weak_self"]
    (connection,) = lessons._rds._for_lookups._idle
    assert connection._fileno == connection.raw.fileno()
    assert connection._weakref() is connection
    assert connection._waiter is None
