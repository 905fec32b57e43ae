"""engine_socket.py: the limits of an Engine.IO socket, and its transports; requests to it are in test_engine.py."""

import socket

import pytest
from edge import (
    ACK,
    JOIN,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
)
from raw_client import frame
from waiting import until

from lesson_server.protocol.engine_packets import MAX_PACKETS_IN_POST
from lesson_server.protocol.engine_socket import MAX_UNREAD_PACKETS
from lesson_server.protocol.limits import MAX_UNREAD_BYTES
from lesson_server.protocol.websocket import Websocket

# What a client may leave unread, and send at once


@pytest.mark.parametrize(
    "messages",
    [["x"] * MAX_UNREAD_PACKETS, ["x" * (MAX_UNREAD_BYTES // 2 - len("4"))] * 2],
    ids=["packets", "bytes"],
)
@pytest.mark.gen_test
async def test_a_client_may_leave_as_much_unread_as_the_bounds_say_and_no_more(edge: Edge, messages: list[str]) -> None:
    client = await edge.connected_polling()
    [engine_socket] = edge.sockets
    for message in messages:
        engine_socket.send(message)
    assert not engine_socket.closed
    assert await client.poll() == ["4" + message for message in messages]
    for message in [*messages, ""]:
        engine_socket.send(message)
    assert engine_socket.closed
    assert edge.log == ["client dropped: slow reader"]


@pytest.mark.gen_test
async def test_a_body_may_have_as_many_packets_as_the_bound_says(edge: Edge) -> None:
    client = await edge.connected_polling()
    assert (await client.post(*["43[]"] * MAX_PACKETS_IN_POST)).status == 200


@pytest.mark.parametrize("end", ["1", "41"])
@pytest.mark.gen_test
async def test_what_follows_the_end_in_a_body_is_ignored(edge: Edge, end: str) -> None:
    client = await edge.connected_polling()
    assert (await client.post(end, JOIN, "9")).body == b"ok"
    await until(lambda: not edge.sockets)
    assert edge.application.joins == []
    assert edge.application.reasons == ["client disconnect"]


@pytest.mark.gen_test
async def test_a_pong_counts_once_and_only_after_a_ping(edge: Edge) -> None:
    """One that nobody asked for must not put a deadline off."""
    client = await edge.connected_polling()
    [engine_socket] = edge.sockets
    until_the_ping = engine_socket._timer
    await client.post("3")
    assert engine_socket._timer is until_the_ping
    engine_socket._ping()
    until_the_pong = engine_socket._timer
    await client.post("3")
    until_the_next_ping = engine_socket._timer
    assert until_the_next_ping is not until_the_pong
    await client.post("3")
    assert engine_socket._timer is until_the_next_ping


@pytest.mark.gen_test
async def test_at_its_end_an_engine_socket_sends_its_queue_to_the_websocket_and_nothing_to_a_poll(edge: Edge) -> None:
    client = await edge.connected()
    [engine_socket] = edge.sockets
    engine_socket._websocket.is_writable = False  # as when the client reads nothing
    engine_socket.send("the last")
    engine_socket.end(edge.sio.eio.reason.SERVER_DISCONNECT)
    assert await client.messages() == ["4the last"]
    assert (await edge.request("GET", f"EIO=4&transport=polling&sid={engine_socket.sid}")).status == 400


# The upgrade


@pytest.mark.parametrize("message", ["2probe", JOIN, "3", "1"])
@pytest.mark.gen_test
async def test_a_websocket_that_has_probed_may_only_complete_the_upgrade(edge: Edge, message: str) -> None:
    """Else it is closed at once, whatever it has sent beside, and polling goes on."""
    client = await edge.connected_polling()
    websocket = await edge.probing(client.sid)
    await websocket.send(message, "5")
    assert await websocket.is_ended() == b""
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == [ACK]
    assert edge.application.joins == [()]


@pytest.mark.gen_test
async def test_an_upgrade_writes_no_more_than_the_system_takes(edge: Edge) -> None:
    """The rest waits in the Engine.IO socket, which counts it."""
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected_polling()
    [engine_socket] = edge.sockets
    messages = [f"{number:1000}" for number in range(MAX_UNREAD_BYTES // 1_000 - 1)]
    for message in messages:
        engine_socket.send(message)
    websocket = await edge.websocket(client.sid, receive_buffer=4096)
    await websocket.send("2probe")
    assert await websocket.receive() == "3probe"
    await websocket.send("5")
    await until(lambda: engine_socket.upgraded)
    assert engine_socket._outbox
    assert isinstance(engine_socket._websocket, Websocket)
    assert engine_socket._websocket._underlying.get_write_buffer_size() <= len(frame("4" + messages[0]))
    assert [await websocket.receive() for _ in messages] == ["4" + message for message in messages]


@pytest.mark.gen_test
async def test_the_place_of_a_websocket_is_kept_once_it_is_the_transport(edge: Edge) -> None:
    places = edge.server.places
    client = await edge.connected_polling()
    websocket = await edge.probing(client.sid)
    assert not places.kept
    await websocket.send("5", JOIN_WITH_ACK)
    assert await websocket.receive() == ACK
    assert len(places.kept) == 1
    await edge.connected()
    assert len(places.kept) == 2


@pytest.mark.gen_test
async def test_an_engine_socket_keeps_its_place_when_its_handshake_is_complete(edge: Edge) -> None:
    places = edge.sio.eio._socket_places
    client = await edge.polling()
    assert (len(places), len(places.kept)) == (1, 0)
    await client.post("40{}")
    assert (len(places), len(places.kept)) == (1, 1)
