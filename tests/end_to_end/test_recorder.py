"""recorder.py: a message that the AsyncAPI document does not describe fails the test in which it is sent."""

import json
import signal

import pytest
from clients import SUCCESS, client, error, join, refusal
from cluster import NodeProcess
from commands import running
from node import EXIT_DRIFT
from recorder import Recorder, description_of, no_drift

from lesson_server.errors import LessonIdRequired, Refusal
from lesson_server.events.join_lesson import TeacherJoin
from lesson_server.events.registry import EVENTS
from lesson_server.events.take_seat import LessonIsFull, ParticipantTakeSeat
from lesson_server.server import LessonServer
from lesson_server.settings.sources import load

GUEST = {"client": "participant", "lesson_id": "1"}
ANNA = {**GUEST, "access_token": "x"}
TEACHER = {"client": "teacher", "lesson_id": "1", "access_token": "x"}
FULL = {"status": "ERROR", "message": "the lesson is full"}


@pytest.fixture
def planted(drifts):
    """The drifts that the test has planted; it takes them, so that the test does not fail."""

    def take():
        taken = list(drifts)
        drifts.clear()
        return taken

    return take


# Drifts of a real server, seen by real clients


@pytest.mark.gen_test
async def test_an_undocumented_field_in_an_acknowledgement_is_a_drift(server, mint, monkeypatch, planted):
    monkeypatch.setattr(ParticipantTakeSeat, "result", lambda region: {"seat": region.connection.seat, "row": 1})
    async with client(server, **ANNA | {"access_token": mint()}) as sio:
        assert await join(sio) == SUCCESS
        assert planted() == []
        assert (await sio.call("take_seat"))["data"] == {"seat": 1, "row": 1}
    (drift,) = planted()
    assert drift.startswith("take_seat of a participant was answered by [{'status': 'SUCCESS'")


@pytest.mark.gen_test
async def test_an_undocumented_refusal_is_a_drift(server, mint, monkeypatch, planted):
    """Documented for another event, and for another client of the same event."""

    def refuse(region):
        raise LessonIsFull

    monkeypatch.setattr(TeacherJoin, "check_access_token", refuse)
    async with client(server, **TEACHER) as sio:
        assert await join(sio) == FULL
    assert planted() == [f"join_lesson of a teacher was answered by [{FULL}], which is not described"]


class Undocumented(Refusal):
    message = "the lesson service is closed"
    outcome = "closed"


@pytest.mark.gen_test
async def test_an_undocumented_refusal_of_a_handshake_is_a_drift(server, monkeypatch, planted):
    monkeypatch.setattr(LessonIdRequired, "message", Undocumented.message)
    assert await refusal(server, {"client": "teacher"}) == Undocumented.message
    (drift,) = planted()
    assert drift.startswith("the handshake was refused by {'message': 'the lesson service is closed'}")


@pytest.mark.parametrize("data", [{"seat": "1", "client_id": None}, {"seat": 1}, {"seat": 0, "client_id": "anna"}])
@pytest.mark.gen_test
async def test_a_wrong_type_in_seat_changed_is_a_drift(server, mint, planted, data):
    sio = server._protocol.sio
    async with client(server, **ANNA | {"access_token": mint()}) as anna:
        assert await join(anna) == SUCCESS
        await sio.emit("seat_changed", {"seat": 1, "client_id": None}, room="1")
        assert planted() == []
        await sio.emit("seat_changed", data, room="1")
    (drift,) = planted()
    assert drift.startswith('the server sent 2["seat_changed",{"seat":')


@pytest.mark.gen_test
async def test_a_success_for_data_that_are_not_documented_is_a_drift(server, mint, monkeypatch, planted):
    monkeypatch.setattr(ParticipantTakeSeat, "parse", lambda data: None)
    async with client(server, **ANNA | {"access_token": mint()}) as sio:
        assert await join(sio) == SUCCESS
        assert (await sio.call("take_seat", "a window seat"))["data"] == {"seat": 1}
    (drift,) = planted()
    assert drift == "take_seat of a participant with ['a window seat'] succeeded, and these data are not described"


