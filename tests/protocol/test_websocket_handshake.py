"""websocket_handshake.py, and the handshakes of websockets as clients see them."""

import asyncio
import gc

import orjson
import pytest
from edge import (
    ACK,
    JOIN_WITH_ACK,
    Edge,
    edge_fixture,  # noqa: F401
)
from engine_requests import WEBSOCKET, handshake
from fake_engine import REQUEST, websocket_of
from multidict import CIMultiDict
from picows import WSTransport, WSUpgradeRequest
from raw_client import SECRET, UPGRADE_HEADERS, websocket_query
from waiting import until

from lesson_server.protocol.engine_packets import RequestRefused
from lesson_server.protocol.limits import MAX_HEADER_LINES, MAX_PARAMETERS, MAX_URL_SIZE
from lesson_server.protocol.websocket import Websocket
from lesson_server.protocol.websocket_handshake import check_request
from lesson_server.protocol.websocket_protocol import WebsocketProtocol


@pytest.mark.gen_test
async def test_a_websocket_is_offered_no_upgrade(edge: Edge) -> None:
    connection = await edge.connection()
    assert (await connection.request("GET", WEBSOCKET, **UPGRADE_HEADERS)).status == 101
    opening = await connection.receive()
    assert isinstance(opening, str)
    assert orjson.loads(opening[1:])["upgrades"] == []


@pytest.mark.gen_test
async def test_a_request_that_arrives_in_pieces_is_waited_for(edge: Edge) -> None:
    connection = await edge.connection()
    headers = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": connection.host} | UPGRADE_HEADERS).items())
    request = f"GET /socket.io/?{websocket_query()} HTTP/1.1\r\n{headers}\r\n".encode()
    for byte in request[:-1]:
        await connection.write(bytes([byte]))
        await asyncio.sleep(0)
    assert not edge.sockets
    await connection.write(request[-1:])
    assert (await connection.response()).status == 101


@pytest.mark.gen_test
async def test_compression_is_not_negotiated(edge: Edge) -> None:
    """A compressor costs 187 kB a connection."""
    connection = await edge.connection()
    offer = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
    response = await connection.request("GET", websocket_query(), **UPGRADE_HEADERS, **offer)
    assert response.status == 101
    assert "sec-websocket-extensions" not in response.headers


# The headers


@pytest.mark.parametrize("options", ["upgrade", "keep-alive, Upgrade", "Upgrade,keep-alive"])
@pytest.mark.gen_test
async def test_an_upgrade_may_stand_among_other_options_of_the_connection(edge: Edge, options: str) -> None:
    """Firefox sends the second."""
    client = await edge.connected(Connection=options)
    await client.send(JOIN_WITH_ACK)
    assert await client.receive() == ACK


@pytest.mark.gen_test
async def test_the_options_of_a_connection_may_stand_on_several_lines(edge: Edge) -> None:
    connection = await edge.connection()
    headers = UPGRADE_HEADERS | {"Connection": "keep-alive\r\nConnection: Upgrade"}
    assert (await connection.request("GET", websocket_query(), **headers)).status == 101


@pytest.mark.gen_test
async def test_the_options_of_a_connection_may_stand_in_several_lines() -> None:
    two_lines = b"\r\nConnection: keep-alive\r\nConnection: Upgrade\r\n"
    async with websocket_of(b"", REQUEST.replace(b"\r\nConnection: Upgrade\r\n", two_lines)) as engine:
        await until(lambda: engine.websocket.is_writable)


@pytest.mark.gen_test
async def test_the_refusal_of_another_version_names_the_supported_one(edge: Edge) -> None:
    response = await edge.request("GET", WEBSOCKET, **UPGRADE_HEADERS | {"Sec-WebSocket-Version": "8"})
    assert (response.status, response.headers["sec-websocket-version"]) == (426, "13")


# The URL, and the size of the head


@pytest.mark.parametrize(
    ("path", "status"),
    [("/socket.io/", 101), ("/socket.io", 101), ("/socket.io/x", 404), ("/socket.iox", 404)],
)
@pytest.mark.gen_test
async def test_websockets_have_one_path(edge: Edge, path: str, status: int) -> None:
    """With or without a slash at its end."""
    connection = await edge.connection()
    await connection.write(handshake(f"{path}?{WEBSOCKET}"))
    assert (await connection.response()).status == status


URL = f"/socket.io/?{WEBSOCKET}&x="


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        pytest.param(
            handshake(URL.ljust(MAX_URL_SIZE, "x")),
            handshake(URL.ljust(MAX_URL_SIZE + 1, "x")),
            id="URL",
        ),
        pytest.param(
            handshake(URL + "&x=" * (MAX_PARAMETERS - URL.count("="))),
            handshake(URL + "&x=" * (MAX_PARAMETERS - URL.count("=") + 1)),
            id="parameters",
        ),
        pytest.param(
            handshake(URL, *["a: x"] * (MAX_HEADER_LINES - len(UPGRADE_HEADERS))),
            handshake(URL, *["a: x"] * (MAX_HEADER_LINES - len(UPGRADE_HEADERS) + 1)),
            id="header lines",
        ),
    ],
)
@pytest.mark.gen_test
async def test_the_head_of_a_websocket_is_bounded_as_any_other(edge: Edge, allowed: bytes, refused: bytes) -> None:
    for head, status in ((allowed, 101), (refused, 400)):
        connection = await edge.connection()
        await connection.write(head)
        assert (await connection.response()).status == status


# What is left of it


@pytest.mark.gen_test
async def test_a_refused_handshake_leaves_nothing_to_the_garbage_collector(edge: Edge) -> None:
    await edge.serves_others()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        connection = await edge.connection()
        assert (await connection.request("GET", WEBSOCKET + "&sid=x", **UPGRADE_HEADERS)).status == 400
        await connection.is_ended()
        await until(lambda: not edge.sio.eio.websockets)
        gc.collect()
        left = {type(item) for item in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not left & {
        *(Websocket, WebsocketProtocol, RequestRefused),
        *(WSTransport, WSUpgradeRequest, CIMultiDict),
    }


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


# Each check by itself


def request_with(**changed: str | None) -> WSUpgradeRequest:
    headers = {
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version": "13",
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    request = WSUpgradeRequest.__new__(WSUpgradeRequest)
    present = [(name, value) for name, value in headers.items() if value is not None]
    request.headers = CIMultiDict[str](present)
    return request


def test_a_good_handshake_passes() -> None:
    request = request_with()
    check_request(request)
    assert request.headers["Connection"] == "Upgrade"


@pytest.mark.parametrize(
    "changed",
    [
        {"Connection": None},
        {"Connection": "close"},
        {"Sec_WebSocket_Key": None},
        {"Sec_WebSocket_Key": "AAAA"},
        {"Sec_WebSocket_Key": "AAAAAAAAAAA!AAAAAAAAAAA=="},  # without the check of each character, 16 bytes
        {"Sec_WebSocket_Key": "not base64"},
        {"Sec_WebSocket_Version": None},
        {"Sec_WebSocket_Version": "8"},
    ],
    ids=str,
)
def test_a_header_that_is_missing_or_wrong_is_refused(changed: dict[str, str | None]) -> None:
    with pytest.raises(RequestRefused):
        check_request(request_with(**changed))
