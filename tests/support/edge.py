"""The edge of the server without what lies behind it: the protocol layer with a fake application, and its clients."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import orjson
import pytest
from raw_client import POLLING, SECRET, Client, Clients, Response
from socketio.exceptions import ConnectionRefusedError  # noqa: A004 (the library's, not the builtin)
from tornado.ioloop import IOLoop
from tornado.testing import bind_unused_port
from waiting import LONG, until

from lesson_server.embedded.stores import EmbeddedStores
from lesson_server.http.pages import Readiness
from lesson_server.http.routes import routes
from lesson_server.protocol.engine_packets import SEPARATOR
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.limits import HANDSHAKE_TIMEOUT
from lesson_server.protocol.rooms import Rooms
from lesson_server.protocol.server import ProtocolServer
from lesson_server.protocol.transport import SocketServer
from lesson_server.protocol.worker import Worker, make_inboxes
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.subscription import Subscription

ACCEPTED = {"status": "SUCCESS", "data": {}}
REFUSAL = "the fake application refuses"
REFUSED_HANDSHAKE = '40{"refuse":true,"access_token":"' + SECRET + '"}'
JOIN = '42["join_lesson"]'
JOIN_WITH_ACK = '427["join_lesson"]'
BINARY_JOIN = '451-["join_lesson",{"_placeholder":true,"num":0}]'
ACK = '437[{"status":"SUCCESS","data":{}}]'


class FakeApplication:
    """Stands where the gateway stands. It answers a join when ``may_answer`` lets it."""

    def __init__(self, sio: SocketServer) -> None:
        self.connected: list[str] = []
        self.ended: list[tuple[str, str]] = []
        self.joins: list[tuple[object, ...]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        sio.on("connect", self.connect)
        sio.on("join_lesson", self.join_lesson)
        sio.on("disconnect", self.disconnect)

    def connect(self, sid: str, environ: dict[str, Any], auth: object) -> None:
        if isinstance(auth, dict) and "refuse" in auth:
            raise ConnectionRefusedError(REFUSAL)
        self.connected.append(sid)

    async def join_lesson(self, sid: str, *data: object) -> dict[str, Any]:
        self.joins.append(data)
        await self.may_answer.wait()
        return ACCEPTED

    async def disconnect(self, sid: str, reason: str) -> None:
        self.ended.append((sid, reason))

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.ended]


# More clients than any test has.
MAX_CONNECTIONS = 1_000
# As many bytes as the real metrics have.
METRICS = b"# metrics\n" * 2_000


class Edge(Clients):
    """The edge of the server on a port of its own, built as in production and on a real Redis, but for the application;
    with every client that a test has made of it."""

    def __init__(
        self,
        caplog: pytest.LogCaptureFixture,
        redis_url: str,
        max_connections: int = MAX_CONNECTIONS,
        worker: Worker | None = None,
        allowed_origins: tuple[str, ...] = (),
    ) -> None:
        self.socket, port = bind_unused_port()
        super().__init__(port)
        self._caplog = caplog
        self._redis = RedisStore(redis_url, "", 2.0, 2)
        self._subscription = Subscription(self._redis)
        self.rooms = Rooms(self._subscription)
        self.dropped: list[str] = []  # why each client was dropped, for the metrics
        self.server = ProtocolServer(
            self.rooms,
            max_connections=max_connections,
            allowed_origins=allowed_origins,
            worker=worker,
            observe_drop=self.dropped.append,
        )
        self.server.add_pages(routes(Readiness({}), lambda: METRICS))
        self.sio = self.server.sio
        self.application = FakeApplication(self.sio)
        self._subscription.start()
        self.server.start([self.socket])

    @property
    def sockets(self) -> list[EngineSocket]:
        return list(self.sio.eio.sockets.values())

    @property
    def log(self) -> list[str]:
        """The lines that an operator sees: levels are those of ``lesson-server run``."""
        return [record.getMessage() for record in self._caplog.get_records("call")]

    async def polling(self) -> "Polling":
        """A polling client; its OPEN packet has been read."""
        response = await self.request("GET", POLLING)
        assert response.status == 200, response
        return Polling(self, orjson.loads(response.body[1:])["sid"])

    async def connected_polling(self) -> "Polling":
        """A polling client whose handshake is complete."""
        client = await self.polling()
        assert (await client.post("40{}")).body == b"ok"
        [answer] = await client.poll()
        assert answer.startswith('40{"sid":')
        return client

    async def serves_others(self) -> None:
        """Another client comes and joins."""
        client = await self.connected()
        await client.send(JOIN_WITH_ACK)
        assert await client.receive() == ACK
        await client.leave()

    async def stop(self) -> None:
        """Takes every client away."""
        self.application.may_answer.set()
        self.disappear()
        # A polling client that has gone is missed only when it doesn't answer a ping; a websocket at once.
        await until(lambda: not any(engine_socket.upgraded for engine_socket in self.sockets))
        await self.server.stop()
        await until(lambda: not self.sio.eio.sockets and not self.sio.eio._tasks)
        await self.rooms.close()
        # redis-py loses a cancellation in the middle of a connect, and the next one comes after CANCEL_INTERVAL.
        await self._subscription._subscribed.wait()
        await self._subscription.close()
        await self._redis.close()

    def check(self) -> None:
        """Asserts that nothing of any client is left, and that the log kept to the rules."""
        assert left_of(self.sio) == {}
        assert len(self.server.places) == 0
        assert len(self.sio.eio._socket_places) == 0
        assert sorted(self.application.connected) == sorted(sid for sid, _ in self.application.ended)

        for record in self._caplog.get_records("call") + self._caplog.get_records("teardown"):
            assert record.levelno < logging.WARNING, record.getMessage()
            assert record.exc_info is None
            assert SECRET not in record.getMessage()
        assert len(self.log) <= len(self._clients)


async def close(*edges: Edge) -> None:
    """The end of a test."""
    for edge in edges:
        await edge.stop()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    for edge in edges:
        edge.check()


def left_of(sio: SocketServer) -> dict[str, object]:
    """The tables of the Socket.IO server, its engine and its rooms that still tell of a connection."""
    tables = {
        f"{type(owner).__name__}.{name}": getattr(owner, name)
        for owner, names in (
            (sio, ("environ",)),
            (sio.eio, ("sockets", "websockets", "_tasks")),
            (
                sio.manager,
                ("_sids", "_eio_sids", "_members", "_rooms_of", "_ending", "callbacks"),
            ),
        )
        for name in names
    }
    return {name: table for name, table in tables.items() if table}


@pytest.fixture(name="edge")
def edge_fixture(
    io_loop: IOLoop, caplog: pytest.LogCaptureFixture, running_stores: EmbeddedStores, request: pytest.FixtureRequest
) -> Iterator[Edge]:
    """The edge; a parameter, if there is one, says how many clients it takes."""
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.INFO, "lesson_server")

    async def make() -> Edge:
        return Edge(caplog, running_stores.redis_url, getattr(request, "param", MAX_CONNECTIONS))

    the_edge = io_loop.run_sync(make)
    yield the_edge
    io_loop.run_sync(lambda: close(the_edge), timeout=2 * LONG)


# Whose pages may connect to the workers.
PAGES = "https://pages.example"


@pytest.fixture(name="workers")
def workers_fixture(
    io_loop: IOLoop, caplog: pytest.LogCaptureFixture, running_stores: EmbeddedStores
) -> Iterator[list[Edge]]:
    """The edges of two workers, in one loop, each on a port of its own."""
    caplog.set_level(logging.WARNING)
    inboxes = make_inboxes(2)

    async def make() -> list[Edge]:
        return [
            Edge(caplog, running_stores.redis_url, worker=Worker(number, inboxes), allowed_origins=(PAGES,))
            for number in range(2)
        ]

    edges = io_loop.run_sync(make)
    yield edges
    io_loop.run_sync(lambda: close(*edges), timeout=2 * LONG)
    for end in chain(*inboxes):
        end.close()


@pytest.fixture(name="short_timeouts")
def short_timeouts_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake timeouts are short. Before ``edge``: the HTTP server reads them when it is made."""
    monkeypatch.setattr("lesson_server.protocol.limits.HANDSHAKE_TIMEOUT", HANDSHAKE_TIMEOUT / 100)


class Polling:
    """A client of the polling transport: each request has a connection of its own."""

    def __init__(self, edge: Edge, sid: str) -> None:
        self._edge = edge
        self.sid = sid
        self.query = f"{POLLING}&sid={sid}"

    async def get(self) -> Response:
        return await self._edge.request("GET", self.query)

    async def poll(self) -> list[str]:
        response = await self.get()
        assert response.status == 200, response
        return response.body.decode().split(SEPARATOR)

    async def post(self, *packets: str) -> Response:
        return await self._edge.request("POST", self.query, SEPARATOR.join(packets).encode())

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[Client]:
        """A poll that waits; the connection that it waits on."""
        client = await self._edge.connection()
        engine_socket = self._edge.sio.eio.sockets[self.sid]
        await client.send_request("GET", self.query)
        await until(lambda: engine_socket.polling.request is not None)
        yield client
