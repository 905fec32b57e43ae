"""handshake.py: which handshakes are accepted, and what is kept of them."""

import pytest
from fakes import World
from handshakes import PARTICIPANT, TEACHER
from hypothesis import given
from hypothesis import strategies as st
from socketio.exceptions import ConnectionRefusedError  # noqa: A004 (the library's, not the builtin)

from lesson_server.errors import HandshakeRefused
from lesson_server.gateway.handshake import parse_handshake
from lesson_server.tokens import MAX_TOKEN_LENGTH

CLIENTS = ("teacher", "participant")

UNKNOWN_CLIENT = 'client must be "teacher" or "participant"'

HUB = "the Hub does not join lessons"

REQUIRED = "lesson_id is required"

MALFORMED = "lesson_id is malformed"


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("lesson_id", "text"),
    [
        ("1", "1"),
        ("Maths_7-b", "Maths_7-b"),
        ("-", "-"),
        ("x" * 64, "x" * 64),
        (1, "1"),
        (0, "0"),
        (-1, "-1"),
        (2**64 - 1, "18446744073709551615"),
    ],
)
def test_a_lesson_id_is_a_text_or_an_integer(client, lesson_id, text):
    handshake = parse_handshake({"client": client, "lesson_id": lesson_id}, CLIENTS)
    assert (handshake.client, handshake.lesson_id) == (client, text)


@pytest.mark.parametrize(
    ("auth", "message"),
    [
        # client is missing or unknown
        (None, UNKNOWN_CLIENT),
        ("participant", UNKNOWN_CLIENT),
        (["participant", "1"], UNKNOWN_CLIENT),
        ({}, UNKNOWN_CLIENT),
        ({"lesson_id": "1"}, UNKNOWN_CLIENT),
        ({"client": None, "lesson_id": "1"}, UNKNOWN_CLIENT),
        ({"client": "", "lesson_id": "1"}, UNKNOWN_CLIENT),
        ({"client": "Teacher", "lesson_id": "1"}, UNKNOWN_CLIENT),
        ({"client": "participant ", "lesson_id": "1"}, UNKNOWN_CLIENT),
        ({"client": ["teacher"], "lesson_id": "1"}, UNKNOWN_CLIENT),
        ({"client": {"teacher": 1}, "lesson_id": "1"}, UNKNOWN_CLIENT),
        ({"client": True, "lesson_id": "1"}, UNKNOWN_CLIENT),
        # it is told of before a lesson_id that is wrong as well
        ({"client": "pupil", "lesson_id": "%"}, UNKNOWN_CLIENT),
        ({"client": "hub", "lesson_id": "1"}, HUB),
        ({"client": "hub"}, HUB),
        # lesson_id is missing
        ({"client": "teacher"}, REQUIRED),
        ({"client": "teacher", "lesson_id": None}, REQUIRED),
        # lesson_id is malformed
        ({"client": "teacher", "lesson_id": ""}, MALFORMED),
        ({"client": "teacher", "lesson_id": "x" * 65}, MALFORMED),
        ({"client": "teacher", "lesson_id": "1\n"}, MALFORMED),
        ({"client": "teacher", "lesson_id": "\n1"}, MALFORMED),
        ({"client": "teacher", "lesson_id": "1 "}, MALFORMED),
        ({"client": "teacher", "lesson_id": "1:2"}, MALFORMED),
        ({"client": "teacher", "lesson_id": "a.b"}, MALFORMED),
        ({"client": "teacher", "lesson_id": "{1}"}, MALFORMED),
        ({"client": "teacher", "lesson_id": "\u0661"}, MALFORMED),  # a digit, but an Arabic one
        ({"client": "teacher", "lesson_id": "caf\u00e9"}, MALFORMED),
        ({"client": "teacher", "lesson_id": "1\0"}, MALFORMED),
        ({"client": "teacher", "lesson_id": True}, MALFORMED),
        ({"client": "teacher", "lesson_id": False}, MALFORMED),
        ({"client": "teacher", "lesson_id": 1.0}, MALFORMED),
        ({"client": "teacher", "lesson_id": float("nan")}, MALFORMED),
        ({"client": "teacher", "lesson_id": ["1"]}, MALFORMED),
        ({"client": "teacher", "lesson_id": {}}, MALFORMED),
        ({"client": "teacher", "lesson_id": b"1"}, MALFORMED),
    ],
)
@pytest.mark.gen_test
async def test_a_wrong_handshake_is_refused_with_its_message_and_leaves_no_connection(auth, message):
    world = World()
    with pytest.raises(ConnectionRefusedError) as refused:
        await world.connect("sid", auth)
    assert refused.value.error_args == {"message": message}
    assert world.gateway.connections == {}
    reason = {"reason": "handshake_refused"}
    assert world.metrics.registry.get_sample_value("lesson_handshakes_refused_total", reason) == 1


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, None),
        ("", ""),
        ("eyJhbGciOiJIUzI1NiJ9", "eyJhbGciOiJIUzI1NiJ9"),
        ("x" * MAX_TOKEN_LENGTH, "x" * MAX_TOKEN_LENGTH),
        ("x" * (MAX_TOKEN_LENGTH + 1), ""),
        ("caf\u00e9", ""),
        (0, ""),
        (False, ""),
        ([["x"]], ""),
        ({"x": []}, ""),
    ],
)
@pytest.mark.parametrize("field", ["access_token", "user_id"])
def test_of_the_auth_two_short_texts_are_kept_and_nothing_else(field, value, kept):
    """What can be no token stands as an empty text, which is an invalid one: 16 kB of lists are 400 kB of objects."""
    auth = {"client": "teacher", "lesson_id": "1", field: value, "theme": [[]] * 100}
    handshake = parse_handshake(auth, CLIENTS)
    other = {"access_token": "user_id", "user_id": "access_token"}[field]
    assert (getattr(handshake, field), getattr(handshake, other)) == (kept, None)


