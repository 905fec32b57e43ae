"""asyncapi.py: the document is valid, complete, and says of data and handshakes what the server does with them."""

import json
import re
from pathlib import Path

import jsonschema_rs
import pytest
from clients import TRANSPORTS, client
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from recorder import Description, description_of
from roster_api import TOKEN
from tornado.httpclient import AsyncHTTPClient
from toy_event import RAISE_HAND
from typing_extensions import TypedDict

from lesson_server import errors
from lesson_server.errors import HandshakeRefused, Refusal
from lesson_server.events.event import ServerEvent
from lesson_server.events.registry import EVENTS, SERVER_EVENTS
from lesson_server.gateway.handshake import parse_handshake
from lesson_server.http.asyncapi import _refusal, document

SPECS = Path(__file__).parents[1] / "js/node_modules/@asyncapi/specs/schemas"
DOCUMENT = json.loads(json.dumps(document(EVENTS, SERVER_EVENTS)))
MESSAGES = DOCUMENT["channels"]["main"]["messages"]
WITH_TOY = json.loads(json.dumps(document((*EVENTS, RAISE_HAND), SERVER_EVENTS)))
DESCRIPTION = description_of(EVENTS)
CLIENTS = ("participant", "teacher")


async def get(server, **options):
    return await AsyncHTTPClient().fetch(f"{server.url}/asyncapi.json", raise_error=False, **options)


def refusals(message, described=DOCUMENT):
    """The refusals in a message: title → text or pattern."""
    schema = described["channels"]["main"]["messages"][message]["payload"]["properties"]["message"]
    return {refusal["title"]: refusal.get("const") or refusal["pattern"] for refusal in schema["anyOf"]}


# Served


@pytest.mark.parametrize("token", ["", TOKEN], ids=["the roster is off", "the roster is on"])
def test_anybody_may_read_it(io_loop, start_server, token):
    """Unlike the roster API it is for developers of clients, who have no admin token; and it holds no secret."""
    server = start_server(**({"LESSON_ADMIN_TOKEN": token} if token else {}))
    answer = io_loop.run_sync(lambda: get(server))
    assert (answer.code, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert json.loads(answer.body) == DOCUMENT


def test_it_describes_the_events_of_the_server(io_loop, start_server):
    server = start_server(events=(*EVENTS, RAISE_HAND))
    answer = io_loop.run_sync(lambda: get(server))
    assert json.loads(answer.body) == WITH_TOY


@TRANSPORTS
@pytest.mark.gen_test
async def test_the_server_is_where_it_says(server, transports):
    (described,) = DOCUMENT["servers"].values()
    assert set(transports) <= set(described["x-socketio"]["transports"])
    path = described["x-socketio"]["path"]
    assert path == described["pathname"]
    query = "&".join(f"{name}={value}" for name, value in QUERY.items())
    opening = await AsyncHTTPClient().fetch(f"{server.url}{path}?{query}")
    assert opening.body.startswith(b'0{"sid":')
    async with client(server, transports, client="participant", lesson_id="1") as sio:
        assert (sio.namespaces.keys(), sio.connection_namespaces) == ({"/"}, ["/"])


QUERY = {"EIO": "4", "transport": "polling"}


def test_the_query_is_described():
    schema = DOCUMENT["channels"]["main"]["bindings"]["ws"]["query"]
    jsonschema_rs.validate(schema, QUERY)
    for wrong in ({**QUERY, "EIO": "3"}, {**QUERY, "transport": "pigeon"}, {}):
        assert not jsonschema_rs.is_valid(schema, wrong)


# Valid


@pytest.mark.skipif(not SPECS.exists(), reason="@asyncapi/specs is not installed")
@pytest.mark.parametrize("described", [DOCUMENT, WITH_TOY], ids=["the registry", "with the toy"])
def test_it_is_valid(described):
    schema = json.loads((SPECS / f"{described['asyncapi']}.json").read_text("utf-8"))
    jsonschema_rs.validate(schema, described)
    assert not jsonschema_rs.is_valid(schema, {**described, "operations": {"connect": {"action": "ask"}}})


def references(part):
    """Every reference in a part of a document."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from references(inner)


@pytest.mark.parametrize("described", [DOCUMENT, WITH_TOY], ids=["the registry", "with the toy"])
def test_every_reference_leads_somewhere(described):
    """AsyncAPI's schema does not look; @asyncapi/parser does, but has a hundred dependencies."""
    found = set(references(described))
    assert found
    for reference in found:
        part = described
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]


