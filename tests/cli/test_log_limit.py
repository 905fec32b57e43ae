"""log_limit.py: of each kind of line a few are written, and then how many were left out. The clock is the test's."""

import asyncio
import io
import logging
import re

import pytest
from commands import running
from raw_client import Clients
from waiting import until

from lesson_server.cli import log_limit
from lesson_server.cli.log_limit import INTERVAL, LINES, LimitedHandler
from lesson_server.log import EventLogger


class Log:
    """A log of a test's own, and its clock."""

    def __init__(self):
        self.now = 1_000.0
        self.handler = LimitedHandler(lambda: self.now)
        self._stream = self.handler.stream = io.StringIO()
        self.logger = logging.Logger("test")
        self.logger.addHandler(self.handler)
        self.events = EventLogger("test")
        self.events._logger = self.logger

    @property
    def lines(self):
        return self._stream.getvalue().splitlines()

    def say(self, text):
        self.logger.warning("said: %s", text)

    def drop(self, why):
        self.events.info("client_dropped", "dropped: {reason}", reason=why)


@pytest.fixture
def log():
    log = Log()
    yield log
    log.handler.close()


def left_out(line, count):
    return f"{line} (and {count} more like this in {INTERVAL:g} s)"


def test_a_few_lines_are_written_as_they_are(log):
    for number in range(LINES):
        log.say(number)
    log.handler.close()
    assert log.lines == [f"said: {number}" for number in range(LINES)]


def test_of_more_the_number_is_written_with_the_next_line_when_the_time_is_over(log):
    for number in range(LINES + 7):
        log.say(number)
    log.now += INTERVAL - 0.1
    log.say("still too many")
    assert len(log.lines) == LINES
    log.now += 0.1
    log.say("next")
    assert log.lines[LINES:] == [left_out(f"said: {LINES}", 8), "said: next"]


def test_after_that_time_a_few_are_written_again(log):
    for _ in range(3):
        for number in range(100):
            log.say(number)
        log.now += INTERVAL
    log.handler.close()
    assert len(log.lines) == 3 * (LINES + 1)
    assert log.lines.count(left_out(f"said: {LINES}", 100 - LINES)) == 3


def test_a_storm_that_goes_on_is_a_few_lines_in_that_time(log):
    for _ in range(1_000):
        log.say("x")
        log.now += INTERVAL / 100
    assert len(log.lines) <= 10 * (LINES + 1)


def test_the_number_is_written_when_the_handler_is_closed(log):
    for number in range(LINES + 2):
        log.say(number)
    log.handler.close()
    assert log.lines[LINES:] == [left_out(f"said: {LINES}", 2)]


@pytest.mark.gen_test
async def test_in_a_loop_the_number_is_written_when_the_time_is_over(log, monkeypatch):
    monkeypatch.setattr(log_limit, "INTERVAL", 0.05)
    for number in range(LINES + 2):
        log.say(number)
    assert len(log.lines) == LINES
    await until(lambda: len(log.lines) > LINES)
    assert log.lines[LINES:] == [f"said: {LINES} (and 2 more like this in 0.05 s)"]
    log.say("next")
    assert log.lines[-1] == "said: next"


@pytest.mark.gen_test
async def test_the_timer_of_a_time_that_is_over_does_not_end_the_next_one(log, monkeypatch):
    for interval in (0.05, 60.0):
        monkeypatch.setattr(log_limit, "INTERVAL", interval)
        for number in range(LINES + 2):
            log.say(number)
        log.now += 0.05
    await asyncio.sleep(0.1)
    log.say("too many")
    assert len(log.lines) == LINES + 1 + LINES


def test_kinds_do_not_stand_in_each_other_s_way(log):
    for number in range(100):
        log.say(number)
        log.drop("one reason")
    log.drop("another reason")
    log.logger.warning("said: %s", "by another statement")
    assert log.lines[-2:] == ["dropped: another reason", "said: by another statement"]
    assert len(log.lines) == 2 * LINES + 2


def test_what_clients_send_makes_no_kinds(log):
    for number in range(1_000):
        log.say(f"{number}")
    assert len(log.handler._windows) == 1


def test_of_what_is_left_out_no_traceback_and_no_object_is_kept(log):
    class Thing:
        def __str__(self):
            return "thing"

    things = []
    for _ in range(LINES + 1):
        try:
            raise LookupError(Thing())
        except LookupError as error:
            log.logger.exception("failed: %s", error)
            things.append(error)
    (window,) = log.handler._windows.values()
    assert (window.sample.args, window.sample.exc_info) == (None, None)
    assert window.sample.getMessage() == "failed: thing"


def test_a_line_with_a_percent_sign_is_written_as_it_is(log):
    for _ in range(LINES + 1):
        log.say("100 %s")
    log.handler.close()
    assert log.lines[-1] == left_out("said: 100 %s", 1)


# The whole server

SECRET = "eyJhbGciOiJIUzI1NiJ9.secret"


def test_a_storm_of_broken_clients_is_a_few_lines_of_the_server_s_log(environ, io_loop):
    async def storm(port):
        clients = Clients(port)
        for packet in ("4" + SECRET, "9" + SECRET):
            for _ in range(50):
                client = await clients.websocket()
                await client.send(packet)
                await client.messages()
        for host in ("a:" + "9" * 5_000, SECRET + "/"):
            for _ in range(50):
                client = await clients.connection()
                await client.write(f"GET /{SECRET} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                await client.is_ended()
        clients.disappear()

    with running(**environ) as server:
        io_loop.run_sync(lambda: storm(int(server.url.rsplit(":")[-1])), timeout=30)
        server.terminate()
        _, log = server.communicate(timeout=30)
    lines = [re.sub(r"^.* INFO ", "", line) for line in log.splitlines()]
    for reason in ("malformed packet (ValueError)", "unknown packet"):
        line = f"lesson_server.protocol.engine_socket client_dropped: client dropped: {reason}"
        assert lines.count(line) == LINES
        assert left_out(line, 50 - LINES) in lines
    assert len(lines) == 2 * (LINES + 1)
    assert SECRET not in log