# orjson reads integers beyond 64 bits as floats.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


@given(JSON | st.fixed_dictionaries({"client": JSON | st.just("teacher"), "lesson_id": JSON, "access_token": JSON}))
def test_any_json_is_a_handshake_or_is_refused(auth):
    """Any other exception of ``connect`` would leak the sid for ever."""
    try:
        handshake = parse_handshake(auth, CLIENTS)
    except HandshakeRefused:
        return
    assert handshake.lesson_id == str(auth["lesson_id"])


@pytest.mark.gen_test
async def test_nothing_but_the_handshake_is_checked_at_connect():
    """Unknown fields are nobody's business; the token and the lesson are looked at when the client joins."""
    world = World()
    auth = {"client": "teacher", "lesson_id": "no-such-lesson", "access_token": "expired", "theme": "dark"}
    connection = await world.connect("sid", auth)
    assert connection.state == "connected"
    assert world.faults.passed == []


SEAT_EVENTS = ("take_seat", "leave_seat")


def test_the_handlers_are_those_of_the_contract():
    """A client can't call anything else."""
    assert World().sockets.handlers.keys() == {*("connect", "join_lesson", "take_seat", "leave_seat", "disconnect")}


@pytest.mark.gen_test
async def test_the_connections_are_counted_by_event_client_and_state():
    world = World()
    await world.connect("a", PARTICIPANT)
    await world.connect("b", TEACHER)
    await world.join("b")
    counts = dict(world.gateway.count_states())
    assert len(counts) == 8 + 2 + 2  # of the joins, and of the other events
    assert ("join_lesson", "teacher", "disconnected") not in counts
    assert {state: count for state, count in counts.items() if count} == {
        ("join_lesson", "participant", "connected"): 1,
        ("join_lesson", "teacher", "registered"): 1,
        **{
            (event, client, "connected"): 1
            for event in ("take_seat", "leave_seat")
            for client in ("participant", "teacher")
        },
    }
    await world.disconnect("a")
    await world.disconnect("b")
    assert not any(dict(world.gateway.count_states()).values())


@pytest.mark.gen_test
async def test_guests_are_participants_who_stay_seated():
    world = World()
    await world.connect("guest", {"client": "participant", "lesson_id": "1"})
    await world.join("guest")
    for sid, auth in (("a", PARTICIPANT), ("b", TEACHER)):
        await world.connect(sid, auth)
        await world.join(sid)
    assert world.gateway.guests == 1
    await world.disconnect("guest")
    assert world.gateway.guests == 0
