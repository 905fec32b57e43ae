"""The port: where clients connect. Decides by the head of a request who serves its socket."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Callable

from lesson_server.errors import ServiceBusy
from lesson_server.protocol import engine_socket
from lesson_server.protocol.engine_socket import MAX_UNREAD_BYTES
from lesson_server.protocol.http_server import MAX_HEAD_SIZE
from lesson_server.protocol.places import Place, Places
from lesson_server.protocol.worker import Worker

logger = logging.getLogger(__name__)

# Connections that are accepted in one turn of the event loop; the others wait in the backlog. If all were accepted at
# once, each step of a join that has begun would wait behind a hundred handshakes in a class start.
ACCEPT_BATCH = 8
# Seconds before the next try when the system has no room for a connection.
RETRY_INTERVAL = 1.0

# As Tornado has it; a websocket needs the first form.
END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
WEBSOCKET_PATH = b"GET /socket.io"
WEBSOCKET_HEADER = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

# Answers without which a proxy would take the server for dead, and try the request on the next one.
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

# Takes a connection over, and its place.
Serve = Callable[[socket.socket, Place], None]


class Acceptor:
    """Accepts connections at listening sockets.

    Each connection carries one request. Its first bytes are read with ``MSG_PEEK``, which leaves them there, so whoever
    serves the connection reads all of them.

    Args:
        places: one for each open connection, whatever is spoken on it.
        serve_websocket: serves a connection whose request asks for a websocket of Engine.IO.
        serve_http: serves any other socket.
        worker: which of several workers this is; None for a server alone.
    """

    def __init__(self, places: Places, serve_websocket: Serve, serve_http: Serve, worker: Worker | None = None) -> None:
        self.places = places
        self._serve_websocket = serve_websocket
        self._serve_http = serve_http
        self._worker = worker
        self._listening: list[socket.socket] = []
        self.arrivals: set[_Arrival] = set()  # those that wait

    def open(self, sockets: list[socket.socket]) -> None:
        """Accept connections from now on."""
        self._listening = list(sockets)
        for listening in self._listening:
            # Connections inherit it. By itself, the system holds megabytes of what a client or the server has not read.
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                listening.setsockopt(socket.SOL_SOCKET, buffer, MAX_UNREAD_BYTES)
            self._watch(listening)
        if self._worker is not None:
            self._worker.receive(self._begin)

    def close(self) -> None:
        """Accept no connection any more, and close the listening sockets."""
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        self._listening = []
        if self._worker is not None:
            self._worker.stop()

    def abort(self) -> None:
        """Close the connections whose request has not arrived."""
        for arrival in list(self.arrivals):
            arrival.close()

    def serve(self, connection: socket.socket, head: bytes, place: Place) -> None:
        """Hand a connection to the server of its request.

        Args:
            connection: nothing has been read from it.
            head: the beginning of what can be read.
            place: that of the socket.
        """
        end = END_OF_HEAD.search(head)
        if end is None:
            place.leave()
            _refuse(connection, TOO_LARGE)
        elif self._worker is not None and (other := self._worker.other(head)) is not None:
            self._worker.send(other, connection, place)
        elif head.startswith(WEBSOCKET_PATH) and WEBSOCKET_HEADER.search(head, 0, end.start() + len(b"\r\n")):
            self._serve_websocket(connection, place)
        else:
            self._serve_http(connection, place)

    def _watch(self, listening: socket.socket) -> None:
        if listening in self._listening:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):  # another worker was quicker; the client has gone
                return
            except OSError as error:  # no more open files, no memory; asked again at once, it would say the same
                logger.error("can't accept connections: %s", error.strerror)
                asyncio.get_running_loop().remove_reader(listening)
                asyncio.get_running_loop().call_later(RETRY_INTERVAL, self._watch, listening)
                return
            self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        try:
            _Arrival(connection, self).look()
        except ServiceBusy:
            _refuse(connection, BUSY)


def _refuse(connection: socket.socket, answer: bytes) -> None:
    """Answer, and close a connection. What has arrived is read first: the system would else discard the answer."""
    with contextlib.suppress(OSError):
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.recv(2 * MAX_UNREAD_BYTES)
        connection.send(answer)
    connection.close()


class _Arrival:
    """A connection until the head of its request has arrived.

    Raises:
        ServiceBusy: there is no place for it.
    """

    __slots__ = ("_acceptor", "_deadline", "_looked_at", "_place", "_socket")

    def __init__(self, connection: socket.socket, acceptor: Acceptor) -> None:
        self._place = acceptor.places.take(self.close)
        self._socket = connection
        self._acceptor = acceptor
        self._looked_at = 0
        self._deadline: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """Look at what has arrived, and wait for more while the head has no end."""
        try:
            head = self._socket.recv(MAX_HEAD_SIZE, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._wait()
            return
        except OSError:
            head = b""
        if len(head) <= self._looked_at:  # no more will arrive: the client has gone
            self.close()
            return
        self._looked_at = len(head)
        if END_OF_HEAD.search(head) or len(head) == MAX_HEAD_SIZE:
            self._stop_waiting()
            self._acceptor.serve(self._socket, head, self._place)
        else:
            # The loop would call again at once, for what has been looked at can still be read.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(head) + 1)
            self._wait()

    def _wait(self) -> None:
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(engine_socket.HANDSHAKE_TIMEOUT, self.close)
            loop.add_reader(self._socket, self.look)
            self._acceptor.arrivals.add(self)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._acceptor.arrivals.discard(self)
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def close(self) -> None:
        self._stop_waiting()
        self._place.leave()
        self._socket.close()
