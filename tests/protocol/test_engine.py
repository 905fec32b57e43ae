"""engine.py as clients see it: polling, origins, and what is refused."""

import asyncio
import base64
import socket

import orjson
import pytest
from edge import (
    ACK,
    BINARY_JOIN,
    JOIN,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
    short_timeouts_fixture,  # noqa: F401
)
from engine_requests import FOREIGN, WEBSOCKET, short_timeouts
from raw_client import POLLING, SECRET, UPGRADE_HEADERS, websocket_query
from waiting import until

from lesson_server.protocol.engine import ID_BYTES, IDS_AT_ONCE, Engine
from lesson_server.protocol.engine_packets import MAX_PACKETS_IN_POST
from lesson_server.protocol.engine_socket import MAX_UNREAD_PACKETS
from lesson_server.protocol.limits import MAX_MESSAGE_SIZE, MAX_UNREAD_BYTES
from lesson_server.protocol.places import Places

# Polling


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
async def test_a_polling_only_server_offers_no_upgrade_and_takes_none(edge: Edge) -> None:
    edge.sio.eio.transports = ["polling"]
    client = await edge.connected_polling()
    assert orjson.loads((await edge.request("GET", POLLING)).body[1:])["upgrades"] == []
    assert (await edge.request("GET", websocket_query(client.sid), **UPGRADE_HEADERS)).status == 400


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
    client = await edge.connected_polling()
    async with client.waiting() as poll:
        poll.disappear()
        await until(lambda: edge.application.reasons == ["transport close"])


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


@short_timeouts
@pytest.mark.gen_test
async def test_the_final_payload_of_a_client_that_never_polls_is_discarded(edge: Edge) -> None:
    client = await edge.connected_polling()
    await edge.sio.eio.disconnect(client.sid)
    await until(lambda: not edge.sio.eio._final_payloads)


@pytest.mark.gen_test
async def test_an_engine_socket_that_is_ending_is_unknown_to_requests(edge: Edge) -> None:
    """Nobody would ever answer a poll that began to wait while the disconnect handler ran."""
    client = await edge.connected_polling()
    may_end = asyncio.Event()

    async def slow_disconnect(sid: str, reason: str) -> None:
        await may_end.wait()
        await edge.application.disconnect(sid, reason)

    edge.sio.on("disconnect", slow_disconnect)
    leaving = asyncio.create_task(client.post("1"))
    await until(lambda: edge.sockets[0].closed)
    assert await client.poll() == ["1"]
    assert (await client.get()).status == 400
    assert (await client.post(JOIN)).status == 400
    may_end.set()
    assert (await leaving).body == b"ok"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty body"),
        pytest.param(b"\x1e", id="empty packets"),
        pytest.param(b"4" + b"\xff", id="invalid UTF-8"),
        pytest.param(b"bAAAA", id="binary message"),
        pytest.param(BINARY_JOIN.encode(), id="binary event"),
        pytest.param(b"2", id="ping of a client"),
        pytest.param(b"2probe", id="probe"),
        pytest.param(b"5", id="upgrade"),
        pytest.param(b"9" + SECRET.encode(), id="unknown packet"),
        pytest.param(b"\x1e".join([b"3"] * (MAX_PACKETS_IN_POST + 1)), id="too many packets"),
        pytest.param(b"4" + SECRET.encode(), id="malformed message"),
    ],
)
@pytest.mark.gen_test
async def test_a_body_that_is_no_list_of_packets_ends_the_engine_socket(edge: Edge, body: bytes) -> None:
    client = await edge.connected_polling()
    connection = await edge.connection()
    response = await connection.request("POST", client.query, body, **{"Content-Length": str(len(body))})
    assert response.status == 400
    assert await connection.is_ended() == b""
    assert edge.application.reasons == ["transport error"]
    assert len(edge.log) == 1
    await edge.serves_others()


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
async def test_binary_messages_travel_as_base64_when_polling(edge: Edge) -> None:
    client = await edge.connected_polling()
    await edge.sio.eio.send(client.sid, b"\x02")
    assert await client.poll() == ["bAg=="]


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


