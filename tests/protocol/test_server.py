"""server.py: the numbers of connections and Engine.IO sockets are bounded, and clients and probes are served."""

import asyncio

import pytest
from edge import (
    ACK,
    JOIN_WITH_ACK,
    PAGES,
    REFUSED_HANDSHAKE,
    Edge,
    edge_fixture,  # noqa: F401
    left_of,
    short_timeouts_fixture,  # noqa: F401
    workers_fixture,  # noqa: F401
)
from raw_client import POLLING, UPGRADE_HEADERS, Client, websocket_query
from waiting import LONG, until

from lesson_server.protocol import limits
from lesson_server.protocol import websocket as websocket_module
from lesson_server.protocol.server import EXTRA_ENGINE_SOCKETS, EXTRA_SOCKETS

LIMIT = 2
limited = pytest.mark.parametrize("edge", [LIMIT], indirect=True, ids=["limited"])


async def storm(edge: Edge, count: int) -> list[Client]:
    """Sockets that say nothing, all let in."""
    sockets = [await edge.connection() for _ in range(count)]
    await until(lambda: len(edge.server.places) == LIMIT + EXTRA_SOCKETS)
    await asyncio.gather(*(sockets[number].is_ended() for number in range(count - EXTRA_SOCKETS - LIMIT)))
    return sockets


