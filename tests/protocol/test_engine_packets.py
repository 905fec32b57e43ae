"""engine_packets.py: the bodies of polling requests, and the payloads of their responses."""

import pytest
from edge import (
    BINARY_JOIN,
    Edge,
    edge_fixture,  # noqa: F401
)
from raw_client import SECRET

from lesson_server.protocol.engine_packets import MAX_PACKETS_IN_PAYLOAD


@pytest.mark.gen_test
async def test_a_body_may_have_as_many_packets_as_the_bound_says(edge: Edge) -> None:
    client = await edge.connected_polling()
    assert (await client.post(*["43[]"] * MAX_PACKETS_IN_PAYLOAD)).status == 200


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
        pytest.param(b"\x1e".join([b"3"] * (MAX_PACKETS_IN_PAYLOAD + 1)), id="too many packets"),
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
async def test_binary_messages_travel_as_base64_when_polling(edge: Edge) -> None:
    client = await edge.connected_polling()
    await edge.sio.eio.send(client.sid, b"\x02")
    assert await client.poll() == ["bAg=="]
