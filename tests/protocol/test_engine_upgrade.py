"""The upgrade from polling to a websocket; the handshake, ping and pong."""

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
from raw_client import PING, UPGRADE_HEADERS, frame, websocket_query
from waiting import until

from lesson_server.protocol import engine_socket, limits

# The upgrade


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
async def test_after_an_upgrade_that_failed_another_one_may_be_tried(edge: Edge) -> None:
    client = await edge.connected_polling()
    first = await edge.probing(client.sid)
    await first.leave()
    await until(lambda: not edge.sockets[0].upgrading)
    second = await edge.probing(client.sid)
    await second.send("5", JOIN_WITH_ACK)
    assert await second.receive() == ACK


@pytest.mark.parametrize("message", ["5", JOIN, "3", "2", "", b"2probe"])
@pytest.mark.gen_test
async def test_a_websocket_that_does_not_probe_is_closed_and_polling_goes_on(edge: Edge, message: str | bytes) -> None:
    client = await edge.connected_polling()
    websocket = await edge.websocket(client.sid)
    await websocket.send(message)
    assert await websocket.is_ended() == b""
    await client.post(JOIN_WITH_ACK)
    assert await client.poll() == [ACK]


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


# The handshake, and ping and pong


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
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 3 * limits.HANDSHAKE_TIMEOUT)
    client = await edge.connected()
    assert await client.receive() == "2"


@pytest.mark.gen_test
async def test_a_client_that_answers_pings_stays(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 0.02)
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
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_socket, "PING_TIMEOUT", 0.05)
    client = await edge.connected()
    await client.send("3")
    assert await client.receive() == "2"
    await client.send(*packets)
    assert await client.messages() == []
    assert edge.log == ["client dropped: ping timeout"]


@pytest.mark.gen_test
async def test_a_polling_client_is_pinged_too(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_socket, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_socket, "PING_TIMEOUT", 0.5)
    client = await edge.connected_polling()
    assert await client.poll() == ["2"]
    await client.post("3")
    assert await client.poll() == ["2"]
    assert await client.poll() == ["1"]
    assert edge.log == ["client dropped: ping timeout"]


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