@pytest.mark.gen_test
async def test_a_defect_at_the_handshake_of_a_websocket_is_logged_and_not_sent(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(*args: object) -> None:
        raise LookupError("for the log only")

    monkeypatch.setattr(edge.sio.eio, "find_socket", defective)
    response = await edge.request("GET", f"{websocket_query()}&access_token={SECRET}", **UPGRADE_HEADERS)
    assert (response.status, orjson.loads(response.body)) == (500, {"code": 3, "message": "Internal error"})
    [record] = caplog.records
    assert record.getMessage() == "a handshake failed"
    assert "for the log only" in caplog.text
    assert SECRET not in caplog.text
    caplog.clear()


@pytest.mark.gen_test
async def test_a_defect_at_a_message_of_a_websocket_is_logged_and_ends_it(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(*args: object) -> None:
        raise LookupError

    client = await edge.connected()
    monkeypatch.setattr(edge.sio, "_begin_event", defective)
    await client.send(f'42["join_lesson","{SECRET}"]')
    assert await client.messages() == []
    await until(lambda: not edge.sockets)
    [record] = caplog.records
    assert record.getMessage() == "a message could not be handled"
    assert SECRET not in caplog.text
    caplog.clear()


# Origins


@pytest.mark.parametrize(
    ("allowed", "origin", "is_allowed"),
    [
        ((), "http://{host}", True),
        ((), "HTTP://{host}", True),
        ((), "https://{host}", True),  # TLS ends at a proxy
        ((), "http://{host}.elsewhere.example", False),
        ((), "http://elsewhere.example:{port}", False),
        ((), "http://{host}, " + FOREIGN, False),
        ((), "", False),
        ((FOREIGN,), FOREIGN, True),
        ((FOREIGN,), FOREIGN.upper(), True),
        ((FOREIGN,), FOREIGN + ":8443", False),
        ((FOREIGN,), "http://{host}", True),
        (("*",), "https://anywhere.example", True),
    ],
)
@pytest.mark.gen_test
async def test_origins(edge: Edge, allowed: tuple[str, ...], origin: str, is_allowed: bool) -> None:
    edge.sio.eio._allowed_origins = frozenset(allowed)
    origin = origin.format(host=f"127.0.0.1:{edge.port}", port=edge.port)
    polling = await edge.request("GET", POLLING, Origin=origin)
    websocket = await edge.request("GET", WEBSOCKET, Origin=origin, **UPGRADE_HEADERS)
    if is_allowed:
        assert (polling.status, websocket.status) == (200, 101)
        assert polling.headers["access-control-allow-origin"] == origin
        assert polling.headers["access-control-allow-credentials"] == "true"
        assert polling.headers["vary"] == "Origin"
    else:
        assert (polling.status, websocket.status) == (403, 403)
        assert "access-control-allow-origin" not in polling.headers


def test_allowed_origins_reach_the_engine() -> None:
    eio = Engine(socket_places=Places(1), allowed_origins=(FOREIGN,))
    assert eio.allows(FOREIGN, "here.example")
    assert not eio.allows("https://other.example", "here.example")
    assert not eio.allows("null", "")


@pytest.mark.parametrize("origin", ["http://here.example", "http://", "null"])
@pytest.mark.gen_test
async def test_without_a_host_no_origin_is_the_server_s_own(edge: Edge, origin: str) -> None:
    """HTTP/1.0 may leave the host out."""
    connection = await edge.connection()
    await connection.write(f"GET /socket.io/?{POLLING} HTTP/1.0\r\nOrigin: {origin}\r\n\r\n".encode())
    assert (await connection.response()).status == 403


@pytest.mark.parametrize("origin", ["http://here.example", "http://", "null"])
@pytest.mark.gen_test
async def test_without_a_host_no_origin_is_the_server_s_own_for_a_websocket(edge: Edge, origin: str) -> None:
    headers = "".join(f"{name}: {value}\r\n" for name, value in (UPGRADE_HEADERS | {"Origin": origin}).items())
    connection = await edge.connection()
    await connection.write(f"GET /socket.io/?{WEBSOCKET} HTTP/1.1\r\n{headers}\r\n".encode())
    assert (await connection.response()).status == 403


@pytest.mark.gen_test
async def test_without_an_origin_no_cors_headers_are_sent(edge: Edge) -> None:
    response = await edge.request("GET", POLLING)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.gen_test
async def test_a_preflight_is_answered(edge: Edge) -> None:
    edge.sio.eio._allowed_origins = frozenset({FOREIGN})
    response = await edge.request("OPTIONS", POLLING, Origin=FOREIGN, **{"Access-Control-Request-Method": "POST"})
    assert response.status == 204
    assert response.headers["access-control-allow-origin"] == FOREIGN
    assert response.headers["access-control-allow-methods"] == "GET, POST, OPTIONS"
    assert response.headers["access-control-allow-headers"] == "Content-Type"


# The engine for those that embed it


def test_each_id_is_as_many_random_bytes_of_its_own() -> None:
    engine = Engine(socket_places=Places(1))
    ids = [engine.generate_id() for _ in range(2 * IDS_AT_ONCE)]
    assert {len(base64.urlsafe_b64decode(sid)) for sid in ids} == {ID_BYTES}
    assert len(set(ids)) == len(ids)


def test_what_python_socketio_passes_on_reaches_the_engine() -> None:
    assert Engine(socket_places=Places(1), transports=["polling"]).transports == ["polling"]


@pytest.mark.gen_test
async def test_messages_to_an_engine_socket_that_has_ended_are_dropped(edge: Edge) -> None:
    client = await edge.connected_polling()
    engine_socket = edge.sockets[0]
    await edge.sio.eio.disconnect(client.sid)
    engine_socket.send("late")
    await edge.sio.eio.send(client.sid, "late")
    await edge.sio.eio.disconnect(client.sid)
    assert await client.poll() == ["1"]


@pytest.mark.gen_test
async def test_emitted_events_reach_both_transports(edge: Edge) -> None:
    polling, websocket = await edge.connected_polling(), await edge.connected()
    await edge.sio.emit("news", 1)
    assert await polling.poll() == ['42["news",1]']
    assert await websocket.receive() == '42["news",1]'
