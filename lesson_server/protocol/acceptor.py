"""Accept connections, and pass each one to its server by the head of its HTTP request."""

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable

from lesson_server.errors import ServiceBusy
from lesson_server.log import EventLogger
from lesson_server.protocol import limits
from lesson_server.protocol.limits import MAX_HEAD_SIZE, MAX_UNREAD_BYTES
from lesson_server.protocol.places import Place, Places
from lesson_server.protocol.worker import Worker

logger = EventLogger(__name__)

# Connections accepted per iteration of the event loop; the rest stay in the listen backlog. Without this limit, each
# step of a join under way would wait behind a hundred handshakes at a class start.
ACCEPT_BATCH = 8
# Seconds before the next accept() when the system is out of file descriptors or memory.
RETRY_INTERVAL = 1.0

# The end of a head, as in Tornado. A websocket handshake needs CRLF line ends.
END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
WEBSOCKET_PATH = b"GET /socket.io"
WEBSOCKET_HEADER = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

# Without these responses, a proxy would mark the server as down and retry the request on the next server.
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

# Takes ownership of a connection and its place.
Serve = Callable[[socket.socket, Place], None]


class Acceptor:
    """Accepts connections on the listening sockets.

    Each connection carries one request. The acceptor reads the first bytes with ``MSG_PEEK``, which leaves them in the
    socket, so the server of the connection reads the whole request.

    Args:
        places: one for each open connection, whatever its protocol.
        serve_websocket: serves a connection whose request is an Engine.IO websocket handshake.
        serve_http: serves any other connection.
        worker: this worker, if there are several; None for a single process.
    """

    def __init__(self, places: Places, serve_websocket: Serve, serve_http: Serve, worker: Worker | None = None) -> None:
        self.places = places
        self._serve_websocket = serve_websocket
        self._serve_http = serve_http
        self._worker = worker
        self._listening: list[socket.socket] = []
        self.new_connections: set[_NewConnection] = set()  # connections without a complete head

    def open(self, sockets: list[socket.socket]) -> None:
        """Accept connections from now on."""
        self._listening = list(sockets)
        for listening in self._listening:
            # Accepted connections inherit the size. By default, the system buffers megabytes of data that the client or
            # the server has not read.
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                listening.setsockopt(socket.SOL_SOCKET, buffer, MAX_UNREAD_BYTES)
            self._watch(listening)
        if self._worker is not None:
            self._worker.receive(self._begin)

    def close(self) -> None:
        """Stop accepting connections, and close the listening sockets."""
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        self._listening = []
        if self._worker is not None:
            self._worker.stop()

    def abort(self) -> None:
        """Close the connections whose head has not arrived."""
        for connection in list(self.new_connections):
            connection.close()

    def serve(self, connection: socket.socket, head: bytes, place: Place) -> None:
        """Pass a connection to the server of its protocol, or to the worker of its Engine.IO socket.

        Args:
            connection: nothing has been read from it.
            head: the first bytes that can be read.
            place: the place of the connection.
        """
        end = END_OF_HEAD.search(head)
        if end is None:
            place.free()
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
            except (BlockingIOError, ConnectionAbortedError):  # another worker was quicker; the client left
                return
            except OSError as error:  # out of file descriptors or memory: an immediate retry would fail too
                logger.error("accept_failed", "can't accept connections: {cause}", cause=error.strerror)
                asyncio.get_running_loop().remove_reader(listening)
                asyncio.get_running_loop().call_later(RETRY_INTERVAL, self._watch, listening)
                return
            self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        try:
            _NewConnection(connection, self).peek()
        except ServiceBusy:
            _refuse(connection, BUSY)


def _refuse(connection: socket.socket, answer: bytes) -> None:
    """Send a response, and close the connection.

    Pending input is read first: if any is left at the close, the system discards the response.
    """
    with contextlib.suppress(OSError):
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.recv(2 * MAX_UNREAD_BYTES)
        connection.send(answer)
    connection.close()


class _NewConnection:
    """A connection until the head of its request has arrived.

    Raises:
        ServiceBusy: all places are kept.
    """

    __slots__ = ("_acceptor", "_deadline", "_peeked", "_place", "_socket")

    def __init__(self, connection: socket.socket, acceptor: Acceptor) -> None:
        self._place = acceptor.places.take(self.close)
        self._socket = connection
        self._acceptor = acceptor
        self._peeked = 0
        self._deadline: asyncio.TimerHandle | None = None

    def peek(self) -> None:
        """Peek at the received bytes, and wait for more while the head is incomplete."""
        try:
            head = self._socket.recv(MAX_HEAD_SIZE, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._wait()
            return
        except OSError:
            head = b""
        if len(head) <= self._peeked:  # EOF or an error: the client has disconnected
            self.close()
            return
        self._peeked = len(head)
        if END_OF_HEAD.search(head) or len(head) == MAX_HEAD_SIZE:
            self._stop_waiting()
            self._acceptor.serve(self._socket, head, self._place)
        else:
            # Peeked bytes stay readable, so the loop would call again at once without the SO_RCVLOWAT.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(head) + 1)
            self._wait()

    def _wait(self) -> None:
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(limits.HANDSHAKE_TIMEOUT, self.close)
            loop.add_reader(self._socket, self.peek)
            self._acceptor.new_connections.add(self)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._acceptor.new_connections.discard(self)
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def close(self) -> None:
        self._stop_waiting()
        self._place.free()
        self._socket.close()
