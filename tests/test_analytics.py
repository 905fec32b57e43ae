"""analytics.py against a real HTTP server that answers as Mixpanel's /track does."""

import json
import logging
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Event, Thread
from typing import Any, Self
from urllib.parse import parse_qs

import pytest
from pydantic import SecretStr

from lesson_server import analytics
from lesson_server.analytics import BATCH_SIZE, Analytics, MixpanelAnalytics, NoAnalytics, make_analytics
from lesson_server.settings.schema import MixpanelSettings
from lesson_server.status import Status

TOKEN = "0123456789abcdef-the-token"
LONG = 20.0  # seconds to wait for what always comes
ACCEPTED = (200, b'{"status": 1, "error": null}')


class FakeMixpanel(ThreadingHTTPServer):
    """Takes events as /track does: ``answers`` first, then :data:`ACCEPTED`; ``may_answer`` holds them back."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.batches: list[list[dict[str, Any]]] = []
        self.forms: list[dict[str, list[str]]] = []
        self.answers: list[tuple[int, bytes]] = []
        self.changed = Condition()
        self.may_answer = Event()
        self.may_answer.set()
        self._thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait_for_batches(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.batches) >= count, LONG)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_answer.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeMixpanel

    def do_POST(self) -> None:
        assert self.path == "/track"
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        with self.server.changed:
            self.server.forms.append(form)
            self.server.batches.append(json.loads(form["data"][0]))
            status, body = self.server.answers.pop(0) if self.server.answers else ACCEPTED
            self.server.changed.notify_all()
        self.server.may_answer.wait(LONG)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Outcomes:
    """Counts outcomes, as the server's metrics do."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._changed = Condition()

    def __call__(self, outcome: str, count: int) -> None:
        with self._changed:
            self.counts[outcome] += count
            self._changed.notify_all()

    def wait_for(self, outcome: str, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.counts[outcome] >= count, LONG)
            assert self.counts[outcome] == count


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Short pauses, no proxy in between; and no test may find the token in the log."""
    monkeypatch.setattr(analytics, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    caplog.set_level(logging.WARNING)
    yield
    assert TOKEN not in caplog.text


@pytest.fixture
def mixpanel() -> Iterator[FakeMixpanel]:
    with FakeMixpanel() as server:
        yield server


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


def sender(url: str, outcomes: Outcomes) -> Analytics:
    return make_analytics(MixpanelSettings(token=SecretStr(TOKEN), api_url=url), outcomes)


def reconnect(sending: Analytics, count: int = 1) -> None:
    for number in range(count):
        sending.reconnect(f"p-{number}", f"sid-{number}", "lesson-1", "student")


def own_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lesson_server.analytics"]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# What is sent


def test_a_reconnect_is_sent_as_the_contract_says(
    mixpanel: FakeMixpanel, outcomes: Outcomes, caplog: pytest.LogCaptureFixture
) -> None:
    sending = sender(mixpanel.url, outcomes)
    sending.start()
    before = time.time()
    sending.reconnect("p-1", "sid-1", "lesson-1", "student")
    outcomes.wait_for("sent", 1)
    sending.close(LONG)

    (form,) = mixpanel.forms
    assert form["verbose"] == ["1"]
    assert form["ip"] == ["0"]
    ((event,),) = mixpanel.batches
    assert event["event"] == "reconnect"
    properties = event["properties"]
    assert properties["token"] == TOKEN
    assert properties["distinct_id"] == "p-1"
    assert properties["lesson_id"] == "lesson-1"
    assert properties["role"] == "student"
    assert before <= properties["time"] <= time.time()
    assert str(uuid.UUID(properties["$insert_id"])) == properties["$insert_id"]
    assert outcomes.counts == {"sent": 1}
    assert own_log(caplog) == []


def test_the_insert_id_belongs_to_one_person_on_one_connection(mixpanel: FakeMixpanel, outcomes: Outcomes) -> None:
    sending = sender(mixpanel.url, outcomes)
    sending.start()
    for client_id, sid in [("p-1", "sid-1"), ("p-1", "sid-1"), ("p-1", "sid-2"), ("p-2", "sid-1")]:
        sending.reconnect(client_id, sid, "lesson-1", "student")
    sending.close(LONG)
    first, again, *others = [event["properties"]["$insert_id"] for batch in mixpanel.batches for event in batch]
    assert first == again
    assert len({first, *others}) == 3


def test_what_waits_is_sent_in_batches(mixpanel: FakeMixpanel, outcomes: Outcomes) -> None:
    sending = sender(mixpanel.url, outcomes)
    reconnect(sending, 120)
    sending.start()
    sending.close(LONG)
    assert [len(batch) for batch in mixpanel.batches] == [BATCH_SIZE, BATCH_SIZE, 20]
    sent = [event["properties"]["distinct_id"] for batch in mixpanel.batches for event in batch]
    assert sent == [f"p-{number}" for number in range(120)]
    assert outcomes.counts == {"sent": 120}


def test_close_sends_what_is_left(mixpanel: FakeMixpanel, outcomes: Outcomes) -> None:
    sending = sender(mixpanel.url, outcomes)
    sending.start()
    reconnect(sending, 75)
    sending.close(LONG)
    assert outcomes.counts == {"sent": 75}


# What goes wrong


def test_an_outage_is_survived_and_told_once(outcomes: Outcomes, caplog: pytest.LogCaptureFixture) -> None:
    port = unused_port()
    sending = sender(f"http://127.0.0.1:{port}", outcomes)
    sending.start()
    reconnect(sending, BATCH_SIZE)
    outcomes.wait_for("failed", BATCH_SIZE)
    with FakeMixpanel(port) as mixpanel:
        reconnect(sending)
        outcomes.wait_for("sent", 1)
        assert len(mixpanel.batches) == 1
        sending.close(LONG)
    assert own_log(caplog) == [
        "events can't be sent to Mixpanel: ConnectionError",
        "events are sent to Mixpanel again",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        (200, b'{"status": 0, "error": "the token %s is unknown"}' % TOKEN.encode()),
        (500, b'{"status": 0, "error": "out of order"}'),
        (502, b"<html>%s</html>" % TOKEN.encode()),
        (200, b"[]"),
        (200, b"{}"),
        (200, b"null"),
    ],
)
def test_a_batch_that_is_refused_is_sent_again_with_the_same_ids(
    mixpanel: FakeMixpanel, outcomes: Outcomes, caplog: pytest.LogCaptureFixture, answer: tuple[int, bytes]
) -> None:
    mixpanel.answers = [answer, answer]
    sending = sender(mixpanel.url, outcomes)
    reconnect(sending, 3)
    sending.start()
    outcomes.wait_for("sent", 3)
    sending.close(LONG)
    first, second, third = mixpanel.batches
    assert first == second == third
    assert outcomes.counts == {"sent": 3}
    assert own_log(caplog) == [
        "events can't be sent to Mixpanel: its answer is an error",
        "events are sent to Mixpanel again",
    ]


def test_a_batch_is_given_up_after_some_attempts(
    mixpanel: FakeMixpanel, outcomes: Outcomes, caplog: pytest.LogCaptureFixture
) -> None:
    mixpanel.answers = [(500, b"")] * analytics.ATTEMPTS
    sending = sender(mixpanel.url, outcomes)
    reconnect(sending, BATCH_SIZE + 1)
    sending.start()
    outcomes.wait_for("sent", 1)
    sending.close(LONG)
    assert len(mixpanel.batches) == analytics.ATTEMPTS + 1
    assert outcomes.counts == {"failed": BATCH_SIZE, "sent": 1}
    assert len(own_log(caplog)) == 2


def test_a_server_that_never_answers_delays_nobody(
    mixpanel: FakeMixpanel, outcomes: Outcomes, caplog: pytest.LogCaptureFixture
) -> None:
    mixpanel.may_answer.clear()
    sending = sender(mixpanel.url, outcomes)
    reconnect(sending, BATCH_SIZE + 10)
    sending.start()
    mixpanel.wait_for_batches(1)
    began = time.monotonic()
    sending.close(0.1)
    assert time.monotonic() - began < analytics.REQUEST_TIMEOUT / 2
    assert outcomes.counts == {"dropped": BATCH_SIZE + 10}
    assert own_log(caplog) == ["60 events were not sent to Mixpanel in the 0.1 s allowed, and are lost"]


def test_a_batch_that_is_given_up_at_the_deadline_is_counted_once(mixpanel: FakeMixpanel, outcomes: Outcomes) -> None:
    mixpanel.may_answer.clear()
    sending = sender(mixpanel.url, outcomes)
    reconnect(sending)
    sending.start()
    mixpanel.wait_for_batches(1)
    sending.close(0)
    mixpanel.may_answer.set()
    sending.close(LONG)  # the thread comes to its end
    assert outcomes.counts == {"dropped": 1}


def test_a_server_that_is_slow_for_once_gets_the_batch_again(
    mixpanel: FakeMixpanel, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(analytics, "REQUEST_TIMEOUT", 0.1)
    mixpanel.may_answer.clear()
    sending = sender(mixpanel.url, outcomes)
    reconnect(sending)
    sending.start()
    mixpanel.wait_for_batches(2)
    mixpanel.may_answer.set()
    sending.close(LONG)
    assert mixpanel.batches[0] == mixpanel.batches[1]
    assert own_log(caplog)[0] == "events can't be sent to Mixpanel: ReadTimeout"


def test_close_does_not_wait_for_the_next_attempt(outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pause it tries at once, and each batch that is left once."""
    monkeypatch.setattr(analytics, "FIRST_PAUSE", 3_600.0)
    sending = sender(f"http://127.0.0.1:{unused_port()}", outcomes)
    reconnect(sending, 2 * BATCH_SIZE)
    sending.start()
    sending.close(LONG)
    assert outcomes.counts == {"failed": 2 * BATCH_SIZE}