async def is_healthy(edge: Edge) -> bool:
    client = await edge.connection()
    await client.write(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
    return (await client.response()).body == b"ok\n"


@limited
@pytest.mark.gen_test
async def test_silent_connections_are_evicted_and_probes_are_answered(edge: Edge) -> None:
    await storm(edge, 3 * EXTRA_SOCKETS)
    for _ in range(EXTRA_SOCKETS):
        assert await is_healthy(edge)
    assert len(edge.server.places) <= LIMIT + EXTRA_SOCKETS


@limited
@pytest.mark.parametrize("kind", ["websocket", "poll that waits", "upgraded websocket"])
@pytest.mark.gen_test
async def test_a_connection_that_carries_an_engine_socket_is_not_evicted(edge: Edge, kind: str) -> None:
    if kind == "poll that waits":
        client = await edge.connected_polling()
        async with client.waiting() as poll:
            await storm(edge, 3 * EXTRA_SOCKETS)
            await client.post(JOIN_WITH_ACK)
            assert (await poll.response()).body == ACK.encode()
        return
    if kind == "upgraded websocket":
        websocket = await edge.probing((await edge.connected_polling()).sid)
        await websocket.send("5")
        await until(lambda: edge.sockets[0].upgraded)
    else:
        websocket = await edge.connected()
    await storm(edge, 3 * EXTRA_SOCKETS)
    await websocket.send(JOIN_WITH_ACK)
    assert await websocket.receive() == ACK


@limited
@pytest.mark.gen_test
async def test_a_connection_whose_poll_is_answered_is_evicted_again(edge: Edge) -> None:
    client = await edge.connected_polling()
    await client.post(JOIN_WITH_ACK)
    connection = await edge.connection()
    assert (await connection.request("GET", client.query)).body == ACK.encode()
    assert not edge.server.places.kept  # and not by its timeout
    await storm(edge, 3 * EXTRA_SOCKETS)
    assert await connection.is_ended() == b""


@limited
@pytest.mark.parametrize("kind", ["refused handshake", "ended by the client", "upgrade that is not completed"])
@pytest.mark.gen_test
async def test_a_websocket_without_engine_socket_is_evicted(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whether it had one, or is going to have one; not only by its timeout."""
    monkeypatch.setattr(websocket_module, "CLOSE_TIMEOUT", 10 * LONG)
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT", 10 * LONG)
    if kind == "upgrade that is not completed":
        websocket = await edge.websocket((await edge.connected_polling()).sid)
    else:
        websocket = await edge.websocket()
        await websocket.send(REFUSED_HANDSHAKE if kind == "refused handshake" else "1")
        await until(lambda: not edge.sockets)
    assert len(edge.sio.eio.websockets) == 1
    await storm(edge, 3 * EXTRA_SOCKETS)
    await until(lambda: not edge.sio.eio.websockets)
    assert await is_healthy(edge)


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.gen_test
async def test_an_upgrade_that_is_not_completed_keeps_its_connection_for_the_time_of_a_handshake(edge: Edge) -> None:
    polling = await edge.connected_polling()
    websocket = await edge.websocket(polling.sid)
    assert await websocket.is_ended() == b""
    assert not edge.sockets[0].upgrading
    assert (await polling.post(JOIN_WITH_ACK)).body == b"ok"


@limited
@pytest.mark.parametrize("transport", ["polling", "websocket"])
@pytest.mark.gen_test
async def test_of_handshakes_that_are_not_completed_the_oldest_is_evicted(edge: Edge, transport: str) -> None:
    kept = await edge.connected()
    first, *_ = [
        await (edge.websocket() if transport == "websocket" else edge.polling())
        for _ in range(LIMIT + EXTRA_ENGINE_SOCKETS)
    ]
    assert len(edge.sockets) == LIMIT + EXTRA_ENGINE_SOCKETS
    assert edge.log == ["client dropped: handshake cancelled for a newer one"]
    if isinstance(first, Client):
        assert await first.messages() == []
    else:
        assert await first.poll() == ["1"]
    await kept.send(JOIN_WITH_ACK)
    assert await kept.receive() == ACK


@limited
@pytest.mark.gen_test
async def test_when_all_engine_sockets_are_connected_the_next_one_is_refused(edge: Edge) -> None:
    """Admission would have refused them before."""
    for _ in range(LIMIT + EXTRA_ENGINE_SOCKETS):
        await edge.connected()
    for query, headers in ((POLLING, {}), (websocket_query(), UPGRADE_HEADERS)):
        response = await edge.request("GET", query, **headers)
        assert response.status == 503
        assert b"busy" in response.body
    assert await is_healthy(edge)


@pytest.mark.gen_test
async def test_every_place_is_left(edge: Edge) -> None:
    """Of a socket that was closed at each stage of its life."""
    sid = (await edge.connected_polling()).sid
    clients = [
        await edge.connection(),
        await edge.websocket(),
        await edge.connected(),
        await edge.probing(sid),
    ]
    await until(lambda: len(edge.server.places) >= len(clients))
    edge.disappear()
    await until(lambda: len(edge.server.places) == 0)
    await edge.sio.eio.disconnect()
    assert len(edge.sio.eio._socket_places) == 0


# Several workers


@pytest.mark.gen_test
async def test_an_engine_socket_is_served_wherever_its_requests_are_accepted(workers: list[Edge]) -> None:
    """Each worker has Engine.IO sockets of its own, and passes on what is for the other one."""
    first, second = workers
    client = await first.connected_polling()
    client._edge = second  # from now on the system gives its requests to the other worker
    assert (await client.post(JOIN_WITH_ACK)).body == b"ok"
    assert await client.poll() == [ACK]
    websocket = await second.probing(client.sid)
    await websocket.send("5", JOIN_WITH_ACK)
    assert await websocket.receive() == ACK
    assert [len(edge.sockets) for edge in workers] == [1, 0]
    await websocket.leave()


@pytest.mark.gen_test
async def test_pages_of_an_allowed_origin_may_connect(workers: list[Edge]) -> None:
    for origin, status in ((PAGES, 200), ("https://elsewhere.example", 403)):
        assert (await workers[0].request("GET", POLLING, Origin=origin)).status == status


# The end


@pytest.mark.gen_test
async def test_a_server_that_stops_opens_no_engine_socket_and_closes_the_connections(edge: Edge) -> None:
    """A websocket whose client does not answer the close frame, a socket that says nothing, a body without its end."""
    waiting, silent, slow = [await edge.connection() for _ in range(3)]
    await slow.write(b"POST /socket.io/ HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n12345678")
    websocket = await edge.connected()
    await until(lambda: len(edge.server.places) == 4 and edge.server._http._connections)
    stop = asyncio.create_task(edge.server.stop())
    assert (await waiting.request("GET", POLLING)).status == 503
    assert edge.socket.fileno() == -1
    await stop
    assert not edge.sio.eio.websockets
    assert len(edge.server.places) == 0
    assert (await silent.is_ended(), await slow.is_ended()) == (b"", b"")
    assert await websocket.is_ended() == b"\x88\x02\x03\xe8"


@pytest.mark.gen_test
async def test_a_stop_ends_at_once_when_all_clients_have_answered_the_close_frame(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesson_server.protocol.server.STOP_TIMEOUT", 1_000)
    websocket = await edge.connected()
    stop = asyncio.create_task(edge.server.stop())
    assert await websocket.receive() is None  # and the close frame is answered
    async with asyncio.timeout(LONG):
        await stop


@pytest.mark.gen_test
async def test_a_stop_that_is_cancelled_closes_the_connections_nevertheless(edge: Edge) -> None:
    ending, may_end = asyncio.Event(), asyncio.Event()

    async def disconnect(sid: str, reason: str) -> None:
        ending.set()
        await may_end.wait()
        await edge.application.disconnect(sid, reason)

    edge.sio.on("disconnect", disconnect)
    await edge.connected()
    stop = asyncio.create_task(edge.server.stop())
    await ending.wait()
    stop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stop
    assert not edge.sio.eio.websockets
    assert len(edge.server.places) == 0
    may_end.set()


# The harness itself


@pytest.mark.gen_test
async def test_what_the_harness_asserts_at_the_end_can_fail(edge: Edge) -> None:
    """Each table tells of a connection while there is one."""

    async def disconnect(sid: str, reason: str) -> None:
        assert {"Rooms._ending", "Engine._tasks"} <= left_of(edge.sio).keys()
        await edge.application.disconnect(sid, reason)

    edge.sio.on("disconnect", disconnect)
    client = await edge.connected()
    await edge.sio.enter_room(edge.application.connected[0], "lesson")
    await edge.sio.emit("news", to=edge.application.connected[0], callback=lambda: None)
    assert {
        "SocketServer.environ",
        "Engine.sockets",
        "Engine.websockets",
        "Rooms._sids",
        "Rooms._eio_sids",
        "Rooms._members",
        "Rooms._rooms_of",
        "Rooms.callbacks",
    } <= set(left_of(edge.sio))
    await client.leave()
    await until(lambda: left_of(edge.sio) == {})
