"""engine_transports.py: the upgrade from polling to a websocket. Polling is in test_polling.py."""

import gc
import socket
import weakref
from itertools import chain

import pytest
from edge import (
    ACK,
    JOIN,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
    short_timeouts_fixture,  # noqa: F401
)
from engine_requests import short_timeouts
from engineio.payload import Payload
from raw_client import UPGRADE_HEADERS, frame, websocket_query
from waiting import LONG, until

from lesson_server.protocol import limits
from lesson_server.protocol.engine_packets import MAX_PACKETS_IN_PAYLOAD
from lesson_server.protocol.limits import MAX_UNREAD_BYTES
from lesson_server.protocol.websocket import Websocket


@pytest.mark.gen_test
async def test_an_upgrade_of_a_client_whose_poll_waits(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        websocket = await edge.probing(client.sid)
        assert (await poll.response()).body == b"6"
    await websocket.send("5", JOIN_WITH_ACK)
    assert await websocket.receive() == ACK
    assert edge.sio.eio.transport(client.sid) == "websocket"


@pytest.mark.gen_test
async def test_a_poll_takes_no_more_packets_than_the_python_client_accepts(edge: Edge) -> None:
    client = await edge.connected_polling()
    [engine_socket] = edge.sockets
    for number in range(2 * MAX_PACKETS_IN_PAYLOAD + 1):
        engine_socket.send(str(number))
    polled = [await client.poll() for _ in range(3)]
    assert [len(packets) for packets in polled] == [MAX_PACKETS_IN_PAYLOAD, MAX_PACKETS_IN_PAYLOAD, 1]
    assert [*chain.from_iterable(polled)] == [f"4{number}" for number in range(2 * MAX_PACKETS_IN_PAYLOAD + 1)]
    assert Payload.max_decode_packets == MAX_PACKETS_IN_PAYLOAD


@pytest.mark.gen_test
async def test_what_is_left_at_the_end_comes_in_payloads_of_the_same_size_and_then_the_end(edge: Edge) -> None:
    client = await edge.connected_polling()
    [engine_socket] = edge.sockets
    for number in range(MAX_PACKETS_IN_PAYLOAD + 1):
        engine_socket.send(str(number))
    await edge.sio.eio.disconnect(client.sid)
    polled = [await client.poll() for _ in range(3)]
    assert [len(packets) for packets in polled] == [MAX_PACKETS_IN_PAYLOAD, 1, 1]
    assert polled[-1] == ["1"]


@pytest.mark.gen_test
async def test_an_upgrade_sends_what_no_poll_has_received(edge: Edge) -> None:
    client = await edge.connected_polling()
    websocket = await edge.probing(client.sid)
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == ["6"]
    await websocket.send("5")
    assert await websocket.receive() == ACK
    await websocket.leave()
    await until(lambda: edge.application.reasons == ["transport close"])


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
async def test_after_an_upgrade_polling_is_refused(edge: Edge) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    await websocket.send("2probe", "5")
    await until(lambda: edge.sockets[0].upgraded)
    assert (await client.get()).status == 400
    assert (await client.post(JOIN)).status == 400
    assert (await edge.request("GET", websocket_query(client.sid), **UPGRADE_HEADERS)).status == 400
    await websocket.send(JOIN_WITH_ACK)
    assert await websocket.receive() == "3probe"
    assert await websocket.receive() == ACK


@pytest.mark.gen_test
async def test_of_two_upgrades_at_once_the_second_is_refused(edge: Edge) -> None:
    client = await edge.connected_polling()
    first = await edge.websocket(client.sid)
    for packets in ("2probe",), ("5", JOIN_WITH_ACK):
        assert (await edge.request("GET", websocket_query(client.sid), **UPGRADE_HEADERS)).status == 400
        await first.send(*packets)
    assert await first.receive() == "3probe"
    assert await first.receive() == ACK


@pytest.mark.gen_test
async def test_an_upgrade_that_is_complete_has_no_deadline(edge: Edge) -> None:
    websocket = await edge.probing((await edge.connected_polling()).sid)
    upgrade = edge.sockets[0]._upgrade
    await websocket.send("5", JOIN_WITH_ACK)
    assert await websocket.receive() == ACK
    assert upgrade._timer.cancelled()


# Upgrades that fail


@pytest.mark.parametrize("message", ["5", JOIN, "3", "2", "", b"2probe"])
@pytest.mark.gen_test
async def test_a_websocket_that_does_not_probe_is_closed_and_polling_goes_on(edge: Edge, message: str | bytes) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    await websocket.send(message)
    assert await websocket.is_ended() == b""
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == [ACK]


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
async def test_after_an_upgrade_that_failed_another_one_may_be_tried(edge: Edge) -> None:
    client = await edge.connected_polling()
    first = await edge.probing(client.sid)
    await first.leave()
    await until(lambda: not edge.sockets[0].upgrading)
    second = await edge.probing(client.sid)
    await second.send("5", JOIN_WITH_ACK)
    assert await second.receive() == ACK


@short_timeouts
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.gen_test
async def test_an_upgrade_that_is_not_completed_is_closed_and_polling_goes_on(edge: Edge, begun: bool) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    if begun:
        await websocket.send("2probe")
    assert await websocket.messages() == ["3probe"] * begun
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == [ACK]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.gen_test
async def test_an_upgrade_ends_with_its_engine_socket(edge: Edge, begun: bool) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    if begun:
        await websocket.send("2probe")
        assert await websocket.receive() == "3probe"
    await client.post("1")
    assert await websocket.is_ended() == b""


@pytest.mark.gen_test
async def test_nothing_is_upgraded_after_the_end_of_its_engine_socket(edge: Edge) -> None:
    """No timer would ever close it."""
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    await client.post("1")
    await websocket.send("2probe", "5")
    assert await websocket.messages() == []


@pytest.mark.gen_test
async def test_a_cancelled_upgrade_leaves_nothing(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline would hold it, and a client may begin as many as it likes."""
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT", 10 * LONG)
    sid = (await edge.connected_polling()).sid
    websocket = await edge.websocket(sid)
    await websocket.write(frame("x" * 16_000, final=False))
    left = weakref.ref(edge.sockets[0]._upgrade.websocket)
    gc.collect()
    gc.disable()
    try:
        websocket.disappear()
        await until(lambda: left() is None)
    finally:
        gc.enable()