@pytest.mark.gen_test
async def test_what_real_clients_do_wrong_is_no_drift_if_the_answer_is_documented(server, mint, drifts):
    async with client(server, **ANNA | {"access_token": mint()}) as sio:
        assert await join(sio, {"lesson": 2}) == error("join_lesson takes no data")
        assert await join(sio) == SUCCESS
        assert await sio.call("take_seat", "a window seat") == error("take_seat takes a seat number or nothing")
        await sio.emit("raise_hand")
    assert await refusal(server, None) == 'client must be "teacher" or "participant"'
    assert drifts == []


@pytest.mark.gen_test
async def test_a_drift_fails_the_test_in_which_it_happens(environ, drifts):
    """The fixture ``drifts`` of every test is a ``no_drift``."""

    async def story():
        with no_drift():
            server = LessonServer(load(environ=environ))
            await server.start()
            async with client(server, **ANNA):
                await server._protocol.sio.emit("chat", {})
            await server.stop()

    with pytest.raises(AssertionError, match="chat"):
        await story()
    assert drifts == ['the server sent 2["chat",{}], which is not described']
    drifts.clear()


def test_a_drift_of_a_server_in_another_process_is_on_its_stderr_and_in_its_exit_status(environ, io_loop):
    """So are the servers of test_scripts.py and of the faults; here the pattern of a lesson_id is a wrong one."""
    node = NodeProcess(environ, {"http.asyncapi.WORD": "[0-9]+"})

    async def story():
        async with (
            client(node, **GUEST | {"lesson_id": "17"}) as seventeen,
            client(node, **GUEST | {"lesson_id": "x"}) as x,
        ):
            assert await join(seventeen) == error("lesson 17 not found")
            assert await join(x) == error("lesson x not found")

    io_loop.run_sync(story)
    node.send(signal.SIGTERM)
    assert node.wait() == EXIT_DRIFT
    (drift,) = node.close()
    assert "lesson x not found" in drift


def test_a_drift_of_a_worker_fails_the_test(environ, io_loop):
    """The servers of ``running`` are recorded, and so are their workers."""

    async def story(server):
        async with client(server, **GUEST | {"lesson_id": "x"}) as x:
            assert await join(x) == error("lesson x not found")

    def run():
        with running("--workers", "2", constants=[("http.asyncapi.WORD", "[0-9]+")], **environ) as server:
            io_loop.run_sync(lambda: story(server))

    with pytest.raises(AssertionError, match="lesson x not found"):
        run()


# Each drift, by its packets


def drifts_of(*packets, auth=ANNA):
    """What is reported of a conversation: ``<`` marks what the client sends."""
    reported = []
    recorder = Recorder(description_of(EVENTS), reported.append)
    for packet in (f"<0{json.dumps(auth)}", *packets):
        if packet[:1] == "<":
            recorder.from_client("eio", packet[1:])
        else:
            recorder.to_client("eio", packet)
    return reported


CONNECTED = '0{"sid":"x"}'
ACK = '{"status":"SUCCESS","data":{}}'


@pytest.mark.parametrize(
    "packets",
    [
        (CONNECTED, '<27["join_lesson"]', f"37[{ACK}]"),
        (CONNECTED, '<27["join_lesson",null]', f"37[{ACK}]"),
        (CONNECTED, '<20["take_seat",{"seat":3}]', '30[{"status":"SUCCESS","data":{"seat":3}}]'),
        (CONNECTED, '<20["take_seat",{"seat":3}]', '30[{"status":"ERROR","message":"seat 3 is taken"}]'),
        (CONNECTED, '<20["take_seat",3]', '30[{"status":"ERROR","message":"join the lesson first"}]'),
        (CONNECTED, '<21["join_lesson"]', '<21["leave_seat"]', f"31[{ACK}]", f"31[{ACK}]"),
        (CONNECTED, '2["seat_changed",{"seat":3,"client_id":"anna"}]', '2["news","of a test"]'),
        (CONNECTED, "<2", "<2[", '<2["join_lesson"]', '<27["no event"]', "1"),
        ('4{"message":"the lesson service is busy, try again"}',),
        ("<0/chat,{}", '4/chat,{"message":"no such namespace"}'),
    ],
)
def test_a_conversation_that_is_described_has_no_drift(packets):
    assert drifts_of(*packets) == []