def test_a_full_queue_drops_and_counts(
    mixpanel: FakeMixpanel, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics, "QUEUE_SIZE", 10)
    mixpanel.may_answer.clear()
    sending = sender(mixpanel.url, outcomes)
    sending.start()
    reconnect(sending)
    mixpanel.wait_for_batches(1)  # the worker is held up with the first event
    reconnect(sending, 15)
    assert outcomes.counts == {"dropped": 5}
    mixpanel.may_answer.set()
    sending.close(LONG)
    assert outcomes.counts == {"dropped": 5, "sent": 11}


def test_after_close_events_are_dropped_and_counted(mixpanel: FakeMixpanel, outcomes: Outcomes) -> None:
    sending = sender(mixpanel.url, outcomes)
    sending.start()
    sending.close(LONG)
    reconnect(sending)
    assert outcomes.counts == {"dropped": 1}
    assert mixpanel.batches == []


def test_close_without_start_drops_and_counts(mixpanel: FakeMixpanel, outcomes: Outcomes) -> None:
    sending = sender(mixpanel.url, outcomes)
    reconnect(sending)
    sending.close(LONG)
    assert outcomes.counts == {"dropped": 1}


# The status


def status_in_time(sending: Analytics, before: float) -> tuple[str, str | None]:
    """The status and the cause; the failure was after ``before``."""
    status = sending.status
    assert status.failed_at is not None
    assert before <= status.failed_at <= time.time()
    return status.status, status.cause


