"""acceptor.py: which connections are accepted, when, and which server serves them."""

import asyncio
import contextlib
import itertools
import os
import resource
import socket
import struct
from types import SimpleNamespace

import pytest
from tornado.testing import bind_unused_port
from waiting import until

from lesson_server.protocol import acceptor, limits
from lesson_server.protocol.acceptor import ACCEPT_BATCH, Acceptor
from lesson_server.protocol.limits import MAX_HEAD_SIZE, MAX_UNREAD_BYTES
from lesson_server.protocol.places import Places
from lesson_server.protocol.worker import Worker, make_inboxes

PLACES = 3 * ACCEPT_BATCH
HEAD = b"GET /socket.io/?EIO=4&transport=%b HTTP/1.1\r\nHost: here\r\n%b\r\n"
POLLING = HEAD % (b"polling", b"")
WEBSOCKET = HEAD % (b"websocket", b"Upgrade: websocket\r\n")


class Servers:
    """Stand where the servers of websockets and of HTTP stand; keep the sockets that they are given."""

    def __init__(self):
        self.served = []

    def serve_websocket(self, connection, place):
        self.served.append(SimpleNamespace(by="websocket", socket=connection, place=place))

    def serve_http(self, connection, place):
        self.served.append(SimpleNamespace(by="http", socket=connection, place=place))

    @property
    def by(self):
        return [served.by for served in self.served]


@contextlib.contextmanager
def new_world(io_loop, worker=None):
    """An acceptor, its servers, and its clients."""
    listening, port = bind_unused_port()
    servers, places = Servers(), Places(PLACES)
    world = SimpleNamespace(servers=servers, places=places, socket=listening, worker=worker, clients=[])
    world.acceptor = Acceptor(places, servers.serve_websocket, servers.serve_http, worker)

    def arrive(count, data=POLLING):
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(data)
            client.setblocking(False)
            world.clients.append(client)
        return world.clients[-1]

    world.arrive = arrive
    yield world

    async def leave():
        world.acceptor.close()
        for served in servers.served:
            served.socket.close()

    io_loop.run_sync(leave)
    world.socket.close()
    for client in world.clients:
        client.close()


@pytest.fixture
def world(io_loop):
    """That of a server alone."""
    with new_world(io_loop) as world:
        yield world


@pytest.fixture
def worlds(io_loop):
    """Those of two workers, in one loop."""
    inboxes = make_inboxes(2)
    with new_world(io_loop, Worker(0, inboxes)) as first, new_world(io_loop, Worker(1, inboxes)) as second:
        yield first, second
    for end in itertools.chain(*inboxes):
        end.close()


async def is_closed(client):
    """Waits until the server has closed a connection, without having read what the client sent, or having done so."""
    try:
        return await asyncio.get_running_loop().sock_recv(client, 1) == b""
    except ConnectionResetError:
        return True


