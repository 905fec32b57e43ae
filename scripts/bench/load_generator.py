"""The load generator: many clients that send raw Engine.IO frames over websockets, in one process with one epoll.

A client is a socket, a few bytes of state and prepared messages: no Socket.IO library, no event loop, no task. The mask
of its frames is zero, which the protocol allows and which makes masking free. The CPU time of the generator is measured
in every phase, so that a report can show that the generator was no bottleneck.

Clients are numbered. Each 30 of them are a lesson, whose first client is the teacher. Each line of JSON on stdin is a
command, and is answered by a line of JSON on stdout. Between commands, the clients answer pings. See :class:`Load` for
the commands.
"""

import argparse
import base64
import errno
import json
import os
import random
import resource
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jwt

LESSON_SIZE = 30
TOKEN_TTL = 24 * 60 * 60

# Concurrent handshakes: a plain Tornado listens with a backlog of 128, and connections beyond it wait for a second.
WINDOW = 100
# Seconds that a phase may take before the generator exits with an error.
PATIENCE = 120.0
# A server keeps up with a rate if, when the last client comes, no more clients wait than come in this many seconds.
BACKLOG = 0.5
# Clients per source address: the kernel has 28,000 ephemeral ports for each address.
CLIENTS_PER_ADDRESS = 10_000

# With this option, Linux chooses the port at connect. At bind, Linux would look for a port that no connection at all
# uses, which takes long. The module ``socket`` has this constant from Python 3.12 on.
IP_BIND_ADDRESS_NO_PORT = 24

