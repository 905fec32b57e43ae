"""local_rooms.py: who is in which room, and that nothing is left of those who have gone."""

import pytest
from fakes import run

from lesson_server.protocol.local_rooms import LocalRooms
from lesson_server.protocol.places import Places
from lesson_server.protocol.transport import SocketServer

NAMESPACE = "/"


@pytest.fixture
def rooms():
    rooms = LocalRooms()
    rooms.set_server(SocketServer(client_manager=rooms, socket_places=Places(1)))
    return rooms


def connect(rooms, *eio_sids):
    """The sids of clients that have connected."""

    async def story():
        sids = [await rooms.pre_connect(eio_sid, NAMESPACE) for eio_sid in eio_sids]
        for sid in sids:
            await rooms.connect(sid, NAMESPACE)
        return sids

    return run(story())


def participants(rooms, room):
    return dict(rooms.get_participants(NAMESPACE, room))


def tables(rooms):
    """Everything that the manager holds."""
    return (
        rooms._sids,
        rooms._eio_sids,
        rooms._members,
        rooms._rooms_of,
        rooms._ending,
        rooms.callbacks,
    )


# Connections


def test_a_client_is_connected_from_its_handshake_on(rooms):
    (sid,) = connect(rooms, "eio-1")
    assert rooms.is_connected(sid, NAMESPACE)
    assert not rooms.is_pre_connected(sid, NAMESPACE)


def test_a_transport_has_one_connection(rooms):
    connect(rooms, "eio-1")
    assert run(rooms.pre_connect("eio-1", NAMESPACE)) is None