def test_the_status_says_whether_events_arrive_and_what_failed_last(outcomes: Outcomes) -> None:
    port = unused_port()
    sending = sender(f"http://127.0.0.1:{port}", outcomes)
    assert sending.status == Status("up")
    sending.start()
    before = time.time()
    reconnect(sending, BATCH_SIZE)
    outcomes.wait_for("failed", BATCH_SIZE)
    assert status_in_time(sending, before) == ("down", "ConnectionError")
    failed = sending.status
    with FakeMixpanel(port):
        reconnect(sending)
        outcomes.wait_for("sent", 1)
        assert sending.status == Status("up", failed.failed_at, "ConnectionError")
        sending.close(LONG)


@pytest.mark.parametrize(
    "answer",
    [
        (200, b'{"status": 0, "error": "the token %s is unknown"}' % TOKEN.encode()),
        (502, b"<html>%s</html>" % TOKEN.encode()),
        (200, b"[]"),
        (200, b"null"),
    ],
)
def test_the_status_does_not_quote_the_answer(
    mixpanel: FakeMixpanel, outcomes: Outcomes, answer: tuple[int, bytes]
) -> None:
    mixpanel.answers = [answer] * analytics.ATTEMPTS
    sending = sender(mixpanel.url, outcomes)
    before = time.time()
    sending.start()
    reconnect(sending)
    outcomes.wait_for("failed", 1)
    assert status_in_time(sending, before) == ("down", "its answer is an error")
    reconnect(sending)
    outcomes.wait_for("sent", 1)
    assert status_in_time(sending, before) == ("up", "its answer is an error")
    sending.close(LONG)


def test_without_a_token_the_status_is_off(outcomes: Outcomes) -> None:
    assert make_analytics(MixpanelSettings(), outcomes).status == Status("off")


# Which one


def test_a_token_means_mixpanel(outcomes: Outcomes) -> None:
    assert isinstance(sender("http://127.0.0.1:1", outcomes), MixpanelAnalytics)


def test_no_token_means_nothing(outcomes: Outcomes) -> None:
    nothing = make_analytics(MixpanelSettings(), outcomes)
    assert isinstance(nothing, NoAnalytics)
    nothing.start()
    reconnect(nothing)
    nothing.close(0)
    assert outcomes.counts == {}


def test_no_token_loads_no_library() -> None:
    code = (
        "import sys; from lesson_server.analytics import make_analytics; "
        "from lesson_server.settings.schema import Settings; "
        "make_analytics(Settings().mixpanel, print); sys.exit('mixpanel' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
