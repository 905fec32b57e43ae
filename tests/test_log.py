"""log.py: each line has a stable event and fields, and docs/operating/logs.md describes every event."""

import ast
import logging
import re
from collections import defaultdict
from pathlib import Path
from string import Formatter

import pytest

from lesson_server.events.connection import REGION
from lesson_server.log import EventLogger

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/operating/logs.md").read_text("utf-8")
METHODS = {"info": "info", "warning": "warning", "error": "error", "exception": "error"}
# What every line of the log has; see JsonFormatter.
RESERVED = {"time", "level", "logger", "pid", "event", "message", "traceback", "left_out"}
REGION_FIELDS = {"socketio_event", "client", "sid", "lesson_id", "state"}


def statements():
    """Every statement that logs: its event, its level and its fields."""
    for path in sorted((ROOT / "lesson_server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("logger"), method), [ast.Constant(event), *_], keywords):
                    fields = {keyword.arg for keyword in keywords if keyword.arg is not None}
                    if len(fields) < len(keywords):
                        fields |= REGION_FIELDS
                    yield event, METHODS[method], fields
                case ast.Call(ast.Attribute(ast.Name("logger"), method)):
                    raise AssertionError(f"{path.name}, line {node.lineno}: an event has a literal name")


STATEMENTS = list(statements())


def described():
    """The rows of the table of the page: event → level and fields."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \|(.*?)\| .+ \|$", PAGE, re.MULTILINE)
    return {event: (level, set(re.findall(r"`(\w+)`", fields))) for event, level, fields in rows}


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO)
    return EventLogger("lesson_server.test")


def test_a_line_has_an_event_a_sentence_and_fields(log, caplog):
    log.warning("node_lost", "node {node} is lost: {count:d} of {what}", node="8d", count=3, what="{node} 100 %s")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("lesson_server.test", logging.WARNING)
    assert record.getMessage() == "node 8d is lost: 3 of {node} 100 %s"
    assert (record.event, record.fields) == ("node_lost", {"node": "8d", "count": 3, "what": "{node} 100 %s"})


def test_a_line_is_of_the_statement_that_logs_it(log, caplog):
    log.info("one", "one")
    log.exception("two", "two", ValueError())
    source = Path(__file__).read_text("utf-8").splitlines()
    assert [record.pathname for record in caplog.records] == [__file__] * 2
    assert [f'"{record.event}"' in source[record.lineno - 1] for record in caplog.records] == [True] * 2


def test_an_exception_has_its_traceback(log, caplog):
    error = LookupError("given")
    log.exception("failed", "failed", error)
    try:
        raise LookupError("handled")
    except LookupError:
        log.exception("failed", "failed")
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert [str(record.exc_info[1]) for record in caplog.records] == ["given", "handled"]


def test_a_line_below_the_level_is_not_made(log, caplog):
    caplog.set_level(logging.ERROR)
    log.warning("one", "{what}")  # would raise KeyError
    assert caplog.records == []


# The events of the server


def test_every_event_is_in_snake_case_and_its_fields_have_names_of_their_own():
    assert len(STATEMENTS) > 40
    for event, _, fields in STATEMENTS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", event)
        assert not fields & RESERVED


def test_the_page_describes_every_event_with_its_level_and_fields():
    expected = defaultdict(lambda: (set(), set()))
    for event, level, fields in STATEMENTS:
        expected[event][0].add(level)
        expected[event][1].update(fields)
    assert described() == {event: (*levels, fields) for event, (levels, fields) in expected.items()}


def test_a_sentence_on_a_region_names_all_of_its_fields():
    assert {field for _, field, _, _ in Formatter().parse(REGION) if field is not None} == REGION_FIELDS
