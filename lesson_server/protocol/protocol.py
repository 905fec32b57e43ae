"""The protocol edge: between the bytes of clients and the handlers of Socket.IO events.

The server and the tests of the edge build it alike; they differ in the handlers that they register.
"""

import socket
from collections.abc import Sequence
from typing import Any

from tornado.web import Application

from lesson_server.protocol.acceptor import Acceptor
from lesson_server.protocol.engine import EngineHandler
from lesson_server.protocol.http_server import NotFoundHandler, make_http_server
from lesson_server.protocol.places import Place, Places
from lesson_server.protocol.rooms import Rooms
from lesson_server.protocol.transport import SocketServer
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.worker import Worker

# Sockets beyond `max_connections`: for probes and metrics, and for those who are told that the server is busy.
EXTRA_SOCKETS = 64
# Engine.IO sessions beyond it, of clients whose handshake is under way; each keeps a socket at most.
EXTRA_SESSIONS = 32


class ProtocolServer:
    """The port, HTTP, Engine.IO, Socket.IO, and its rooms.

    Every open socket of a client has a place. There are ``max_connections`` for those that carry a session (a
    websocket, or a poll that waits), and :data:`EXTRA_SOCKETS` more. When all are taken, a new socket takes the place
    of the oldest that carries none: one that says nothing, says it slowly, is kept alive, or reads no answer. So a
    probe gets in and has its answer, unless that many sockets come in the moment it takes. Sessions likewise: the
    oldest of those whose handshake is not complete gives way. How many handshakes may be completed is decided by the
    handler of the event ``connect``.

    Args:
        rooms: reach across nodes.
        pages: further routes of HTTP.
        max_connections: clients that may be connected at the same time.
        allowed_origins: see :class:`~lesson_server.protocol.engine.Engine`.
        worker: which of several workers this is; None for a server alone.
    """

    def __init__(
        self,
        rooms: Rooms,
        pages: Sequence[Any] = (),
        *,
        max_connections: int,
        allowed_origins: tuple[str, ...] = (),
        worker: Worker | None = None,
    ) -> None:
        self.sio = SocketServer(
            client_manager=rooms,
            session_places=Places(max_connections + EXTRA_SESSIONS),
            allowed_origins=allowed_origins,
            worker=worker,
        )
        self.places = Places(max_connections + EXTRA_SOCKETS)
        self._http = make_http_server(
            Application(
                [(r"/socket\.io/?", EngineHandler, {"engine": self.sio.eio}), *pages],
                default_handler_class=NotFoundHandler,
                log_function=lambda handler: None,  # an access log would hold what clients put into URLs
            )
        )
        self._acceptor = Acceptor(self.places, self._serve_websocket, self._http.serve, worker)

    def open(self, sockets: list[socket.socket]) -> None:
        """Takes clients in at listening sockets."""
        self.sio.start_rooms()
        self._acceptor.open(sockets)

    def close(self) -> None:
        """Takes nobody in any more, and begins no session for those that are here."""
        self._acceptor.close()
        self.sio.eio.refuse_newcomers()

    async def abort(self) -> None:
        """Closes the connections that are left."""
        self._acceptor.abort()
        await self.sio.eio.abort()
        await self._http.close_all_connections()

    def _serve_websocket(self, connection: socket.socket, place: Place) -> None:
        Websocket(connection, place, self.sio.eio)