def reset(client):
    """Ends a connection as a client does that has crashed."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# Which server serves a connection


@pytest.mark.parametrize(
    ("head", "by"),
    [
        (WEBSOCKET, "websocket"),
        (HEAD % (b"websocket", b"upgrade:\tWebSocket \r\n"), "websocket"),
        (WEBSOCKET.replace(b"/socket.io/", b"/socket.io"), "websocket"),
        (POLLING, "http"),
        (WEBSOCKET.replace(b"GET", b"POST"), "http"),
        (WEBSOCKET.replace(b"/socket.io", b"/healthz"), "http"),
        (HEAD % (b"websocket", b"Upgrade: h2c\r\n"), "http"),
        (HEAD % (b"websocket", b"X-Upgrade: websocket\r\n"), "http"),
        (POLLING + b"\r\nUpgrade: websocket\r\n", "http"),
        (b"garbage\r\n\r\n", "http"),
        (b"GET /healthz HTTP/1.0\n\n", "http"),
        (b"GET /socket.io/ HTTP/1.1\nUpgrade: websocket\n\n", "http"),
    ],
)
@pytest.mark.gen_test
async def test_the_head_of_the_request_decides_and_stays_to_be_read(world, head, by):
    world.acceptor.open([world.socket])
    world.arrive(1, head)
    await until(lambda: world.servers.served)
    assert world.servers.by == [by]
    assert world.servers.served[0].socket.recv(2 * MAX_HEAD_SIZE) == head


@pytest.mark.gen_test
async def test_a_head_that_arrives_in_pieces_is_waited_for(world):
    world.acceptor.open([world.socket])
    client = world.arrive(1, b"")
    for byte in WEBSOCKET[:-1]:
        client.sendall(bytes([byte]))
        await asyncio.sleep(0)
    await until(lambda: [connection._peeked for connection in world.acceptor.new_connections] == [len(WEBSOCKET) - 1])
    assert world.servers.served == []
    client.sendall(WEBSOCKET[-1:])
    await until(lambda: world.servers.served)
    assert world.servers.by == ["websocket"]
    [served] = world.servers.served
    assert served.socket.recv(MAX_HEAD_SIZE) == WEBSOCKET
    assert served.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1  # its server is told of each byte


@pytest.mark.parametrize("more", [0, 1, 20_000])
@pytest.mark.gen_test
async def test_a_head_that_is_too_large_is_answered(world, more):
    """A proxy would take a server that closes without a word for dead, and ask the next one the same."""
    world.acceptor.open([world.socket])
    client = world.arrive(1, b"GET /" + b"x" * (MAX_HEAD_SIZE - 5 + more))
    answer = await asyncio.get_running_loop().sock_recv(client, 1_000)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert await is_closed(client)
    assert len(world.places) == 0
    assert world.servers.served == []


@pytest.mark.gen_test
async def test_waiting_for_the_rest_of_a_head_costs_nothing(world, monkeypatch):
    """What has been looked at can still be read: the loop must not call again before more has arrived."""
    peeks = []
    peek = acceptor._NewConnection.peek
    monkeypatch.setattr(acceptor._NewConnection, "peek", lambda connection: (peeks.append(True), peek(connection)))
    world.acceptor.open([world.socket])
    client = world.arrive(1, WEBSOCKET[:9])
    await until(lambda: peeks)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(peeks) == 1
    client.sendall(WEBSOCKET[9:])
    await until(lambda: world.servers.served)


@pytest.mark.parametrize("sent", [b"", WEBSOCKET[:9]], ids=["nothing", "half a head"])
@pytest.mark.parametrize("ends", ["close", "shutdown", "reset"])
@pytest.mark.gen_test
async def test_a_client_that_disconnects_before_the_end_of_the_head_leaves_nothing(world, caplog, sent, ends):
    world.acceptor.open([world.socket])
    client = world.arrive(1, sent)
    await until(lambda: len(world.places) == 1)
    {"close": client.close, "shutdown": lambda: client.shutdown(socket.SHUT_WR), "reset": lambda: reset(client)}[ends]()
    await until(lambda: len(world.places) == 0)
    assert world.servers.served == []
    assert caplog.records == []


@pytest.mark.parametrize("sent", [b"", WEBSOCKET[:9]], ids=["nothing", "half a head"])
@pytest.mark.gen_test
async def test_a_connection_whose_head_does_not_end_in_time_is_closed(world, monkeypatch, sent):
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT", 0.05)
    world.acceptor.open([world.socket])
    assert await is_closed(world.arrive(1, sent))
    assert len(world.places) == 0


@pytest.mark.gen_test
async def test_a_connection_that_sends_nothing_is_evicted_by_a_new_one(world):
    world.acceptor.open([world.socket])
    silent = world.arrive(1, b"")
    await until(lambda: len(world.places) == 1)
    world.arrive(PLACES - 1)
    await until(lambda: len(world.places) == PLACES)
    world.arrive(1)
    assert await is_closed(silent)
    await until(lambda: len(world.servers.served) == PLACES)


# Requests of another worker's Engine.IO socket


def of_engine_socket(sid, head):
    return head.replace(b" HTTP", b"&sid=%b HTTP" % sid)


@pytest.mark.parametrize(("head", "by"), [(POLLING, "http"), (WEBSOCKET, "websocket")])
@pytest.mark.gen_test
async def test_the_worker_that_has_the_engine_socket_serves_its_requests(worlds, head, by):
    first, second = worlds
    for world in worlds:
        world.acceptor.open([world.socket])
    first.arrive(1, of_engine_socket(b"1.abc", head))
    await until(lambda: second.servers.served)
    assert second.servers.by == [by]
    assert second.servers.served[0].socket.recv(MAX_HEAD_SIZE) == of_engine_socket(b"1.abc", head)
    assert (len(first.places), len(second.places)) == (0, 1)
    for mine in (of_engine_socket(b"0.abc", head), head):
        first.arrive(1, mine)
    await until(lambda: len(first.servers.served) == 2)
    assert first.servers.by == [by, by]
    assert len(second.servers.served) == 1


@pytest.mark.gen_test
async def test_a_connection_that_is_passed_to_a_stopped_worker_is_left_to_its_replacement(worlds):
    first, second = worlds
    second.acceptor.open([second.socket])
    second.acceptor.close()
    client, server = socket.socketpair()
    first.worker.send(1, server, first.places.take(server.close))
    for _ in range(3):
        await asyncio.sleep(0)
    taken = []
    second.worker.receive(taken.append)
    await until(lambda: taken)
    assert len(second.places) == 0
    for connection in (client, *taken):
        connection.close()


# Which connections are accepted


@pytest.mark.gen_test
async def test_a_few_connections_are_accepted_in_each_turn_of_the_loop(world):
    world.arrive(3 * ACCEPT_BATCH)
    world.acceptor.open([world.socket])
    entered = [0]
    async with asyncio.timeout(10):
        while entered[-1] < 3 * ACCEPT_BATCH:
            await asyncio.sleep(0)
            entered.append(len(world.servers.served))
    assert max(later - earlier for earlier, later in itertools.pairwise(entered)) == ACCEPT_BATCH
    addresses = {served.socket.getpeername() for served in world.servers.served}
    assert addresses == {client.getsockname() for client in world.clients}


@pytest.mark.gen_test
async def test_a_connection_without_a_place_is_refused_and_the_others_are_served(world):
    world.acceptor.open([world.socket])
    world.arrive(PLACES)
    await until(lambda: len(world.servers.served) == PLACES)
    for served in world.servers.served:
        served.place.keep()
    world.arrive(3)
    for client in world.clients[PLACES:]:
        assert (await asyncio.get_running_loop().sock_recv(client, 1_000)).startswith(b"HTTP/1.1 503 ")
        assert await is_closed(client)
    world.servers.served[0].place.free()
    world.arrive(1)
    await until(lambda: len(world.servers.served) == PLACES + 1)


@pytest.mark.gen_test
async def test_a_connection_without_a_place_is_refused_whether_it_has_sent_something_or_not(world, caplog):
    """Nor is the server stopped by one that has gone before it could be told."""
    world.arrive(PLACES)
    world.acceptor.open([world.socket])
    await until(lambda: len(world.servers.served) == PLACES)
    for served in world.servers.served:
        served.place.keep()
    for sent in (b"", POLLING):
        reset(world.arrive(1, sent))
        client = world.arrive(1, sent)
        assert (await asyncio.get_running_loop().sock_recv(client, 1_000)).startswith(b"HTTP/1.1 503 ")
        assert await is_closed(client)
    assert caplog.records == []


class Aborted(socket.socket):
    """A listening socket; its first client has gone when it is accepted."""

    aborted = False

    def accept(self):
        if not self.aborted:
            self.aborted = True
            raise ConnectionAbortedError
        return super().accept()


@pytest.mark.gen_test
async def test_a_client_that_has_gone_before_it_is_accepted_delays_no_other(world, monkeypatch, caplog):
    monkeypatch.setattr(acceptor, "RETRY_INTERVAL", 1_000)
    world.socket = Aborted(fileno=world.socket.detach())
    world.acceptor.open([world.socket])
    world.arrive(1)
    await until(lambda: world.servers.served)
    assert caplog.records == []


@pytest.mark.gen_test
async def test_the_system_holds_little_of_what_is_not_read(world):
    """It doubles what it is asked for, to count its own part too."""
    world.acceptor.open([world.socket])
    world.arrive(1)
    await until(lambda: world.servers.served)
    [served] = world.servers.served
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        assert served.socket.getsockopt(socket.SOL_SOCKET, buffer) == 2 * MAX_UNREAD_BYTES


@pytest.mark.gen_test
async def test_no_connection_is_accepted_after_the_end(world):
    world.acceptor.open([world.socket])
    world.acceptor.close()
    with pytest.raises(ConnectionRefusedError):
        world.arrive(1)


@pytest.fixture
def without_open_files(world):
    """Puts the limit of open files where the server has no room for one more; returns what takes it away again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit():
        free = os.dup(world.socket.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))

    def lift():
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    yield SimpleNamespace(limit=limit, lift=lift)
    lift()


@pytest.mark.gen_test
async def test_without_open_files_clients_wait_and_that_is_logged_now_and_then(
    world, without_open_files, monkeypatch, caplog
):
    monkeypatch.setattr(acceptor, "RETRY_INTERVAL", 0.05)
    world.acceptor.open([world.socket])
    world.arrive(1)
    without_open_files.limit()
    await until(lambda: len(caplog.records) == 2)
    without_open_files.lift()
    assert {record.getMessage() for record in caplog.records} == {"can't accept connections: Too many open files"}
    await until(lambda: world.servers.served)


@pytest.mark.gen_test
async def test_an_acceptor_that_is_closed_while_it_waits_stays_closed(world, without_open_files, monkeypatch, caplog):
    monkeypatch.setattr(acceptor, "RETRY_INTERVAL", 0.01)
    world.acceptor.open([world.socket])
    world.arrive(1)
    without_open_files.limit()
    await until(lambda: caplog.records)
    world.acceptor.close()
    without_open_files.lift()
    await asyncio.sleep(0.05)
    assert len(caplog.records) == 1
    assert world.servers.served == []
