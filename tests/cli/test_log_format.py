"""log_format.py: with ``server.log_format = "json"`` each line of the log is an object, whoever has logged it."""

import io
import json
import logging
import os
import signal
import subprocess
from datetime import datetime, timedelta

import pytest
from cluster import ROOT
from commands import COMMAND, clean_environ, running
from processes import LONG, children, until
from raw_client import SECRET, Clients

from lesson_server.cli import run
from lesson_server.cli.log_format import JsonFormatter
from lesson_server.cli.log_limit import LINES, LimitedHandler
from lesson_server.log import EventLogger
from lesson_server.settings.sources import load

JSON = {"LESSON_SERVER_LOG_FORMAT": "json"}


@pytest.fixture
def log():
    """A log in memory: its two loggers, of events and of a library, and what they have logged."""

    class Log:
        def __init__(self):
            self.now = 1_000.0
            self._stream = io.StringIO()
            self.handler = LimitedHandler(lambda: self.now)
            self.handler.stream = self._stream
            self.handler.setFormatter(JsonFormatter())
            self.library = logging.Logger("library")
            self.library.addHandler(self.handler)
            self.events = EventLogger("lesson_server.test")
            self.events._logger = self.library

        @property
        def lines(self):
            return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    return Log()


def test_a_line_is_an_object(log):
    log.events.warning("node_lost", "node {node} is lost", node="8d\n\ud800", connections=3)
    (line,) = log.lines
    assert datetime.fromisoformat(line.pop("time")).utcoffset() == timedelta(0)
    assert line == {
        "level": "warning",
        "logger": "library",
        "pid": os.getpid(),
        "event": "node_lost",
        "message": "node 8d\n\ud800 is lost",
        "node": "8d\n\ud800",
        "connections": 3,
    }


def test_a_traceback_is_a_field(log):
    try:
        raise LookupError("where")
    except LookupError:
        log.events.exception("event_failed", "failed", sid="sid-7")
    (line,) = log.lines
    assert (line["message"], line["sid"]) == ("failed", "sid-7")
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["traceback"].endswith("LookupError: where")


def test_a_line_of_a_library_is_an_object_too(log):
    log.library.warning("%s %d%%", "full:", 100)
    (line,) = log.lines
    assert (line["event"], line["message"], line["logger"]) == ("library_message", "full: 100%", "library")


def test_the_lines_left_out_keep_event_and_fields_and_are_counted(log):
    for number in range(LINES + 3):
        log.events.info("client_dropped", "dropped: {reason}", reason="unknown packet", sid=f"s{number}")
    log.handler.close()
    *written, last = log.lines
    assert [line["sid"] for line in written] == [f"s{number}" for number in range(LINES)]
    assert (last["event"], last["reason"], last["left_out"]) == ("client_dropped", "unknown packet", 3)
    assert last["message"] == "dropped: unknown packet (and 3 more like this in 10 s)"


# The whole server


def objects(log):
    return [json.loads(line) for line in log.splitlines()]


def test_a_client_that_breaks_the_protocol_is_named_by_its_sid(environ, io_loop):
    async def break_protocol():
        clients = Clients(int(server.url.rsplit(":")[-1]))
        for client in (await clients.websocket(), connected := await clients.websocket()):
            if client is connected:
                await client.send('40{"client": "participant", "lesson_id": "1"}')
                answer = await client.receive()
            await client.send("4" + SECRET)
            await client.messages()
        clients.disappear()
        return json.loads(answer[2:])["sid"]

    with running(**environ, **JSON) as server:
        sid = io_loop.run_sync(break_protocol)
        server.terminate()
        _, log = server.communicate(timeout=LONG)
    assert [(line["event"], line["sid"]) for line in objects(log)] == [
        ("client_dropped", None),
        ("client_dropped", sid),
    ]
    assert SECRET not in log


def test_the_parent_of_the_workers(environ):
    with running("--workers", "2", **environ, **JSON) as server:
        victim = children(server)[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in children(server))
        server.terminate()
        _, log = server.communicate(timeout=LONG)
    (line,) = objects(log)
    assert (line["event"], line["worker_pid"], line["status"]) == ("worker_died", victim, -signal.SIGKILL)
    assert line["pid"] == server.pid


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_start_that_fails_is_an_object(environ, workers):
    ended = subprocess.run(
        [*COMMAND, "run", "--workers", workers],
        env=clean_environ(**environ | JSON | {"LESSON_REDIS_URL": "redis://:sesame@127.0.0.1:1"}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = [line for line in objects(ended.stderr) if line["event"] == "server_failed"]
    assert line["cause"].startswith("Redis: ")
    assert "sesame" not in ended.stderr


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_defect_that_ends_the_server_is_logged_with_its_traceback(environ, caplog, log_format):
    def fail():
        raise LookupError("a defect")

    assert run._status_of(load(environ={**environ, "LESSON_SERVER_LOG_FORMAT": log_format}), fail) == 1
    (record,) = caplog.records
    assert (record.event, record.exc_info[0]) == ("server_failed", LookupError)
