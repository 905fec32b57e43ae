"""engine.py as clients see it: Engine.IO sockets and origins; and as python-socketio sees it."""

import asyncio
import base64

import orjson
import pytest
from edge import (
    JOIN,
    Edge,
    edge_fixture,  # noqa: F401
    short_timeouts_fixture,  # noqa: F401
)
from engine_requests import FOREIGN, WEBSOCKET, short_timeouts
from raw_client import POLLING, UPGRADE_HEADERS, websocket_query
from waiting import until

from lesson_server.protocol.engine import ID_BYTES, IDS_AT_ONCE, Engine
from lesson_server.protocol.places import Places


@pytest.mark.gen_test
async def test_a_polling_only_server_offers_no_upgrade_and_takes_none(edge: Edge) -> None:
    edge.sio.eio.transports = ["polling"]
    client = await edge.connected_polling()
    assert orjson.loads((await edge.request("GET", POLLING)).body[1:])["upgrades"] == []
    assert (await edge.request("GET", websocket_query(client.sid), **UPGRADE_HEADERS)).status == 400


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
