"""websocket.py as clients see it: the end of a websocket, and what is left of it."""

import asyncio
import gc

import pytest
from edge import (
    ACK,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
)
from picows import WSTransport
from waiting import until

from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.protocol.http_server import ClientStream
from lesson_server.protocol.polling import PollingHandler
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.websocket_protocol import WebsocketProtocol


@pytest.mark.gen_test
async def test_the_end_of_an_engine_socket_closes_its_websocket(edge: Edge) -> None:
    client = await edge.connected()
    await edge.sio.eio.disconnect()
    assert await client.messages() == []
    assert edge.application.reasons == ["server disconnect"]


@pytest.mark.gen_test
async def test_a_client_that_does_not_answer_the_close_frame_is_closed(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesson_server.protocol.websocket.CLOSE_TIMEOUT", 0.05)
    client = await edge.connected()
    await edge.sio.eio.disconnect()
    assert await client.is_ended() == b"\x88\x02\x03\xe8"
    assert not edge.sio.eio.websockets


@pytest.mark.gen_test
async def test_a_server_that_has_stopped_closes_the_websockets_that_are_left(edge: Edge) -> None:
    """Whatever their clients do: these have not even been told."""
    clients = [await edge.connected() for _ in range(3)]
    await edge.sio.eio.abort()
    assert [await client.is_ended() for client in clients] == [b""] * 3
    await until(lambda: edge.application.reasons == ["transport close"] * 3)


@pytest.mark.gen_test
async def test_a_lost_connection_leaves_no_timer(edge: Edge) -> None:
    client = await edge.connected()
    [engine_socket] = edge.sockets
    websocket = engine_socket._websocket
    client.disappear()
    await until(lambda: not edge.sockets)
    assert engine_socket._timer.cancelled()
    assert isinstance(websocket, Websocket)
    assert websocket._close_timer is None or websocket._close_timer.cancelled()


@pytest.mark.parametrize("ended_by", ["client", "server"])
@pytest.mark.gen_test
async def test_an_ended_connection_leaves_nothing_to_the_garbage_collector(edge: Edge, ended_by: str) -> None:
    """It took a tenth of the time of a class start."""
    await edge.serves_others()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        client = await edge.connected()
        await client.send(JOIN_WITH_ACK)
        assert await client.receive() == ACK
        if ended_by == "server":
            await edge.sio.eio.disconnect()
            await client.messages()
        await client.leave()
        await until(lambda: not edge.sockets and not edge.sio.eio.websockets)
        gc.collect()
        left = {type(item) for item in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not left & {
        *(EngineSocket, Websocket, WebsocketProtocol, WSTransport),
        *(PollingHandler, ClientStream, asyncio.Task),
    }
