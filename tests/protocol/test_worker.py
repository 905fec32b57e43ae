"""worker.py: which worker has a session, and how its sockets get there."""

import asyncio
import resource
import socket

import pytest
from edge import until

from lesson_server.protocol.worker import RECEIVE_BATCH, Worker, make_inboxes


@pytest.fixture
def workers():
    """Three workers of one process."""
    inboxes = make_inboxes(3)
    yield [Worker(number, inboxes) for number in range(3)]
    for inbox in inboxes:
        for end in inbox:
            end.close()


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
def test_the_id_of_a_session_tells_its_worker(workers, head, other):
    assert workers[1].other(head) == other


def test_the_ids_of_a_worker_are_its_own(workers):
    head = request(workers[2].sid("abc"))
    assert [worker.other(head) for worker in workers] == [2, 2, None]


@pytest.mark.gen_test
async def test_a_socket_is_passed_on_with_all_that_it_has_to_read(workers, caplog):
    taken = []
    workers[2].receive(taken.append)
    client, server = socket.socketpair()
    client.sendall(request("2.abc"))
    workers[0].send(2, server)
    assert server.fileno() == -1
    await until(lambda: taken)
    assert taken[0].recv(1_000) == request("2.abc")
    taken[0].sendall(b"answer")
    assert client.recv(1_000) == b"answer"
    assert caplog.records == []
    workers[2].stop()
    taken[0].close()
    client.close()


@pytest.mark.gen_test
async def test_a_worker_that_has_stopped_takes_nothing(workers):
    before, after = [], []
    workers[1].receive(before.append)
    workers[1].stop()
    client, server = socket.socketpair()
    workers[0].send(1, server)
    for _ in range(3):
        await asyncio.sleep(0)
    workers[1].receive(after.append)
    await until(lambda: after)
    assert before == []
    workers[1].stop()
    after[0].close()
    client.close()


@pytest.mark.gen_test
async def test_what_is_passed_to_a_worker_that_has_died_waits_for_the_next_one(workers):
    clients = []
    for _ in range(2 * RECEIVE_BATCH):
        client, server = socket.socketpair()
        workers[0].send(1, server)
        clients.append(client)
    taken = []
    workers[1].receive(taken.append)
    await until(lambda: len(taken) == len(clients))
    workers[1].stop()
    for connection in (*taken, *clients):
        connection.close()


@pytest.mark.gen_test
async def test_who_finds_no_room_in_an_inbox_is_closed(workers, caplog):
    clients = []
    while not caplog.records:
        client, server = socket.socketpair()
        workers[0].send(1, server)
        clients.append(client)
        assert len(clients) < 10_000
    assert clients[-1].recv(1) == b""
    assert len(clients) > 100
    assert caplog.records[0].getMessage() == "worker 1 does not take the requests of its sessions"
    taken = []
    workers[1].receive(taken.append)
    await until(lambda: len(taken) == len(clients) - 1)
    workers[1].stop()
    for connection in (*taken, *clients):
        connection.close()


@pytest.mark.gen_test
async def test_without_open_files_a_socket_is_lost_and_the_next_one_is_taken(workers):
    taken = []
    client, server = socket.socketpair()
    workers[0].send(1, server)
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
    client, server = socket.socketpair()
    workers[0].send(1, server)
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
