"""The protocol edge: between the bytes of clients and the handlers of Socket.IO events.

The server and the tests of the edge build it alike; they differ in the handlers that they register.
"""

import asyncio
import math
import random
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

# Connections beyond `max_connections`: for probes and metrics, and for those who are told that the server is busy.
EXTRA_SOCKETS = 64
# Engine.IO sockets beyond it, of clients whose handshake is under way. Each holds one connection at most.
EXTRA_ENGINE_SOCKETS = 32
# Seconds between two batches of Engine.IO sockets that a drain ends, more or less: each time a random part, so that the
# servers of a deploy don't end theirs in step.
DRAIN_INTERVAL = 0.25
# Seconds for the clients to answer the close frames of a stop.
CLOSE_PATIENCE = 0.5


class ProtocolServer:
    """The port, HTTP, Engine.IO, Socket.IO, and its rooms.

    Every open connection of a client has a place. There are ``max_connections`` for those that carry an Engine.IO
    socket (a websocket, or a poll that waits), and :data:`EXTRA_SOCKETS` more. When all are taken, a new connection
    takes the place of the oldest that carries none: one that says nothing, says it slowly, is kept alive, or reads no
    answer. So a probe is accepted and answered, unless that many connections come in the moment it takes. Likewise, of
    all Engine.IO sockets the oldest whose handshake is not complete gives way. How many handshakes may be completed is
    decided by the handler of the event ``connect``.

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
            socket_places=Places(max_connections + EXTRA_ENGINE_SOCKETS),
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

    def start(self, sockets: list[socket.socket]) -> None:
        """Serve clients at listening sockets."""
        self.sio.start_rooms()
        self._acceptor.open(sockets)

    async def drain(self, seconds: float) -> None:
        """Open no Engine.IO socket any more, and close the open ones over so many seconds, in random order.

        So their clients don't all connect elsewhere at the same moment. May be cancelled, to stop at once.
        """
        self.sio.eio.refuse_new_clients()
        now = asyncio.get_running_loop().time
        end = now() + seconds
        sockets = list(self.sio.eio.sockets.values())
        random.shuffle(sockets)
        while sockets:
            intervals = max(math.ceil((end - now()) / DRAIN_INTERVAL), 1)
            for _ in range(math.ceil(len(sockets) / intervals)):
                self.sio.eio.spawn(sockets.pop().close(self.sio.reason.SERVER_DISCONNECT))
            if sockets:
                await asyncio.sleep(DRAIN_INTERVAL * random.uniform(0.5, 1.5))  # noqa: S311

    async def stop(self) -> None:
        """Accept nobody any more, end every Engine.IO socket, and close the connections.

        May be cancelled: the connections are closed then too.
        """
        self._acceptor.close()
        self.sio.eio.refuse_new_clients()
        try:
            await self.sio.eio.disconnect()
            await self.sio.eio.wait_closed(CLOSE_PATIENCE)
        finally:
            self._acceptor.abort()
            await self.sio.eio.abort()
            await self._http.close_all_connections()

    def _serve_websocket(self, connection: socket.socket, place: Place) -> None:
        Websocket(connection, place, self.sio.eio)
