"""engine_socket.py: the limits of an Engine.IO socket, its handshake, ping and pong, and its end."""

import pytest
from edge import (
    ACK,
    JOIN,
    JOIN_WITH_ACK,
    REFUSAL,
    REFUSED_HANDSHAKE,
    Edge,
    edge_fixture,  # noqa: F401
    short_timeouts_fixture,  # noqa: F401
)
from engine_requests import short_timeouts
from raw_client import PING, frame
from waiting import until

from lesson_server.protocol import engine_socket as engine_socket_module
from lesson_server.protocol import limits
from lesson_server.protocol.engine_socket import MAX_UNREAD_PACKETS
from lesson_server.protocol.limits import MAX_UNREAD_BYTES

# What a client may leave unread


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
    received: list[str] = []
    while len(received) < len(messages):
        received += await client.poll()
    assert received == ["4" + message for message in messages]
    for message in [*messages, ""]:
        engine_socket.send(message)
    assert engine_socket.closed
    assert edge.log == ["client dropped: slow reader"]


@pytest.mark.gen_test
async def test_a_polling_client_that_never_polls_is_dropped(edge: Edge) -> None:
    client = await edge.connected_polling()
    for _ in range(MAX_UNREAD_PACKETS + 1):
        await edge.sio.eio.send(client.sid, "")
    await until(lambda: not edge.sockets)
    assert edge.log == ["client dropped: slow reader"]
    assert await client.poll() == ["1"]


@pytest.mark.gen_test
async def test_large_messages_count_more_than_small_ones(edge: Edge) -> None:
    client = await edge.connected_polling()
    await edge.sio.eio.send(client.sid, "x" * MAX_UNREAD_BYTES)
    await until(lambda: not edge.sockets)
    assert edge.application.reasons == ["transport error"]


# The handshake


@short_timeouts
@pytest.mark.parametrize(
    "packets", [(), ("3",) * 9, ("43[]",), (frame("", PING),)], ids=["silence", "pongs", "acknowledgement", "pings"]
)
@pytest.mark.gen_test
async def test_a_websocket_without_a_handshake_is_closed(edge: Edge, packets: tuple[str | bytes, ...]) -> None:
    client = await edge.websocket()
    for packet in packets:
        await (client.write(packet) if isinstance(packet, bytes) else client.send(packet))
    await client.messages()
    assert edge.log == ["client dropped: handshake timeout"]


@short_timeouts
@pytest.mark.gen_test
async def test_a_polling_client_without_a_handshake_is_dropped(edge: Edge) -> None:
    client = await edge.polling()
    assert await client.poll() == ["1"]
    assert edge.log == ["client dropped: handshake timeout"]


@short_timeouts
@pytest.mark.gen_test
async def test_after_the_handshake_no_handshake_is_missed(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket_module, "PING_INTERVAL", 3 * limits.HANDSHAKE_TIMEOUT)
    client = await edge.connected()
    assert await client.receive() == "2"


@pytest.mark.gen_test
async def test_a_refused_handshake_is_answered_and_its_websocket_closed(edge: Edge) -> None:
    client = await edge.websocket()
    await client.send(REFUSED_HANDSHAKE)
    assert await client.messages() == ['44{"message":"' + REFUSAL + '"}']
    assert not edge.sockets


@pytest.mark.gen_test
async def test_a_refused_handshake_is_answered_and_its_polling_ended(edge: Edge) -> None:
    client = await edge.polling()
    async with client.waiting() as poll:
        await client.post(REFUSED_HANDSHAKE)
        assert (await poll.response()).body == b'44{"message":"' + REFUSAL.encode() + b'"}'
    assert await client.poll() == ["1"]  # by itself: the JavaScript client would take it before the message
    client = await edge.polling()
    await client.post(REFUSED_HANDSHAKE)
    assert await client.poll() == ['44{"message":"' + REFUSAL + '"}']
    assert await client.poll() == ["1"]
    assert (await client.get()).status == 400


# Ping and pong


@pytest.mark.gen_test
async def test_a_client_that_answers_pings_stays(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket_module, "PING_INTERVAL", 0.02)
    client = await edge.connected()
    for _ in range(3):
        assert await client.receive() == "2"
        await client.send("3")


@pytest.mark.parametrize("packets", [(), (JOIN, "43[]")])
@pytest.mark.gen_test
async def test_a_client_that_answers_no_ping_is_dropped(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, packets: tuple[str, ...]
) -> None:
    """Whatever else it says: a pong that was sent before the ping is none."""
    monkeypatch.setattr(engine_socket_module, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_socket_module, "PING_TIMEOUT", 0.05)
    client = await edge.connected()
    await client.send("3")
    assert await client.receive() == "2"
    await client.send(*packets)
    assert await client.messages() == []
    assert edge.log == ["client dropped: ping timeout"]


@pytest.mark.gen_test
async def test_a_polling_client_is_pinged_too(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket_module, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_socket_module, "PING_TIMEOUT", 0.5)
    client = await edge.connected_polling()
    assert await client.poll() == ["2"]
    await client.post("3")
    assert await client.poll() == ["2"]
    assert await client.poll() == ["1"]
    assert edge.log == ["client dropped: ping timeout"]


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


# Its place


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


# The end


@pytest.mark.parametrize("end", ["1", "41"])
@pytest.mark.gen_test
async def test_what_follows_the_end_in_a_body_is_ignored(edge: Edge, end: str) -> None:
    client = await edge.connected_polling()
    assert (await client.post(end, JOIN, "9")).body == b"ok"
    await until(lambda: not edge.sockets)
    assert edge.application.joins == []
    assert edge.application.reasons == ["client disconnect"]


@pytest.mark.gen_test
async def test_at_its_end_an_engine_socket_sends_its_queue_to_the_websocket_and_nothing_to_a_poll(edge: Edge) -> None:
    client = await edge.connected()
    [engine_socket] = edge.sockets
    engine_socket._websocket.is_writable = False  # as when the client reads nothing
    engine_socket.send("the last")
    engine_socket.end(edge.sio.eio.reason.SERVER_DISCONNECT)
    assert await client.messages() == ["4the last"]
    assert (await edge.request("GET", f"EIO=4&transport=polling&sid={engine_socket.sid}")).status == 400
