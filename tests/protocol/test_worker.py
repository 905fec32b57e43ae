"""worker.py: which worker has an Engine.IO socket, and how the connections of its requests get there."""

import asyncio
import errno
import resource
import socket
from functools import partial

import pytest
from waiting import until

from lesson_server.protocol.places import Places
from lesson_server.protocol.worker import RECEIVE_BATCH, Worker, make_inboxes

PLACES = 10


@pytest.fixture
def workers():
    """Three workers of one process."""
    inboxes = make_inboxes(3)
    yield [Worker(number, inboxes) for number in range(3)]
    for inbox in inboxes:
        for end in inbox:
            end.close()


@pytest.fixture
def places():
    return Places(PLACES)


def pass_on(worker, number, places):
    """Passes a socket to another worker; its client."""
    client, server = socket.socketpair()
    worker.send(number, server, places.take(server.close))
    assert len(places) == 0
    assert server.fileno() == -1
    return client


def request(sid, path="/socket.io/", method="GET"):
    return f"{method} {path}?EIO=4&transport=polling&t=x&sid={sid} HTTP/1.1\r\nHost: here\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("head", "other"),
    [
        (request("0.abc"), 0),
        (request("2.abc", method="POST"), 2),
        (request("2.abc", path="/socket.io"), 2),
        (b"GET /socket.io/?sid=2.abc HTTP/1.1\r\n", 2),
        (request("1.abc"), None),  # its own
        (request("3.abc"), None),  # nobody's
        (request("99999999999999999999.abc"), None),
        (request("abc"), None),
        (request(""), None),
        (request("-1.abc"), None),
        (request("2.abc", path="/metrics"), None),
        (b"GET /socket.io/?EIO=4&notsid=2.abc HTTP/1.1\r\n", None),
        (b"GET /socket.io/?EIO=4 HTTP/1.1\r\nA: ?sid=2.abc\r\n\r\n", None),
        (b"garbage", None),
    ],
)
def test_the_id_of_an_engine_socket_has_the_number_of_its_worker(workers, head, other):
    assert workers[1].other(head) == other


def test_the_ids_of_a_worker_are_its_own(workers):
    head = request(workers[2].sid("abc"))
    assert [worker.other(head) for worker in workers] == [2, 2, None]


@pytest.mark.gen_test
async def test_a_connection_is_passed_on_with_its_unread_bytes(workers, places, caplog):
    taken = []
    workers[2].receive(taken.append)
    client = pass_on(workers[0], 2, places)
    client.sendall(request("2.abc"))
    await until(lambda: taken)
    assert taken[0].recv(1_000) == request("2.abc")
    taken[0].sendall(b"answer")
    assert client.recv(1_000) == b"answer"
    assert caplog.records == []
    workers[2].stop()
    taken[0].close()
    client.close()


@pytest.mark.gen_test
async def test_a_worker_that_has_stopped_receives_nothing(workers, places):
    before, after = [], []
    workers[1].receive(before.append)
    workers[1].stop()
    client = pass_on(workers[0], 1, places)
    for _ in range(3):
        await asyncio.sleep(0)
    workers[1].receive(after.append)
    await until(lambda: after)
    assert before == []
    workers[1].stop()
    after[0].close()
    client.close()


@pytest.mark.gen_test
async def test_a_connection_that_is_passed_to_a_dead_worker_waits_for_its_replacement(workers, places):
    clients = []
    for _ in range(2 * RECEIVE_BATCH):
        clients.append(pass_on(workers[0], 1, places))
    taken = []
    workers[1].receive(taken.append)
    await until(lambda: len(taken) == len(clients))
    workers[1].stop()
    for connection in (*taken, *clients):
        connection.close()


def fill(worker, number, places):
    """Passes sockets to another worker until some have no room in its inbox; their clients."""
    clients = []
    while len(places) < 3:
        client, server = socket.socketpair()
        worker.send(number, server, places.take(partial(pytest.fail, "the worker has the socket")))
        clients.append(client)
        assert len(clients) < 10_000
    assert len(clients) > 100
    return clients


@pytest.mark.gen_test
async def test_a_connection_that_finds_no_room_in_an_inbox_waits_and_holds_its_place(
    workers, places, caplog, monkeypatch
):
    send, sent = Worker._send, []
    monkeypatch.setattr(Worker, "_send", lambda *arguments: send(*arguments) or sent.append(len(places)))
    clients = fill(workers[0], 1, places)
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    taken = []
    workers[1].receive(taken.append)
    await until(lambda: len(taken) == len(clients))
    assert [connection.recv(10) for connection in taken] == [b"%d" % number for number in range(len(clients))]
    assert len(places) == 0
    assert caplog.records == []
    await until(lambda: sent[-1] == 0)
    sent.clear()
    await asyncio.sleep(0.01)
    assert sent == []  # nobody is told of room any more
    workers[1].stop()
    for connection in (*taken, *clients):
        connection.close()


@pytest.mark.gen_test
async def test_a_connection_that_waits_for_room_is_evicted_by_a_new_one(workers, places):
    clients = fill(workers[0], 1, places)
    newcomers = [places.take(lambda: None) for _ in range(PLACES)]  # as many as there are
    assert [client.recv(1) for client in clients[-3:]] == [b"", b"", b""]
    taken = []
    workers[1].receive(taken.append)
    await until(lambda: len(taken) == len(clients) - 3)
    assert len(places) == len(newcomers)
    workers[1].stop()
    for connection in (*taken, *clients):
        connection.close()


@pytest.mark.gen_test
async def test_a_worker_that_stops_closes_the_connections_that_wait_for_room(workers, places):
    clients = fill(workers[0], 1, places)
    workers[0].stop()
    assert [client.recv(1) for client in clients[-3:]] == [b"", b"", b""]
    assert len(places) == 0
    taken = []
    workers[1].receive(taken.append)
    await until(lambda: len(taken) == len(clients) - 3)
    workers[1].stop()
    for connection in (*taken, *clients):
        connection.close()


@pytest.mark.gen_test
async def test_a_connection_that_the_system_does_not_pass_on_is_closed_and_the_next_one_is_passed(
    workers, places, caplog, monkeypatch
):
    send_fds, failures = socket.send_fds, [OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")]
    monkeypatch.setattr(socket, "send_fds", lambda *arguments: _raise(failures) or send_fds(*arguments))
    first, second = (pass_on(workers[0], 1, places) for _ in range(2))
    assert first.recv(1) == b""
    assert len(places) == 0
    assert failures == []
    assert [record.getMessage() for record in caplog.records] == [
        "can't pass a request to worker 1: Too many references: cannot splice"
    ]
    taken = []
    workers[1].receive(taken.append)
    await until(lambda: taken)
    workers[1].stop()
    for connection in (*taken, first, second):
        connection.close()


def _raise(failures):
    if failures:
        raise failures.pop()


@pytest.mark.gen_test
async def test_without_open_files_a_connection_is_lost_and_the_next_one_is_received(workers, places):
    taken = []
    client = pass_on(workers[0], 1, places)
    workers[1].receive(taken.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        while select_readable(workers[1]):
            await asyncio.sleep(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert taken == []
    assert client.recv(1) == b""
    client.close()
    client = pass_on(workers[0], 1, places)
    await until(lambda: taken)
    workers[1].stop()
    for connection in (*taken, client):
        connection.close()


def select_readable(worker):
    """Whether something waits in the inbox of a worker."""
    try:
        return worker.inboxes[worker.number][0].recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
