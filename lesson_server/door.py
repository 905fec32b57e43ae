"""The port: where clients come in, a few in each turn of the loop."""

import asyncio
import logging
import socket

from tornado.httpserver import HTTPServer

from lesson_server.admission import Places
from lesson_server.errors import ServiceBusy
from lesson_server.http_server import ClientStream
from lesson_server.sessions import MAX_UNREAD_BYTES

logger = logging.getLogger(__name__)

# Clients that come in in one turn of the loop; the others wait at the port. Tornado lets in as many as there are, and
# in a class start each step of a join that has begun would wait behind a hundred handshakes.
ENTRANTS = 8
# Seconds before the next try when the system has no room for a connection.
PAUSE = 1.0


class Door:
    """Lets clients in at listening sockets.

    Args:
        http: serves them.
        places: one for each open socket, whatever is spoken on it.
    """

    def __init__(self, http: HTTPServer, places: Places) -> None:
        self._http = http
        self._places = places
        self._sockets: list[socket.socket] = []

    def open(self, sockets: list[socket.socket]) -> None:
        """Lets clients in from now on."""
        self._sockets = list(sockets)
        for listening in self._sockets:
            # Connections inherit it. By itself, the system holds megabytes of what a client or the server has not read.
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                listening.setsockopt(socket.SOL_SOCKET, buffer, MAX_UNREAD_BYTES)
            self._watch(listening)

    def close(self) -> None:
        """Lets nobody in any more, and closes the sockets."""
        for listening in self._sockets:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        self._sockets = []

    def _watch(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._let_in, listening)

    def _let_in(self, listening: socket.socket) -> None:
        for _ in range(ENTRANTS):
            try:
                connection, address = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):  # another worker was quicker; the client has gone
                return
            except OSError as error:  # no more open files, no memory; asked again at once, it would say the same
                logger.error("can't let clients in: %s", error.strerror)
                asyncio.get_running_loop().remove_reader(listening)
                asyncio.get_running_loop().call_later(PAUSE, self._watch, listening)
                return
            try:
                stream = ClientStream(connection, self._places)
            except ServiceBusy:
                connection.close()
            else:
                self._http.handle_stream(stream, address)