TEXT, CLOSE, WS_PING, WS_PONG = 0x81, 0x88, 0x89, 0x8A
UPGRADE = (
    "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

# The states of a client, in order.
HTTP, OPENING, CONNECTING, CONNECTED, JOINING, JOINED, LEAVING, GONE = range(8)


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Return a client's frame, masked with zeros."""
    if len(payload) < 126:
        header = bytes((opcode, 0x80 | len(payload)))
    else:
        header = bytes((opcode, 0x80 | 126)) + len(payload).to_bytes(2, "big")
    return header + bytes(4) + payload


JOIN = frame(b'420["join_lesson"]')
ACK, SUCCESS = b"430[", b'"SUCCESS"'
PONG = frame(b"3")
LEAVE = frame(b"41") + frame((1000).to_bytes(2, "big"), CLOSE)


def handshake(number: int, key: str) -> bytes:
    """Return the CONNECT packet of a client; the first client of a lesson is its teacher."""
    role = "teacher" if number % LESSON_SIZE == 0 else "student"
    claims = {"sub": f"{role}-{number}", "role": role, "exp": int(time.time()) + TOKEN_TTL}
    auth = {
        "client": "teacher" if role == "teacher" else "participant",
        "lesson_id": f"bench-{number // LESSON_SIZE}",
        "access_token": jwt.encode(claims, key, "HS256"),
    }
    return frame(b"40" + json.dumps(auth).encode())


class Client:
    """One client: its number, its state, and its ``goal``: the state to reach in the current phase, if any."""

    __slots__ = ("buffer", "goal", "handshake", "number", "opened", "sent", "socket", "state")

    def __init__(self, number: int, handshake: bytes, goal: int) -> None:
        self.number = number
        self.handshake = handshake
        self.goal: int | None = goal
        self.state = HTTP
        self.buffer = b""
        self.opened = time.perf_counter()
        self.sent = 0.0
        self.socket: socket.socket


class Load:
    """The clients of one server.

    The methods in COMMANDS are commands. A command returns ``clients``, ``failed``, ``seconds`` from the first byte to
    the last, ``cpu`` seconds of the generator, the ``pings`` answered in the phase, ``ack_ms``, the times from each
    ``join_lesson`` to its acknowledgement, and ``arrival_ms``, from the opening of a socket to that acknowledgement.

    Args:
        host: the server's IPv4 address.
        port: the server's port.
        key: signs the access tokens.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = ("prepare", "connect", "join", "leave", "drop", "steady", "idle")

    def __init__(self, host: str, port: int, key: str) -> None:
        self._address = host, port
        self._key = key
        websocket_key = base64.b64encode(bytes(16)).decode()
        self._upgrade = UPGRADE.format(host=host, port=port, key=websocket_key).encode()
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}
        self._handshakes: dict[int, bytes] = {}
        self._opened = 0
        self._shaking = 0  # clients whose handshake is in progress
        self._unsettled = 0  # clients that have not yet reached their goal
        self._failed: list[str] = []
        self._acks: list[float] = []
        self._arrivals: list[float] = []
        self._pings = 0

    # Commands

    def prepare(self, first: int, count: int) -> dict[str, Any]:
        """Mint the tokens of clients, so that no phase spends time on that."""
        for number in range(first, first + count):
            self._handshakes[number] = handshake(number, self._key)
        return {}

    def connect(self, first: int, count: int, join: bool = True, calm: bool = False, seed: int = 1) -> dict[str, Any]:
        """Connect these clients, in random order.

        Args:
            first: number of the first client.
            count: number of clients.
            join: whether each client joins as soon as it is connected.
            calm: whether WINDOW limits all clients that have not reached their goal, not only the handshakes.
            seed: seed of the order.
        """
        numbers = list(range(first, first + count))
        random.Random(seed).shuffle(numbers)  # clients of lessons that start together arrive mixed
        waiting = deque(numbers)

        def begin() -> None:
            while waiting and (self._unsettled - len(waiting) if calm else self._shaking) < WINDOW:
                self._open(waiting.popleft(), JOINED if join else CONNECTED)

        return self._phase(count, begin)

    def join(self) -> dict[str, Any]:
        """Let all connected clients that have not joined join at once."""
        clients = [client for client in self._clients.values() if client.state == CONNECTED]
        return self._all(clients, JOINED, self._join)

    def leave(self, first: int = 0, count: int | None = None) -> dict[str, Any]:
        """Disconnect these clients, or all, as the official client does, and wait until the server closes them."""
        return self._all(self._select(first, count), GONE, self._leave)

    def drop(self) -> dict[str, Any]:
        """Close the sockets of all clients without a disconnect packet."""
        return self._all(list(self._clients.values()), GONE, self._end)

    def _all(self, clients: list[Client], goal: int, act: Callable[[Client], None]) -> dict[str, Any]:
        """Let all these clients act at once, and wait until each has reached ``goal``."""

        def begin() -> None:
            while clients:
                client = clients.pop()
                client.goal = goal
                act(client)

        return self._phase(len(clients), begin)

    def steady(self, first: int, rate: float, seconds: float, stay: float) -> dict[str, Any]:
        """Let clients come at a fixed rate, whatever the server does; each joins, stays for a time, and leaves.

        If the server does not keep up with the rate, all sockets are closed after the last client has come, because
        the phase would otherwise not end.

        Args:
            first: number of the first client.
            rate: clients a second.
            seconds: seconds during which clients come.
            stay: seconds from a client's arrival to its leaving.

        Returns:
            the figures of every command, and ``kept_up``.
        """
        count = int(rate * seconds)
        started = time.perf_counter()
        came = left = 0
        here: list[Client] = []
        kept_up: bool | None = None

        def begin() -> None:
            nonlocal came, left, kept_up
            elapsed = time.perf_counter() - started
            while came < count and came < elapsed * rate:
                here.append(self._open(first + came, GONE))
                came += 1
            if came == count and kept_up is None:
                kept_up = sum(client.state < JOINED for client in here) <= rate * BACKLOG
                if not kept_up:
                    self._end_all(here)
            while left < came and left < (elapsed - stay) * rate and here[left].state in (JOINED, GONE):
                self._leave(here[left])
                left += 1

        phase = self._phase(count, begin, tick=0.001)
        return {**phase, "kept_up": kept_up}

    def idle(self, seconds: float) -> dict[str, Any]:
        """Only answer pings for some seconds."""
        until = time.perf_counter() + seconds
        return self._phase(0, lambda: None, more=lambda: time.perf_counter() < until, tick=0.05)

    # A phase

    def _phase(
        self, count: int, begin: Callable[[], object], more: Callable[[], bool] | None = None, tick: float = 0.05
    ) -> dict[str, Any]:
        self._unsettled, self._acks, self._arrivals, self._pings = count, [], [], 0
        started, cpu = time.perf_counter(), time.process_time()
        begin()
        while self._unsettled > 0 or (more is not None and more()):
            if time.perf_counter() - started > PATIENCE:
                raise SystemExit(f"{self._unsettled} of {count} clients are not done after {PATIENCE} s")
            self.turn(tick)
            begin()
        failed, self._failed = self._failed, []  # clients lost between two phases count in the next
        return {
            "clients": count,
            "failed": len(failed),
            "failures": sorted(set(failed))[:5],
            "seconds": time.perf_counter() - started,
            "cpu": time.process_time() - cpu,
            "pings": self._pings,
            "ack_ms": [round(seconds * 1000, 3) for seconds in self._acks],
            "arrival_ms": [round(seconds * 1000, 3) for seconds in self._arrivals],
        }

    def turn(self, timeout: float, also: int | None = None) -> bool:
        """Wait once for events of the sockets, and handle them.

        Returns:
            whether the file descriptor ``also`` has something to read.
        """
        ready = False
        for descriptor, events in self._epoll.poll(timeout):
            if descriptor == also:
                ready = True
                continue
            client = self._clients.get(descriptor)
            if client is None:
                continue
            if events & select.EPOLLOUT and not events & (select.EPOLLERR | select.EPOLLHUP):
                self._epoll.modify(descriptor, select.EPOLLIN)
                client.socket.send(self._upgrade)
                continue
            try:
                data = client.socket.recv(65536)
            except OSError as error:
                self._lose(client, errno.errorcode.get(error.errno or 0, "?"))
                continue
            if data:
                self._receive(client, data)
            else:
                self._lose(client, "closed by the server")
        return ready

    def connected(self) -> list[socket.socket]:
        """Return the sockets of all clients."""
        return [client.socket for client in self._clients.values()]

    def watch(self, descriptor: int) -> None:
        """Have :meth:`turn` wait for this file descriptor as well."""
        self._epoll.register(descriptor, select.EPOLLIN)

    # A client

    def _select(self, first: int, count: int | None) -> list[Client]:
        last = sys.maxsize if count is None else first + count
        return [client for client in self._clients.values() if first <= client.number < last]

    def _open(self, number: int, goal: int) -> Client:
        prepared = self._handshakes.get(number) or handshake(number, self._key)
        client = Client(number, prepared, goal)
        client.socket = connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self._opened += 1
        connection.bind((f"127.0.0.{1 + self._opened // CLIENTS_PER_ADDRESS % 100}", 0))
        self._clients[connection.fileno()] = client
        self._shaking += 1
        connection.connect_ex(self._address)
        try:
            connection.send(self._upgrade)  # on the loopback, the TCP handshake is complete by now
            self._epoll.register(connection.fileno(), select.EPOLLIN)
        except OSError:
            self._epoll.register(connection.fileno(), select.EPOLLOUT)
        return client

    def _receive(self, client: Client, data: bytes) -> None:
        if client.buffer:
            data = client.buffer + data
        start = 0
        if client.state == HTTP:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                client.buffer = data
                return
            if not data.startswith(b"HTTP/1.1 101"):
                self._lose(client, data[:32].decode(errors="replace"))
                return
            client.state = OPENING
            start = end + 4
        while len(data) - start >= 2:
            opcode, length = data[start], data[start + 1]
            body = start + 2
            if length == 126:
                length = int.from_bytes(data[body : body + 2], "big")
                body += 2
            if len(data) < body + length:
                break
            start = body + length
            if opcode == CLOSE:
                self._lose(client, "closed by the server")
                return
            if opcode == WS_PING:  # a websocket ping: uvicorn sends these besides Engine.IO pings
                self._pings += 1
                client.socket.send(frame(data[body:start], WS_PONG))
                continue
            self._packet(client, data[body:start])
        client.buffer = data[start:]

    def _packet(self, client: Client, packet: bytes) -> None:
        if packet == b"2":
            self._pings += 1
            client.socket.send(PONG)
        elif client.state == JOINING and packet.startswith(ACK):
            now = time.perf_counter()
            self._acks.append(now - client.sent)
            self._arrivals.append(now - client.opened)
            if SUCCESS not in packet:
                self._failed.append(packet.decode(errors="replace"))
            self._reach(client, JOINED)
        elif client.state == OPENING and packet.startswith(b"0"):
            client.state = CONNECTING
            client.socket.send(client.handshake)
        elif client.state == CONNECTING and packet.startswith(b"40"):
            self._shaking -= 1
            goes_on = client.goal in (JOINED, GONE)
            self._reach(client, CONNECTED)
            if goes_on:
                self._join(client)
        elif client.state not in (LEAVING, GONE):
            self._lose(client, packet.decode(errors="replace"))

    def _join(self, client: Client) -> None:
        client.state = JOINING
        client.sent = time.perf_counter()
        client.socket.send(JOIN)

    def _leave(self, client: Client) -> None:
        if client.state != GONE:
            client.state = LEAVING
            client.socket.send(LEAVE)

    def _lose(self, client: Client, why: str) -> None:
        if client.state == GONE:
            return  # one read had the refusal and the close
        if client.state != LEAVING:
            self._failed.append(why)
        self._end(client)

    def _end_all(self, clients: Iterable[Client]) -> None:
        for client in clients:
            if client.state != GONE:
                self._end(client)

    def _end(self, client: Client) -> None:
        if client.state < CONNECTED:
            self._shaking -= 1
        del self._clients[client.socket.fileno()]
        client.socket.close()
        self._reach(client, GONE)

    def _reach(self, client: Client, state: int) -> None:
        client.state = state
        if client.goal is not None and state >= client.goal:
            client.goal = None
            self._unsettled -= 1


def serve(load: Load, lines: Iterable[str]) -> None:
    """Execute commands, one per line: ``{"command": name, argument: value, ...}``."""
    for line in lines:
        request = json.loads(line)
        command = request.pop("command")
        assert command in load.COMMANDS
        print(json.dumps(getattr(load, command)(**request)), flush=True)


def execute_commands(load: Load) -> None:
    """Execute commands from stdin until end-of-file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stdin = sys.stdin.fileno()
    load.watch(stdin)

    def lines() -> Iterable[str]:
        unread = b""
        while True:
            if load.turn(1.0, also=stdin):
                data = os.read(stdin, 65536)
                if not data:
                    return
                *whole, unread = (unread + data).split(b"\n")
                yield from (line.decode() for line in whole)

    serve(load, lines())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    execute_commands(Load(args.host, args.port, os.environ["BENCH_KEY"]))


if __name__ == "__main__":
    main()