def test_both_ids_lead_to_each_other(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    for sid, eio_sid in ((one, "eio-1"), (two, "eio-2")):
        assert rooms.sid_from_eio_sid(eio_sid, NAMESPACE) == sid
        assert rooms.eio_sid_from_sid(sid, NAMESPACE) == eio_sid
    assert rooms.sid_from_eio_sid("eio-3", NAMESPACE) is None
    assert rooms.eio_sid_from_sid("sid-3", NAMESPACE) is None


def test_a_client_that_is_ending_is_not_connected_and_still_in_its_rooms(rooms):
    """The handler of its end may look at them, and leave them."""
    (sid,) = connect(rooms, "eio-1")
    rooms.basic_enter_room(sid, NAMESPACE, "lesson")
    assert rooms.pre_disconnect(sid, NAMESPACE) == "eio-1"
    assert not rooms.is_connected(sid, NAMESPACE)
    assert rooms.get_rooms(sid, NAMESPACE) == ["lesson"]


@pytest.mark.parametrize("begun", [False, True], ids=["at once", "after pre_disconnect"])
def test_nothing_is_left_of_a_client_that_has_gone(rooms, begun):
    (sid,) = connect(rooms, "eio-1")
    for room in ("lesson", "other"):
        rooms.basic_enter_room(sid, NAMESPACE, room)
    rooms._generate_ack_id(sid, print)
    if begun:
        rooms.pre_disconnect(sid, NAMESPACE)
    rooms.basic_disconnect(sid, NAMESPACE)
    assert [table for table in tables(rooms) if table] == []
    rooms.basic_disconnect(sid, NAMESPACE)


def test_nothing_is_left_of_a_client_that_is_refused(rooms):
    sid = run(rooms.pre_connect("eio-1", NAMESPACE))
    rooms.basic_disconnect(sid, NAMESPACE)
    assert [table for table in tables(rooms) if table] == []


def test_others_stay_when_one_goes(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    for sid in (one, two):
        rooms.basic_enter_room(sid, NAMESPACE, "lesson")
    rooms.basic_disconnect(one, NAMESPACE)
    assert participants(rooms, "lesson") == {two: "eio-2"}
    assert participants(rooms, None) == {two: "eio-2"}


# Rooms


def test_a_room_has_those_who_entered_it(rooms):
    one, two, _three = connect(rooms, "eio-1", "eio-2", "eio-3")
    rooms.basic_enter_room(one, NAMESPACE, "lesson")
    rooms.basic_enter_room(one, NAMESPACE, "lesson")
    rooms.basic_enter_room(two, NAMESPACE, "lesson")
    rooms.basic_enter_room(two, NAMESPACE, "other")
    assert participants(rooms, "lesson") == {one: "eio-1", two: "eio-2"}
    assert participants(rooms, "nobody's") == {}


def test_a_sid_is_the_room_of_one_client(rooms):
    one, _two = connect(rooms, "eio-1", "eio-2")
    assert participants(rooms, one) == {one: "eio-1"}


def test_everybody_is_in_the_room_without_a_name(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    assert participants(rooms, None) == {one: "eio-1", two: "eio-2"}


@pytest.mark.parametrize("kind", [list, tuple])
def test_of_several_rooms_each_client_is_yielded_once(rooms, kind):
    one, two, three = connect(rooms, "eio-1", "eio-2", "eio-3")
    for sid, room in ((one, "lesson"), (one, "other"), (two, "other")):
        rooms.basic_enter_room(sid, NAMESPACE, room)
    told = list(rooms.get_participants(NAMESPACE, kind(["lesson", "other", three])))
    assert sorted(told) == sorted([(one, "eio-1"), (two, "eio-2"), (three, "eio-3")])


def test_a_client_may_leave_while_a_room_is_iterated(rooms):
    """As when a client is found to be gone by what is sent to it."""
    one, two = connect(rooms, "eio-1", "eio-2")
    for sid in (one, two):
        rooms.basic_enter_room(sid, NAMESPACE, "lesson")
    for sid, _ in rooms.get_participants(NAMESPACE, "lesson"):
        rooms.basic_leave_room(sid, NAMESPACE, "lesson")
    assert participants(rooms, "lesson") == {}


def test_a_client_has_the_rooms_that_it_entered(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    for room in ("b", "a"):
        rooms.basic_enter_room(one, NAMESPACE, room)
    assert rooms.get_rooms(one, NAMESPACE) == ["a", "b"]
    assert rooms.get_rooms(two, NAMESPACE) == []
    assert rooms.get_rooms("nobody", NAMESPACE) == []


def test_a_room_that_nobody_is_in_is_gone(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    for sid in (one, two):
        rooms.basic_enter_room(sid, NAMESPACE, "lesson")
    rooms.basic_leave_room(one, NAMESPACE, "lesson")
    rooms.basic_leave_room(one, NAMESPACE, "lesson")
    rooms.basic_leave_room("nobody", NAMESPACE, "nobody's")
    assert participants(rooms, "lesson") == {two: "eio-2"}
    rooms.basic_leave_room(two, NAMESPACE, "lesson")
    assert (rooms._members, rooms._rooms_of) == ({}, {})


def test_a_room_that_is_closed_is_left_by_all(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    for sid in (one, two):
        rooms.basic_enter_room(sid, NAMESPACE, "lesson")
    rooms.basic_enter_room(one, NAMESPACE, "other")
    rooms.basic_close_room("lesson", NAMESPACE)
    assert participants(rooms, "lesson") == {}
    assert (rooms.get_rooms(one, NAMESPACE), rooms.get_rooms(two, NAMESPACE)) == (["other"], [])
    rooms.basic_close_room("nobody's", NAMESPACE)


def test_a_room_that_was_not_entered_is_left_without_harm(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    rooms.basic_enter_room(one, NAMESPACE, "lesson")
    rooms.basic_leave_room(one, NAMESPACE, "nobody's")
    rooms.basic_leave_room(two, NAMESPACE, "lesson")
    assert participants(rooms, "lesson") == {one: "eio-1"}


def test_who_is_not_connected_enters_no_room(rooms):
    with pytest.raises(ValueError, match="sid is not connected"):
        rooms.basic_enter_room("nobody", NAMESPACE, "lesson")
    assert [table for table in tables(rooms) if table] == []


def test_nobody_enters_the_room_of_one_client(rooms):
    one, two = connect(rooms, "eio-1", "eio-2")
    with pytest.raises(ValueError, match="cannot enter a sid room"):
        rooms.basic_enter_room(one, NAMESPACE, two)


def test_there_is_one_namespace(rooms):
    """The library asks for it in two ways."""
    assert list(rooms.get_namespaces()) == [NAMESPACE]
    assert list(rooms.rooms) == [NAMESPACE]
