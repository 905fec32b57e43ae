"""local_rooms.py: who is in which room of this process."""

from itertools import count

import pytest
import socketio

from lesson_server.protocol.local_rooms import LocalRooms


@pytest.fixture
def rooms():
    """The manager of a server whose connections are ``s1`` on the transport ``e1``, and so on."""
    numbers = count(1)
    server = socketio.AsyncServer(client_manager=LocalRooms(), async_mode="tornado")
    server.eio.generate_id = lambda: f"s{next(numbers)}"
    return server.manager


async def connect(rooms, *eio_sids):
    for eio_sid in eio_sids:
        await rooms.connect(await rooms.pre_connect(eio_sid, "/"), "/")


def participants(rooms, room):
    """Each only once: what is emitted reaches nobody twice."""
    found = list(rooms.get_participants("/", room))
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.gen_test
async def test_a_connection_is_connected_then_ending_then_unknown(rooms):
    assert not rooms.is_connected("s1", "/")
    await connect(rooms, "e1")
    assert rooms.is_connected("s1", "/")
    assert rooms.pre_disconnect("s1", "/") == "e1"
    assert not rooms.is_connected("s1", "/")
    rooms.basic_disconnect("s1", "/")
    assert not rooms.is_connected("s1", "/")
    assert rooms.pre_disconnect("s1", "/") is None


@pytest.mark.gen_test
async def test_a_transport_has_one_connection(rooms):
    assert await rooms.pre_connect("e1", "/") == "s1"
    assert await rooms.pre_connect("e1", "/") is None
    rooms.basic_disconnect("s1", "/")
    assert await rooms.pre_connect("e1", "/") == "s2"


@pytest.mark.gen_test
async def test_a_connection_and_its_transport_find_each_other(rooms):
    await connect(rooms, "e1", "e2")
    assert [rooms.eio_sid_from_sid(sid, "/") for sid in ("s1", "s2", "s3")] == ["e1", "e2", None]
    assert [rooms.sid_from_eio_sid(eio_sid, "/") for eio_sid in ("e1", "e2", "e3")] == ["s1", "s2", None]


@pytest.mark.gen_test
async def test_a_room_holds_those_who_have_entered_and_not_left_it(rooms):
    await connect(rooms, "e1", "e2", "e3")
    for sid in ("s1", "s2"):
        rooms.basic_enter_room(sid, "/", "42")
    assert participants(rooms, "42") == {("s1", "e1"), ("s2", "e2")}
    rooms.basic_leave_room("s1", "/", "42")
    assert participants(rooms, "42") == {("s2", "e2")}
    assert participants(rooms, "7") == set()


@pytest.mark.gen_test
async def test_everybody_is_in_the_room_none_and_each_in_a_room_of_its_own(rooms):
    await connect(rooms, "e1", "e2")
    assert participants(rooms, None) == {("s1", "e1"), ("s2", "e2")}
    assert participants(rooms, "s1") == {("s1", "e1")}


@pytest.mark.gen_test
@pytest.mark.parametrize("kind", [list, tuple])
async def test_who_is_in_several_of_the_rooms_is_there_once(rooms, kind):
    await connect(rooms, "e1", "e2", "e3")
    for sid, room in (("s1", "42"), ("s1", "7"), ("s2", "7")):
        rooms.basic_enter_room(sid, "/", room)
    assert participants(rooms, kind(("42", "7", "s1"))) == {("s1", "e1"), ("s2", "e2")}
    assert participants(rooms, kind(("42", "s3"))) == {("s1", "e1"), ("s3", "e3")}


@pytest.mark.gen_test
async def test_the_rooms_of_a_connection_are_those_that_it_entered(rooms):
    await connect(rooms, "e1")
    assert rooms.get_rooms("s1", "/") == []
    for room in ("7", "42"):
        rooms.basic_enter_room("s1", "/", room)
    assert rooms.get_rooms("s1", "/") == ["42", "7"]
    assert rooms.get_rooms("unknown", "/") == []


@pytest.mark.gen_test
async def test_a_connection_that_is_gone_or_a_room_named_like_one_is_not_entered(rooms):
    await connect(rooms, "e1", "e2")
    with pytest.raises(ValueError, match="sid is not connected"):
        rooms.basic_enter_room("s3", "/", "42")
    with pytest.raises(ValueError, match="cannot enter a sid room"):
        rooms.basic_enter_room("s1", "/", "s2")
    assert participants(rooms, "42") == set()
    assert participants(rooms, "s2") == {("s2", "e2")}


@pytest.mark.gen_test
async def test_a_room_that_is_not_known_is_left_without_harm(rooms):
    await connect(rooms, "e1", "e2")
    rooms.basic_enter_room("s1", "/", "42")
    rooms.basic_leave_room("s1", "/", "7")
    rooms.basic_leave_room("s2", "/", "42")
    rooms.basic_close_room("7", "/")
    assert participants(rooms, "42") == {("s1", "e1")}


@pytest.mark.gen_test
async def test_a_closed_room_is_left_by_all_and_they_keep_their_others(rooms):
    await connect(rooms, "e1", "e2")
    for sid, room in (("s1", "42"), ("s2", "42"), ("s1", "7")):
        rooms.basic_enter_room(sid, "/", room)
    rooms.basic_close_room("42", "/")
    assert participants(rooms, "42") == set()
    assert [rooms.get_rooms(sid, "/") for sid in ("s1", "s2")] == [["7"], []]


@pytest.mark.gen_test
@pytest.mark.parametrize("state", ["connected", "ending"])
async def test_nothing_is_kept_of_a_connection_that_has_ended(rooms, state):
    sid = await rooms.connect(await rooms.pre_connect("e1", "/"), "/")
    for room in ("42", "7"):
        rooms.basic_enter_room(sid, "/", room)
    rooms._generate_ack_id(sid, lambda: None)  # an emit that waits for its answer
    if state == "ending":
        rooms.pre_disconnect(sid, "/")
    rooms.basic_disconnect(sid, "/")
    rooms.basic_disconnect(sid, "/")  # once more does no harm
    kept = {name: value for name, value in vars(rooms).items() if isinstance(value, dict | set)}
    assert {name for name, value in kept.items() if value} == {"rooms"}
    assert rooms.rooms == {"/": {}}
    assert participants(rooms, None) == participants(rooms, ["42", "7"]) == set()


def test_there_is_one_namespace(rooms):
    assert tuple(rooms.get_namespaces()) == ("/",)
