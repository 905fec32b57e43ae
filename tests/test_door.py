"""door.py: who comes in, and when."""

import asyncio
import itertools
import os
import resource
import socket
from types import SimpleNamespace

import pytest
from edge import until
from tornado.testing import bind_unused_port

from lesson_server import door
from lesson_server.admission import Places
from lesson_server.door import ENTRANTS, Door


class Hall:
    """Stands where the HTTP server stands; keeps whom it is given."""

    def __init__(self):
        self.guests = []

    def handle_stream(self, stream, address):
        self.guests.append(SimpleNamespace(stream=stream, address=address))


@pytest.fixture
def place(io_loop):
    """The hall, its door, and clients before it."""
    listening, port = bind_unused_port()
    hall = Hall()
    place = SimpleNamespace(hall=hall, door=Door(hall, Places(100)), socket=listening, clients=[])

    def arrive(count):
        place.clients += [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]

    place.arrive = arrive
    yield place

    async def leave():
        place.door.close()
        for guest in hall.guests:
            guest.stream.close()

    io_loop.run_sync(leave)
    listening.close()
    for client in place.clients:
        client.close()


@pytest.mark.gen_test
async def test_clients_come_in_a_few_in_each_turn_of_the_loop(place):
    place.arrive(3 * ENTRANTS)
    place.door.open([place.socket])
    entered = [0]
    async with asyncio.timeout(10):
        while entered[-1] < 3 * ENTRANTS:
            await asyncio.sleep(0)
            entered.append(len(place.hall.guests))
    assert max(later - earlier for earlier, later in itertools.pairwise(entered)) == ENTRANTS
    addresses = {guest.address for guest in place.hall.guests}
    assert addresses == {client.getsockname() for client in place.clients}


@pytest.mark.gen_test
async def test_nobody_comes_in_at_a_closed_door(place):
    place.door.open([place.socket])
    place.door.close()
    with pytest.raises(ConnectionRefusedError):
        place.arrive(1)


@pytest.fixture
def without_open_files(place):
    """Puts the limit of open files where the server has no room for one more; returns what takes it away again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit():
        free = os.dup(place.socket.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))

    def lift():
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    yield SimpleNamespace(limit=limit, lift=lift)
    lift()


@pytest.mark.gen_test
async def test_without_open_files_clients_wait_and_the_log_is_told_now_and_then(
    place, without_open_files, monkeypatch, caplog
):
    monkeypatch.setattr(door, "PAUSE", 0.05)
    place.door.open([place.socket])
    place.arrive(1)
    without_open_files.limit()
    await until(lambda: len(caplog.records) == 2)
    without_open_files.lift()
    assert {record.getMessage() for record in caplog.records} == {"can't let clients in: Too many open files"}
    await until(lambda: place.hall.guests)


@pytest.mark.gen_test
async def test_a_door_that_is_closed_in_its_pause_stays_closed(place, without_open_files, monkeypatch, caplog):
    monkeypatch.setattr(door, "PAUSE", 0.01)
    place.door.open([place.socket])
    place.arrive(1)
    without_open_files.limit()
    await until(lambda: caplog.records)
    place.door.close()
    without_open_files.lift()
    await asyncio.sleep(0.05)
    assert len(caplog.records) == 1
    assert place.hall.guests == []
