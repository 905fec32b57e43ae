"""What an event may be refused by: the declared refusals are those of the code, and those of the event's page."""

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
from cluster import ROOT
from toy_event import RAISE_HAND

from lesson_server.errors import LessonNotFound, Refusal, ServiceBusy, StoreUnavailable, UnexpectedData
from lesson_server.events.connection import Region
from lesson_server.events.event import Event
from lesson_server.events.registry import EVENTS
from lesson_server.events.services import Services
from lesson_server.events.take_seat import NoSuchSeat

PACKAGE = ROOT / "lesson_server"
REGIONS = [cls for event in (*EVENTS, RAISE_HAND) for cls in event.regions.values()]
# Where a service raises; what the others call is not under our control, or raises nothing that a client gets.
SERVICES = {"lessons": "stores/rds", "seats": "stores/redis", "presence": "stores/redis", "tokens": "tokens.py"}

every_region = pytest.mark.parametrize("cls", REGIONS, ids=lambda cls: cls.__name__)


def raised(tree, names):
    """The refusals that a piece of code raises, or makes."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Call)]
    called = [node.exc if isinstance(node, ast.Raise) else node.func for node in nodes]
    found = [names.get(name.id) for name in called if isinstance(name, ast.Name)]
    return {value for value in found if inspect.isclass(value) and issubclass(value, Refusal)}


def raised_in(path):
    """The refusals that a module, or any module of a folder, raises."""
    found = set()
    for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        found |= raised(ast.parse(module.read_text("utf-8")), vars(importlib.import_module(name)))
    return found


def reached(cls):
    """The functions that an event runs: its parse, its steps, and the methods that these call."""
    names = {"parse", "result"}
    for row in cls.CHART.TRANSITIONS:
        names |= {*row.get("before", ()), *row.get("conditions", ())}
    functions = {}
    while left := names - functions.keys():
        for name in left:
            function = inspect.unwrap(getattr(cls, name))
            functions[name] = function
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            attributes = {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            }
            names |= {name for name in attributes if inspect.isfunction(getattr(cls, name, None))}
    return functions.values()


def services_of(tree):
    """The names of the services that a piece of code uses."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes & {service.name for service in fields(Services)}


def of_one_event(refusals):
    """Without those that any event may get; see Event.refusals."""
    return {refusal for refusal in refusals if not issubclass(refusal, StoreUnavailable)}


def possible(cls):
    """The refusals that an event of a client may get, as its code says."""
    found = set()
    for function in reached(cls):
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
        found |= raised(tree, function.__globals__)
        for service in services_of(tree) & SERVICES.keys():
            found |= raised_in(PACKAGE / SERVICES[service])
        # The base class raises the refusal of bad data at once, take_seat and leave_seat in a step.
        if getattr(function, "__func__", None) is vars(Region)["parse"].__func__ or "raise self.request" in source:
            found.add(cls.BAD_DATA)
    return of_one_event(found)


def test_the_services_are_those_that_there_are():
    others = {"sockets", "analytics", "metrics", "trust_teacher_user_id"}
    assert {service.name for service in fields(Services)} == SERVICES.keys() | others


@every_region
def test_the_declared_refusals_are_those_that_the_code_raises(cls):
    assert set(cls.REFUSALS) == possible(cls)
    assert len(set(cls.REFUSALS)) == len(cls.REFUSALS)


def test_a_refusal_that_is_not_declared_is_found():
    teacher, participant = EVENTS[0].regions["teacher"], EVENTS[1].regions["participant"]
    assert LessonNotFound in possible(teacher)  # of a service
    assert UnexpectedData in possible(teacher)  # of parse
    assert {NoSuchSeat, participant.BAD_DATA} <= possible(participant)  # of steps


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("events/*.py")), ids=lambda path: path.stem)
def test_every_refusal_that_a_module_raises_is_declared_by_a_region(path):
    """Also one that is raised where the walk through the methods does not come."""
    declared = {refusal for event in EVENTS for cls in event.regions.values() for refusal in cls.REFUSALS}
    assert of_one_event(raised_in(path)) <= declared


# The gateway


def test_only_an_event_with_a_rate_may_find_the_service_busy():
    for event in EVENTS:
        assert (ServiceBusy in event.refusals("participant")) == (event.name == "join_lesson")


def test_a_client_without_a_chart_gets_one_refusal():
    assert [refusal.__name__ for refusal in RAISE_HAND.refusals("teacher")] == ["EventNotAllowed"]


def test_the_refusals_of_a_handshake_are_those_that_its_module_raises():
    from lesson_server.gateway import handshake

    assert set(handshake.REFUSALS) == raised_in(Path(handshake.__file__))


# The pages


def documented(event: Event) -> dict[str, str]:
    """The messages in the page of an event, and what it says of a retry; the name of a field is left out."""
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([^|]+) \|$", page_of(event), re.MULTILINE)
    return {re.sub(r"{\w+}", "{}", message): retry for message, retry in rows}


def page_of(event: Event) -> str:
    table = re.search(
        r"\| When \| Message \| Try again\? \|\n(?:\|.*\n)+", (PAGES / f"{event.name}.md").read_text("utf-8")
    )
    assert table is not None
    return table[0]


PAGES = ROOT / "docs/events"

every_event = pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)


@every_event
def test_the_page_of_an_event_has_each_of_its_messages_in_the_order_in_which_they_are_tried(event):
    messages = [
        re.sub(r"{\w+}", "{}", refusal.message.replace("{event}", event.name))
        for client in event.regions
        for refusal in event.refusals(client)
    ]
    assert set(documented(event)) == set(messages)


@every_event
def test_the_page_says_of_a_message_whether_a_retry_may_help(event):
    for client in event.regions:
        for refusal in event.refusals(client):
            message = re.sub(r"{\w+}", "{}", refusal.message.replace("{event}", event.name))
            assert not (refusal.retryable and documented(event)[message].startswith("no")), refusal
