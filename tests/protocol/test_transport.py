"""transport.py as clients see it: which Socket.IO packets are taken in, and what the others cost their senders."""

import asyncio
import logging
from typing import Any

import pytest
from edge import (
    ACCEPTED,
    ACK,
    BINARY_JOIN,
    JOIN,
    JOIN_WITH_ACK,
    REFUSAL,
    REFUSED_HANDSHAKE,
    Edge,
    edge_fixture,  # noqa: F401
)
from raw_client import SECRET
from socketio.packet import Packet
from waiting import until

from lesson_server.protocol.limits import MAX_MESSAGE_SIZE
from lesson_server.protocol.places import Places
from lesson_server.protocol.transport import MAX_EVENT_SIZE, MAX_WAITING_EVENTS, SocketServer, TooMuchData

# The handshake


@pytest.mark.gen_test
async def test_the_log_says_nothing_of_what_clients_send(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = await edge.connected('{"access_token":"the secret"}')
    await client.send('42["join_lesson","the secret"]', JOIN_WITH_ACK)
    assert await client.receive() == ACK
    assert caplog.records == []


@pytest.mark.gen_test
async def test_the_rooms_listen_once_and_not_again_for_the_first_client(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(edge.sio.manager, "initialize", lambda: begun.append("again"))
    await edge.connected()
    assert begun == []
    edge.sio.start_rooms()
    assert begun == ["again"]


@pytest.mark.parametrize(
    "auth", ["", "{}", "null", "[]", '"text"', "0", '{"client":"teacher"}', '{"a":' * 500 + "1" + "}" * 500]
)
@pytest.mark.gen_test
async def test_the_handler_decides_whatever_the_auth_is(edge: Edge, auth: str) -> None:
    client = await edge.websocket()
    await client.send("40" + auth)
    answer = await client.receive()
    assert answer == '40{"sid":"' + edge.application.connected[0] + '"}'


@pytest.mark.gen_test
async def test_a_refused_client_is_neither_connected_nor_disconnected(edge: Edge) -> None:
    client = await edge.websocket()
    await client.send(REFUSED_HANDSHAKE, JOIN_WITH_ACK)
    assert await client.messages() == ['44{"message":"' + REFUSAL + '"}']
    await until(lambda: not edge.sockets)
    assert (edge.application.connected, edge.application.ended, edge.application.joins) == ([], [], [])


@pytest.mark.parametrize("namespace", ["/other", "/other?access_token=" + SECRET, "/" + "x" * 1000])
@pytest.mark.gen_test
async def test_another_namespace_is_refused_and_its_transport_closed(edge: Edge, namespace: str) -> None:
    client = await edge.websocket()
    await client.send(f"40{namespace},{{}}")
    assert await client.messages() == [f'44{namespace.partition("?")[0]},{{"message":"no such namespace"}}']


@pytest.mark.parametrize(
    "packet", [JOIN, JOIN_WITH_ACK, BINARY_JOIN, '42["connect","sid",{},{}]', '42["disconnect","sid"]', "4", "42[]"]
)
@pytest.mark.gen_test
async def test_nothing_is_an_event_before_the_handshake(edge: Edge, packet: str) -> None:
    client = await edge.websocket()
    await client.send(packet)
    assert await client.messages() == []
    await until(lambda: not edge.sockets)
    assert edge.application.joins == []
    assert len(edge.log) == 1


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.gen_test
async def test_a_defect_in_the_handler_of_the_handshake_leaves_nothing(
    edge: Edge, caplog: pytest.LogCaptureFixture, waits: bool
) -> None:
    """To wait is one: another packet of the client, or its end, could come into the middle of the handshake."""

    def raising(sid: str, environ: dict[str, Any], auth: object) -> None:
        raise LookupError

    async def waiting(sid: str, environ: dict[str, Any], auth: object) -> None:
        await asyncio.sleep(0)

    edge.sio.on("connect", waiting if waits else raising)
    websocket, polling = await edge.websocket(), await edge.polling()
    await websocket.send("40{}")
    assert await websocket.messages() == []
    assert (await polling.post("40{}")).body == b"ok"
    assert await polling.poll() == ["1"]
    await until(lambda: not edge.sockets)
    assert [record.getMessage() for record in caplog.records] == ["the handler of a handshake failed"] * 2
    caplog.clear()


@pytest.mark.gen_test
async def test_a_defect_in_a_handler_of_the_end_leaves_nothing(edge: Edge) -> None:
    async def defective_disconnect(sid: str, reason: str) -> None:
        await edge.application.disconnect(sid, reason)
        raise LookupError("seen by the caller")

    edge.sio.on("disconnect", defective_disconnect)
    await edge.connected()
    with pytest.raises(LookupError, match="seen by the caller"):
        await edge.sio.eio.disconnect()
    assert not edge.sockets


# Events


@pytest.mark.parametrize(
    ("packet", "ack"),
    [
        (JOIN_WITH_ACK, ACK),
        ("420" + JOIN[2:], ACK.replace("7", "0", 1)),
        ("42" + "9" * 100 + JOIN[2:], ACK.replace("7", "9" * 100, 1)),
        ("42/,7" + JOIN[2:], ACK),
    ],
)
@pytest.mark.gen_test
async def test_an_event_is_acknowledged_by_its_id(edge: Edge, packet: str, ack: str) -> None:
    client = await edge.connected()
    await client.send(packet)
    assert await client.receive() == ack
    assert edge.application.joins == [()]


def event_of_size(size: int) -> str:
    """An event whose data are one list, in a packet of that many characters."""
    return '42["join_lesson",[' + " " * (size + 1 - len('42["join_lesson",[]]')) + "]]"


@pytest.mark.parametrize(
    ("packet", "data"),
    [
        ('42["join_lesson",null]', (None,)),
        ('42["join_lesson",1,{"a":[2]}]', (1, {"a": [2]})),
        ('42["join_lesson"' + " " * MAX_EVENT_SIZE + "]", ()),
    ],
)
@pytest.mark.gen_test
async def test_the_data_of_an_event_reaches_its_handler(edge: Edge, packet: str, data: tuple[object, ...]) -> None:
    client = await edge.connected()
    await client.send(packet)
    await until(lambda: edge.application.joins)
    assert edge.application.joins == [data]


@pytest.mark.parametrize(("size", "is_held"), [(MAX_EVENT_SIZE, True), (MAX_EVENT_SIZE + 1, False)])
@pytest.mark.gen_test
async def test_of_larger_data_a_handler_learns_no_more_than_that_there_are_some(
    edge: Edge, size: int, is_held: bool
) -> None:
    client = await edge.connected()
    await client.send(event_of_size(size))
    await until(lambda: edge.application.joins)
    [(data,)] = edge.application.joins
    assert isinstance(data, list) == is_held
    assert isinstance(data, TooMuchData) != is_held


@pytest.mark.parametrize(
    "packet", ["43[]", "431[]", "437", '42["no_such_event"]', '427["no_such_event",{}]', '42["*"]', '42["message"]']
)
@pytest.mark.gen_test
async def test_what_nobody_asked_for_is_ignored(edge: Edge, packet: str) -> None:
    client = await edge.connected()
    await client.send(*[packet] * (MAX_WAITING_EVENTS + 1), JOIN_WITH_ACK)
    assert await client.receive() == ACK


def dropped(packet: str, *rest: str | bytes, why: str, id: str) -> Any:  # noqa: A002 (pytest's name)
    return pytest.param((packet, *rest), why, id=id)


MALFORMED = "malformed packet"
RESERVED = "reserved event"
NO_CLIENT_S = "not a client's packet"
DROPPED = [
    # forged events
    dropped('42["connect","sid",{},{}]', why=RESERVED, id="forged connect"),
    dropped('427["disconnect","sid","reason"]', why=RESERVED, id="forged disconnect"),
    dropped('42["connect_error",{}]', why=RESERVED, id="forged connect_error"),
    # events that are none
    dropped("4", why="empty packet", id="empty packet"),
    dropped("42", why=MALFORMED, id="no data"),
    dropped("42null", why=MALFORMED, id="null"),
    dropped("421", why=MALFORMED, id="only an id"),
    dropped("42{}", why=MALFORMED, id="empty object"),
    dropped('42{"0":"join_lesson"}', why=MALFORMED, id="object"),
    dropped('42"join_lesson"', why=RESERVED, id="text"),
    dropped("42[]", why=MALFORMED, id="empty list"),
    dropped("42[1]", why=RESERVED, id="numeric name"),
    dropped("42[null]", why=RESERVED, id="null name"),
    dropped('42[{"a":1}]', why=RESERVED, id="object for a name"),
    # JSON that is none
    dropped('42["join_lesson"', why=MALFORMED, id="cut short"),
    dropped("42" + "[" * (MAX_MESSAGE_SIZE - 2), why=MALFORMED, id="deep nesting"),
    dropped('42["join_lesson",' + "[" * 1500 + "]" * 1500 + "]", why=MALFORMED, id="deep nesting, complete"),
    dropped('42["join_lesson",NaN]', why=MALFORMED, id="NaN"),
    dropped('42["join_lesson",Infinity]', why=MALFORMED, id="Infinity"),
    dropped('42["join_lesson","\\ud800"]', why=MALFORMED, id="lone surrogate"),
    dropped("42" + "9" * 101 + '["join_lesson"]', why=MALFORMED, id="huge id"),
    dropped('42²["join_lesson"]', why=MALFORMED, id="id that only looks like a number"),
    dropped("4" + SECRET, why=MALFORMED, id="text for a type"),
    dropped("4²[]", why=MALFORMED, id="type that only looks like a number"),
    # packets that only servers send, or nobody
    dropped('44{"message":"no"}', why=NO_CLIENT_S, id="CONNECT_ERROR"),
    dropped("467[]", why=NO_CLIENT_S, id="BINARY_ACK without attachments"),
    dropped("47", why=NO_CLIENT_S, id="unknown type"),
    # binary events and messages
    dropped(BINARY_JOIN, b"x", why="attachments", id="binary event"),
    dropped('450-["join_lesson"]', why=NO_CLIENT_S, id="binary event without attachments"),
    dropped('45["join_lesson"]', why=NO_CLIENT_S, id="binary event without a count"),
    dropped('454590000000-["join_lesson"]', why="attachments", id="billions of attachments"),
    dropped('4599999999999-["join_lesson"]', why=MALFORMED, id="count too long"),
    dropped('421-["join_lesson"]', b"x", why="attachments", id="event with an attachment"),
    dropped("431-[]", b"x", why="attachments", id="acknowledgement with an attachment"),
    dropped("461-7[]", b"x", why="attachments", id="BINARY_ACK"),
    dropped("", b"x", why="unknown packet", id="empty frame"),
    # handshakes and namespaces
    dropped("40{}", why="connected twice", id="connected twice"),
    dropped("40/other,{}", why="connected twice", id="a second namespace"),
    dropped('42/other,["join_lesson"]', why="unknown namespace", id="event of another namespace"),
    dropped("41/other,", why="unknown namespace", id="disconnect of another namespace"),
]


@pytest.mark.parametrize(("messages", "why"), DROPPED)
@pytest.mark.gen_test
async def test_a_packet_that_no_client_may_send_ends_its_engine_socket(
    edge: Edge, messages: tuple[str | bytes, ...], why: str
) -> None:
    """Its sender is dropped, no handler runs for it but the one of the end, and the log has one line."""
    edge.application.may_answer.clear()
    client = await edge.connected()
    await client.send(*messages, JOIN)
    assert await client.messages() == []
    await until(lambda: not edge.sockets)
    assert edge.application.reasons == ["transport error"]
    assert edge.application.joins == []
    [line] = edge.log
    assert line.startswith(f"client dropped: {why}")
    assert edge.dropped == [line.removeprefix("client dropped: ")]
    edge.application.may_answer.set()
    await edge.serves_others()


@pytest.mark.parametrize("message", [b"", b"x", b"4{}"])
@pytest.mark.gen_test
async def test_a_binary_message_ends_its_engine_socket(edge: Edge, message: bytes) -> None:
    client = await edge.connected()
    await client.send(message, JOIN)
    assert await client.messages() == []
    await until(lambda: edge.application.reasons == ["transport error"])
    assert edge.application.joins == []
    assert edge.log == ["client dropped: binary message"]


# Events under way


@pytest.mark.gen_test
async def test_a_client_that_does_not_wait_for_answers_is_dropped(edge: Edge) -> None:
    edge.application.may_answer.clear()
    client = await edge.connected()
    await client.send(*[JOIN] * MAX_WAITING_EVENTS)
    await until(lambda: len(edge.application.joins) == MAX_WAITING_EVENTS)
    assert edge.log == []
    await client.send(*[JOIN] * 500)
    assert await client.messages() == []
    assert len(edge.application.joins) == MAX_WAITING_EVENTS
    assert edge.log == ["client dropped: too many events at once"]


@pytest.mark.gen_test
async def test_a_client_that_waits_may_send_as_many_events_as_it_likes(edge: Edge) -> None:
    client = await edge.connected()
    for _ in range(3 * MAX_WAITING_EVENTS):
        await client.send(JOIN_WITH_ACK)
        assert await client.receive() == ACK
    [engine_socket] = edge.sockets
    await until(lambda: engine_socket.waiting_events == 0)


@pytest.mark.parametrize("leaves", ["1", "41", "disappears"])
@pytest.mark.gen_test
async def test_an_end_is_seen_while_an_event_is_under_way(edge: Edge, leaves: str) -> None:
    edge.application.may_answer.clear()
    client = await edge.connected()
    await client.send(JOIN_WITH_ACK)
    await until(lambda: edge.application.joins)
    if leaves == "disappears":
        client.disappear()
    else:
        await client.send(leaves)
    await until(lambda: edge.application.reasons)


@pytest.mark.gen_test
async def test_a_handler_may_use_its_engine_socket_until_the_end_of_that_has_been_handled(edge: Edge) -> None:
    """A join that is under way when its client goes is no defect; the end waits for it."""
    joined = asyncio.Event()
    seen = []

    async def join_lesson(sid: str) -> dict[str, Any]:
        await until(lambda: edge.sockets[0].closed)
        await edge.sio.save_session(sid, {"seat": 30})
        await edge.sio.enter_room(sid, "lesson")
        joined.set()
        return ACCEPTED

    async def disconnect(sid: str, reason: str) -> None:
        await joined.wait()
        seen.append(await edge.sio.get_session(sid))
        await edge.application.disconnect(sid, reason)

    edge.sio.on("join_lesson", join_lesson)
    edge.sio.on("disconnect", disconnect)
    client = await edge.connected()
    await client.send(JOIN_WITH_ACK)
    client.disappear()
    await until(lambda: edge.application.reasons)
    assert seen == [{"seat": 30}]


@pytest.mark.parametrize("leaves", ["1", "41", "disappears"])
@pytest.mark.gen_test
async def test_a_server_that_stops_waits_for_the_end_of_clients_that_have_just_gone(edge: Edge, leaves: str) -> None:
    may_end = asyncio.Event()

    async def slow_disconnect(sid: str, reason: str) -> None:
        await may_end.wait()
        await edge.application.disconnect(sid, reason)

    edge.sio.on("disconnect", slow_disconnect)
    client = await edge.connected()
    if leaves == "disappears":
        client.disappear()
    else:
        await client.send(leaves)
    await until(lambda: edge.sockets[0].closed)
    stopping = asyncio.create_task(edge.sio.eio.disconnect())
    await asyncio.sleep(0.01)
    assert not stopping.done()
    may_end.set()
    await stopping
    assert len(edge.application.ended) == 1
    assert not edge.sockets


@pytest.mark.gen_test
async def test_a_connection_that_the_server_closes_ends_as_a_socketio_disconnect(edge: Edge) -> None:
    client = await edge.connected()
    (sid,) = edge.application.connected
    edge.sio.close_connection(sid)
    assert await client.receive() == "41"
    await until(lambda: edge.application.ended)
    assert edge.application.ended == [(sid, edge.sio.reason.SERVER_DISCONNECT)]
    edge.sio.close_connection(sid)  # is gone
    edge.sio.close_connection("never-seen")


@pytest.mark.gen_test
async def test_a_handler_that_answers_nothing_still_acknowledges(edge: Edge) -> None:
    async def join_lesson(sid: str) -> None:
        return None

    edge.sio.on("join_lesson", join_lesson)
    client = await edge.connected()
    await client.send(JOIN_WITH_ACK)
    assert await client.receive() == "437[]"


# What this rests on


def test_the_private_attributes_that_we_lean_on_are_as_they_were() -> None:
    sio = SocketServer(socket_places=Places(1))
    assert sio.environ == {}
    assert sio.handlers == {}
    assert sio.eio.sockets == {}
    assert set(sio.eio.handlers) == {"connect", "message", "disconnect"}
    assert sio.eio.transports == ["polling", "websocket"]
    assert Packet(encoded_packet="").data is None, "the empty packet is decoded now: transport.py refuses it itself"
    reasons = {"SERVER_DISCONNECT", "CLIENT_DISCONNECT", "TRANSPORT_CLOSE", "TRANSPORT_ERROR"}
    assert reasons <= set(vars(sio.reason))