@pytest.mark.parametrize(
    "packets",
    [
        ("0{}",),
        ('0{"sid":"x","pid":"y"}',),
        ('4{"message":"join the lesson first"}',),
        ('4{"message":"lesson_id is required"}',),  # there is one
        ('4{"message":"the lesson service is busy, try again","code":1}',),
        (CONNECTED, f"37[{ACK}]"),
        (CONNECTED, '<27["join_lesson"]', f"37[{ACK}]", f"37[{ACK}]"),
        (CONNECTED, '<27["join_lesson"]', f"38[{ACK}]"),
        (CONNECTED, '<27["join_lesson"]', "37[]"),
        (CONNECTED, '<27["join_lesson"]', f"37[{ACK},{ACK}]"),
        (CONNECTED, '<27["join_lesson"]', "37[null]"),
        (CONNECTED, '<27["join_lesson"]', '37[{"status":"SUCCESS"}]'),
        (CONNECTED, '<27["join_lesson"]', '37[{"status":"SUCCESS","data":{"seat":1}}]'),
        (CONNECTED, '<27["join_lesson",{}]', f"37[{ACK}]"),
        (CONNECTED, '<27["join_lesson",null,null]', f"37[{ACK}]"),
        (CONNECTED, '<27["join_lesson"]', '37[{"status":"ERROR","message":"access token is required"}]'),
        (CONNECTED, '<27["take_seat"]', '37[{"status":"SUCCESS","data":{"seat":0}}]'),
        (CONNECTED, '<27["take_seat"]', '37[{"status":"SUCCESS","data":{"seat":1.5}}]'),
        (CONNECTED, '<27["take_seat"]', '37[{"status":"ERROR","message":"seat None is taken"}]'),
        (CONNECTED, '<27["take_seat"]', '37[{"status":"ERROR","message":"only a participant takes a seat"}]'),
        (CONNECTED, '<27["raise_hand"]', f"37[{ACK}]"),
        (CONNECTED, '2["seat_changed",{"seat":"3","client_id":"anna"}]'),
        (CONNECTED, '2["seat_changed",{"seat":3}]'),
        (CONNECTED, '2["seat_changed",{"seat":3,"client_id":"anna","row":1}]'),
        (CONNECTED, '2["seat_changed",{"seat":3,"client_id":"anna"},1]'),
        (CONNECTED, '2["seat_taken",{"seat":3,"client_id":"anna"}]'),
        (CONNECTED, "1[]"),
        (CONNECTED, '51-["seat_changed",{"_placeholder":true,"num":0}]'),
        (CONNECTED, "7"),
        (CONNECTED, b"\x04"),
    ],
)
def test_each_drift_is_reported(packets):
    assert len(drifts_of(*packets)) == 1


def test_a_teacher_has_the_answers_of_a_teacher():
    story = (CONNECTED, '<27["take_seat"]', '37[{"status":"ERROR","message":"only a participant takes a seat"}]')
    assert drifts_of(*story, auth=TEACHER) == []
    story = (CONNECTED, '<27["take_seat"]', '37[{"status":"SUCCESS","data":{"seat":1}}]')
    assert len(drifts_of(*story, auth=TEACHER)) == 1


def test_a_success_after_a_handshake_that_is_not_described_is_a_drift():
    story = (CONNECTED, '<27["join_lesson"]', f"37[{ACK}]")
    assert len(drifts_of(*story, auth={**ANNA, "access_token": 17})) == 1
    story = (CONNECTED, '<27["join_lesson"]', '37[{"status":"ERROR","message":"access token is invalid"}]')
    assert drifts_of(*story, auth={**ANNA, "access_token": 17}) == []