def test_every_message_is_in_an_operation():
    used = set()
    for operation in DOCUMENT["operations"].values():
        used |= set(references(operation["messages"])) | set(references(operation.get("reply", {}).get("messages", [])))
    assert used == {f"#/channels/main/messages/{message}" for message in MESSAGES}


# Complete


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
@pytest.mark.parametrize("kind", CLIENTS)
def test_each_client_has_an_operation_for_each_event(event, kind):
    operation = DOCUMENT["operations"][f"{kind}_{event.name}"]
    assert (operation["action"], operation["tags"]) == ("receive", [{"name": kind}])
    assert MESSAGES[f"{kind}_{event.name}"]["name"] == event.name
    region = event.regions[kind]
    replies = [reference.rpartition("_")[2] for reference in references(operation["reply"]["messages"])]
    assert replies == (["error"] if region.RESULT is None else ["success", "error"])
    assert list(refusals(f"{kind}_{event.name}_error")) == [refusal.__name__ for refusal in event.refusals(kind)]


def test_only_a_client_that_is_always_refused_has_no_success():
    succeeding = {message.removesuffix("_success") for message in MESSAGES if message.endswith("_success")}
    events = {name for name, operation in DOCUMENT["operations"].items() if "tags" in operation}
    assert events - succeeding == {"teacher_take_seat", "teacher_leave_seat"}


def test_the_refusals_of_the_join_of_a_teacher():
    assert refusals("teacher_join_lesson_error") == {
        "UnexpectedData": "join_lesson takes no data",
        "LessonNotFound": r"^lesson \S+ not found$",
        "AccessTokenExpired": "access token has expired",
        "AccessTokenInvalid": "access token is invalid",
        "AccessTokenRequired": "access token is required",
        "NotATeacher": "only a teacher can join as teacher",
        "StoreUnavailable": "the lesson service is unavailable, try again",
        "ServiceBusy": "the lesson service is busy, try again",
        "InternalError": "internal error",
    }


def test_the_refusals_of_the_handshake():
    assert refusals("connect_error") == {
        "NoSuchNamespace": "no such namespace",
        "HubRefused": "the Hub does not join lessons",
        "UnknownClient": 'client must be "teacher" or "participant"',
        "LessonIdRequired": "lesson_id is required",
        "LessonIdMalformed": "lesson_id is malformed",
        "ServiceBusy": "the lesson service is busy, try again",
    }


def subclasses(cls):
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_every_refusal_of_the_server_is_described():
    """By its class, or by that of the same message: an operator sees more causes than a client."""
    messages = [message for message in WITH_TOY["channels"]["main"]["messages"] if message.endswith("_error")]
    described = set().union(*(refusals(message, WITH_TOY) for message in messages))
    for refusal in subclasses(Refusal):
        if refusal.__module__.startswith("lesson_server.") and hasattr(refusal, "message"):
            same = {cls.__name__ for cls in refusal.__mro__ if getattr(cls, "message", None) == refusal.message}
            assert described & same, refusal


def test_an_event_of_another_registry_appears_with_its_data_its_result_and_its_refusals():
    messages = WITH_TOY["channels"]["main"]["messages"]
    assert messages["participant_raise_hand"]["payload"] == {"type": "string"}
    success = messages["participant_raise_hand_success"]["payload"]["properties"]["data"]
    assert (list(success["properties"]), success["additionalProperties"]) == (["reason"], False)
    assert list(refusals("participant_raise_hand_error", WITH_TOY)) == [
        *("NoReason", "NotJoined", "StoreUnavailable", "InternalError")
    ]
    # A client that has no chart of the event is refused, whatever it sends.
    assert messages["teacher_raise_hand"]["payload"] == {}
    assert "teacher_raise_hand_success" not in messages
    assert refusals("teacher_raise_hand_error", WITH_TOY) == {"EventNotAllowed": "a teacher can't send raise_hand"}
    for name, operation in DOCUMENT["operations"].items():
        assert WITH_TOY["operations"][name] == operation


