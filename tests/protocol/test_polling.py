"""polling.py as clients see it: polls, and requests that are too large. Origins are in test_engine.py."""

import socket

import orjson
import pytest
from edge import (
    ACK,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
)
from raw_client import POLLING, SECRET
from waiting import until

from lesson_server.protocol.limits import MAX_MESSAGE_SIZE


@pytest.mark.gen_test
async def test_polling_handshake_join_and_acknowledgement(edge: Edge) -> None:
    response = await edge.request("GET", POLLING)
    opening = orjson.loads(response.body[1:])
    assert response.headers["content-type"] == "text/plain; charset=UTF-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.body[:1] == b"0"
    assert opening.pop("sid") in edge.sio.eio.sockets
    assert opening == {"upgrades": ["websocket"], "pingInterval": 25_000, "pingTimeout": 20_000, "maxPayload": 16_384}

    client = await edge.connected_polling()
    assert (await client.post(JOIN_WITH_ACK)).body == b"ok"
    assert await client.poll() == [ACK]


@pytest.mark.gen_test
async def test_a_poll_waits_for_what_comes_later(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        await client.post(JOIN_WITH_ACK, JOIN_WITH_ACK)
        assert (await poll.response()).body.startswith(ACK.encode())


@pytest.mark.gen_test
async def test_jsonp_is_not_supported(edge: Edge) -> None:
    """A script of another origin needs no Origin header: it must never be given a script."""
    response = await edge.request("GET", POLLING + "&j=0")
    assert response.headers["content-type"].startswith("text/plain")
    assert response.body[:2] == b"0{"


@pytest.mark.gen_test
async def test_two_polls_at_once_end_the_engine_socket(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        assert (await client.get()).status == 400
        assert (await poll.response()).body == b"1"
    assert edge.application.reasons == ["transport error"]
    assert edge.log == ["client dropped: two polls at once"]


@pytest.mark.gen_test
async def test_a_client_that_disappears_from_its_poll_is_disconnected(edge: Edge) -> None:
    """Even while an upgrade is under way."""
    for count, upgrades in ((1, False), (2, True)):
        client = await edge.connected_polling()
        async with client.waiting() as poll:
            if upgrades:
                await edge.websocket(client.sid)
            poll.disappear()
            await until(lambda count=count: edge.application.reasons == ["transport close"] * count)  # type: ignore[misc]


@pytest.mark.gen_test
async def test_the_place_of_a_connection_is_not_kept_after_the_answer_to_its_poll(edge: Edge) -> None:
    """Though its client does not read the answer: a new connection may evict it."""
    edge.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = await edge.connected_polling()
    await until(lambda: len(edge.server.places) == 0)
    connection = await edge.connection(receive_buffer=4096)
    await connection.send_request("GET", client.query)
    await until(lambda: edge.server.places.kept)
    await edge.sio.eio.send(client.sid, "x" * 30_000)
    await until(lambda: not edge.sockets[0]._outbox)
    await until(lambda: not edge.server.places.kept)
    assert len(edge.server.places) == 1


@pytest.mark.gen_test
async def test_the_end_of_an_engine_socket_reaches_the_pending_poll(edge: Edge) -> None:
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        await edge.sio.eio.disconnect(client.sid)
        assert (await poll.response()).body == b"1"
    assert (await client.get()).status == 400


@pytest.mark.gen_test
async def test_the_end_of_an_engine_socket_reaches_the_next_poll(edge: Edge) -> None:
    client = await edge.connected_polling()
    await client.post(JOIN_WITH_ACK)
    await until(lambda: edge.sockets[0]._outbox)
    await edge.sio.eio.disconnect(client.sid)
    assert await client.poll() == [ACK]
    assert await client.poll() == ["1"]
    assert (await client.get()).status == 400


@pytest.mark.gen_test
async def test_a_body_that_is_too_large_is_not_read(edge: Edge) -> None:
    client = await edge.connected_polling()
    connection = await edge.connection()
    await connection.send_request("POST", client.query, **{"Content-Length": str(MAX_MESSAGE_SIZE + 1)})
    assert (await connection.is_ended()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.gen_test
async def test_chunks_that_are_too_large_together_are_not_read(edge: Edge) -> None:
    client = await edge.connected_polling()
    connection = await edge.connection()
    await connection.send_request("POST", client.query, **{"Transfer-Encoding": "chunked"})
    await connection.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
    await connection.write((b"1000\r\n" + bytes(0x1000) + b"\r\n") * 4)
    assert (await connection.is_ended()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.gen_test
async def test_a_defect_is_logged_without_what_the_client_sent(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(*args: object) -> None:
        raise LookupError

    client = await edge.polling()
    monkeypatch.setattr(edge.sio.eio, "find_socket", defective)
    assert (await edge.request("POST", f"{client.query}&access_token={SECRET}", b"40{}")).status == 500
    [record] = caplog.records
    assert record.getMessage() == "POST request failed"
    assert record.exc_info is not None
    assert record.exc_info[0] is LookupError
    assert SECRET not in caplog.text
    caplog.clear()
