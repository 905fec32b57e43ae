"""The protocol layer: between the bytes of clients and the handlers of Socket.IO events.

The server and the tests of this layer build it in the same way; only the registered handlers differ.
"""

import asyncio
import math
import random
import socket
from collections.abc import Callable, Sequence
from typing import Any

from tornado.web import Application

from lesson_server.protocol.acceptor import Acceptor
from lesson_server.protocol.http_server import NotFoundHandler, make_http_server
from lesson_server.protocol.places import Place, Places
from lesson_server.protocol.polling import PollingHandler
from lesson_server.protocol.rooms import Rooms
from lesson_server.protocol.transport import SocketServer
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.worker import Worker

# Connections beyond `max_connections`: for probes, metrics, and clients that are refused because the server is busy.
EXTRA_SOCKETS = 64
# Engine.IO sockets beyond `max_connections`, for clients whose handshake is under way. Each socket holds at most one
# connection.
EXTRA_ENGINE_SOCKETS = 32
# Mean seconds between two batches of Engine.IO sockets that a drain ends. Each interval has random jitter, so that the
# servers of a deploy don't end their sockets in step.
DRAIN_INTERVAL = 0.25
# Seconds for the clients to answer the close frames when the server stops.
STOP_TIMEOUT = 0.5


class ProtocolServer:
    """The listening sockets, HTTP, Engine.IO, Socket.IO, and the rooms of Socket.IO.

    Every open connection of a client has a place. There are ``max_connections`` places for connections that carry an
    Engine.IO socket (a websocket, or a pending poll), and :data:`EXTRA_SOCKETS` more. When all places are taken, a new
    connection evicts the oldest connection that carries no Engine.IO socket: one that sends nothing, sends slowly, is
    kept alive, or does not read its response. So a probe is accepted and answered, unless :data:`EXTRA_SOCKETS` new
    connections arrive before the response. Likewise, a new Engine.IO socket evicts the oldest Engine.IO socket whose
    handshake is not complete. The handler of the event ``connect`` limits the number of completed handshakes.

    Args:
        rooms: the rooms across nodes.
        max_connections: clients that may be connected at the same time.
        allowed_origins: see :class:`~lesson_server.protocol.engine.Engine`.
        worker: this worker, if there are several; None for a single process.
        observe_drop: see :class:`~lesson_server.protocol.engine.Engine`.
    """

    def __init__(
        self,
        rooms: Rooms,
        *,
        max_connections: int,
        allowed_origins: tuple[str, ...] = (),
        worker: Worker | None = None,
        observe_drop: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.sio = SocketServer(
            client_manager=rooms,
            socket_places=Places(max_connections + EXTRA_ENGINE_SOCKETS),
            allowed_origins=allowed_origins,
            worker=worker,
            observe_drop=observe_drop,
        )
        self.places = Places(max_connections + EXTRA_SOCKETS)
        self._application = Application(
            [(r"/socket\.io/?", PollingHandler, {"engine": self.sio.eio})],
            default_handler_class=NotFoundHandler,
            log_function=lambda handler: None,  # an access log would contain client input from URLs
        )
        self._http = make_http_server(self._application)
        self._acceptor = Acceptor(self.places, self._serve_websocket, self._http.serve, worker)

    def add_pages(self, routes: Sequence[Any]) -> None:
        """Serve further HTTP routes."""
        self._application.add_handlers(".*", list(routes))

    def start(self, sockets: list[socket.socket]) -> None:
        """Serve clients on the listening sockets."""
        self.sio.start_rooms()
        self._acceptor.open(sockets)

    async def drain(self, seconds: float) -> None:
        """Stop opening Engine.IO sockets, and close the open ones over that many seconds, in random order.

        So the clients don't all connect to other servers at the same moment. May be cancelled, to stop at once.
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
        """Stop accepting connections, end every Engine.IO socket, and close the connections.

        May be cancelled: the connections are closed even then.
        """
        self._acceptor.close()
        self.sio.eio.refuse_new_clients()
        try:
            await self.sio.eio.disconnect()
            await self.sio.eio.wait_closed(STOP_TIMEOUT)
        finally:
            self._acceptor.abort()
            await self.sio.eio.abort()
            await self._http.close_all_connections()

    def _serve_websocket(self, connection: socket.socket, place: Place) -> None:
        Websocket(connection, place, self.sio.eio)