class Row(TypedDict):
    number: int
    extras: dict[str, int]


class Seating(TypedDict):
    rows: list[Row]


def test_data_of_several_types_are_described_apart_and_what_is_sent_has_no_further_fields():
    described = json.loads(json.dumps(document(EVENTS, [ServerEvent("seating", Seating), ServerEvent("row", Row)])))
    row = described["components"]["schemas"]["seating.Row"]
    assert row["additionalProperties"] is False
    assert row["properties"]["extras"]["additionalProperties"] == {"type": "integer"}
    seating = Description(described).sent["seating"]
    assert seating.accepts({"rows": [{"number": 1, "extras": {"a": 1}}]})
    assert not seating.accepts({"rows": [{"number": 1, "extras": {}, "more": 1}]})
    assert not seating.accepts({"rows": [], "more": 1})


def test_a_field_of_a_refusal_is_a_pattern_and_the_rest_of_the_message_is_literal():
    class Odd(Refusal):
        message = "a {client} (of {lesson_id}) has $1.50 + {seat}?"
        fields = {"seat": "[0-9]+"}  # noqa: RUF012

    pattern = _refusal(Odd, {"client": "teacher"})["pattern"]
    assert re.fullmatch(pattern, str(Odd(client="teacher", lesson_id="1", seat=3)))
    for wrong in ("a teacher (of 1) has $1050 + 3?", "a teacher (of 1) has $1.50 + x?", "a x (of 1) has $1.50 + 3?"):
        assert not re.fullmatch(pattern, wrong)


# What is described is what the server does. JSON Schema takes 1.0 for an integer, the server does not.

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False).filter(
    lambda number: not number.is_integer()
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.sampled_from(["seat", "row"]), values, max_size=2),
    max_leaves=4,
)


@given(JSON | st.fixed_dictionaries({"seat": st.integers(-5, 40)}))
def test_data_are_described_exactly_if_the_server_takes_them(data):
    for event in (*EVENTS, RAISE_HAND):
        for kind, region in event.regions.items():
            if region.RESULT is not None:
                described = description_of((*EVENTS, RAISE_HAND)).received[kind, event.name]
                assert described.accepts(data) == takes(region, data), (region, data)


def takes(region, *data):
    """Whether the data are parsed; a region that checks its client first keeps the refusal as the request."""
    try:
        return not isinstance(region.parse(data), Refusal)
    except Refusal:
        return False


AUTH = st.fixed_dictionaries(
    {
        "client": JSON | st.sampled_from([*CLIENTS, "hub"]),
        "lesson_id": JSON | st.sampled_from(["1", "x" * 64, "x" * 65, "a b", "1\n"]),
    },
    optional={"theme": JSON},
)
CREDENTIALS = st.fixed_dictionaries(
    {"client": st.sampled_from(CLIENTS), "lesson_id": st.integers(-5, 5)},
    optional={"access_token": st.text() | JSON, "user_id": st.text() | JSON},
)


@given(JSON | AUTH | CREDENTIALS)
def test_a_handshake_is_described_exactly_if_the_server_takes_it_and_its_credentials_can_be_right(auth):
    try:
        handshake = parse_handshake(auth, CLIENTS)
    except HandshakeRefused:
        is_right = False
    else:
        kept = (handshake.access_token, handshake.user_id)  # empty in place of what can't be right
        is_right = kept == (auth.get("access_token"), auth.get("user_id"))
    assert DESCRIPTION.received[None, "connect"].accepts(auth) == is_right


def test_results_are_of_their_types():
    """The other results are compared in every test with a server; see recorder.py."""
    for event in EVENTS:
        for region in event.regions.values():
            if region.RESULT is not None and "result" not in vars(region):
                TypeAdapter(region.RESULT).validate_python(region.result(None), strict=True)


def test_first_lines_of_refusals_are_sentences():
    for refusal in subclasses(Refusal):
        if refusal.__module__ == errors.__name__:
            assert refusal.__doc__.partition("\n")[0].endswith("."), refusal
