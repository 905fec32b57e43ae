"""spans.py: a span for each event and a child for each step, as a collector of OpenTelemetry gets them."""

import asyncio
import logging
import sys
import time
from collections import Counter
from typing import Any

import pytest
from clients import SUCCESS, client, error, join
from commands import running
from fakes import World, settle, store_down
from handshakes import GUEST, PARTICIPANT, TEACHER
from otlp import running_collector
from processes import LONG

from lesson_server import __version__
from lesson_server.gateway.spans import DEFAULT_RATIO, Spans
from lesson_server.gateway.tracing import Tap
from lesson_server.server import _make_spans
from statecharts.join_lesson import participant as chart

ROWS: Any = chart.TRANSITIONS
STEPS = [step for row in ROWS if row["trigger"] in chart.PATH for step in row["before"]]
SERVER = 2  # SpanKind of OTLP
# Seconds that the tests allow for the last spans: a collector that answers needs none of them.
DEADLINE = 20.0


@pytest.fixture
def collector():
    with running_collector() as collector:
        yield collector


@pytest.fixture
def otel(collector, monkeypatch):
    """The environment of a process that samples everything."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_TRACES_SAMPLER": "always_on"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ


@pytest.fixture
def spans(otel):
    spans = Spans()
    yield spans
    spans.close(DEADLINE)


def names(span):
    return [child.name for child in span.children]


# Of a real server


def test_a_join_is_a_span_with_a_child_a_step(otel, collector, io_loop, start_server, mint):
    server, token = start_server(), mint("anna")

    async def story():
        async with client(server, **PARTICIPANT | {"access_token": token}) as sio:
            assert await join(sio) == SUCCESS
            assert (await sio.call("take_seat"))["status"] == "SUCCESS"
            return sio.get_sid()

    sid = io_loop.run_sync(story)
    io_loop.run_sync(server.stop)
    joined, seated = collector.roots()
    assert (joined.name, seated.name, joined.kind) == ("join_lesson", "take_seat", SERVER)
    assert joined.trace != seated.trace
    for span in (joined, seated):
        assert span.attributes == {"client": "participant", "sid": sid, "lesson_id": "1", "outcome": "success"}
        assert not span.is_error
    assert names(joined) == STEPS
    assert all(joined.start <= step.start <= step.end <= joined.end for step in joined.children)
    assert all(before.end <= after.start for before, after in zip(joined.children, joined.children[1:], strict=False))
    assert [step.attributes for step in joined.children] == [{}] * len(STEPS)
    assert joined.resource["service.name"] == "lesson-server"
    assert joined.resource["service.version"] == __version__
    assert collector.paths == {"/v1/traces"}
    assert not [body for body in collector.bodies if token.encode() in body]


def test_a_collector_that_hangs_delays_neither_a_join_nor_the_stop(
    otel, collector, io_loop, start_server, monkeypatch, caplog
):
    """The spans are sent by another thread; that the stop has returned while the collector hangs is what is shown."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setattr("lesson_server.server.SPANS_DEADLINE", 0.05)
    collector.answers.clear()
    server = start_server()

    async def story():
        async with client(server, **GUEST) as sio:
            assert await join(sio) == SUCCESS
            while not collector.asked.is_set():
                await asyncio.sleep(0.001)
            assert await join(sio) == SUCCESS

    io_loop.run_sync(story)
    io_loop.run_sync(server.stop)
    assert not collector.answers.is_set()
    assert collector.bodies == []
    assert caplog.messages == []


def test_the_last_spans_of_each_worker_are_sent_when_the_server_is_told_to_stop(otel, collector, environ, io_loop):
    joins = 6
    more = {**otel, "OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_SERVICE_NAME": "school", "LESSON_SERVER_DRAIN": "0"}

    async def story():
        for _ in range(joins):
            async with client(server, **GUEST) as sio:
                assert await join(sio) == SUCCESS

    with running("--workers", "2", **environ, **more) as server:
        io_loop.run_sync(story)
        assert collector.bodies == []
        server.terminate()
        assert server.wait(LONG) == 0
    roots = collector.roots()
    assert [(span.name, span.resource["service.name"]) for span in roots] == [("join_lesson", "school")] * joins


# What a span says


@pytest.mark.gen_test
async def test_a_refusal_is_no_error_and_the_clean_up_is_in_the_span(spans, collector):
    world = World(spans=spans)
    await world.connect("sid", {**GUEST, "lesson_id": "17"})
    assert await world.join("sid") == error("lesson 17 not found")
    await world.disconnect("sid")
    spans.close(DEADLINE)
    (span,) = collector.roots()
    assert (span.attributes["outcome"], span.attributes["lesson_id"], span.is_error) == (
        "lesson_not_found",
        "17",
        False,
    )
    assert names(span) == ["check_lesson_exists", "leave_room"]
    first, second = span.children
    assert (first.attributes, first.is_error) == ({"outcome": "lesson_not_found"}, False)
    assert (second.attributes, second.is_error) == ({}, False)  # the clean-up did not fail


@pytest.mark.parametrize(
    ("fault", "of_step", "outcome"),
    [
        (store_down(), {"outcome": "store_unavailable"}, "store_unavailable"),
        (RuntimeError("a secret of ours"), {"error.type": "RuntimeError"}, "internal_error"),
    ],
    ids=["a store", "a defect"],
)
@pytest.mark.gen_test
async def test_a_fault_of_ours_is_an_error_of_the_step_and_of_the_event(spans, collector, fault, of_step, outcome):
    world = World(spans=spans)
    world.faults.fail_at("presence.write", fault)
    await world.connect("sid", TEACHER)
    await world.join("sid")
    spans.close(DEADLINE)
    (span,) = collector.roots()
    assert (span.attributes["client"], span.attributes["outcome"], span.is_error) == ("teacher", outcome, True)
    (failed,) = [step for step in span.children if step.is_error]
    assert (failed.name, failed.attributes) == ("set_teacher_presence", of_step)
    assert b"secret" not in b"".join(collector.bodies)


@pytest.mark.gen_test
async def test_a_client_that_disconnects_during_the_join(spans, collector):
    world = World(spans=spans)
    await world.connect("sid", GUEST)
    hold = world.faults.hold_at("lessons.get")
    joining = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    ending = asyncio.create_task(world.disconnect("sid"))
    await settle()
    during_the_step = time.time_ns()
    hold.release()
    await asyncio.gather(joining, ending)
    spans.close(DEADLINE)
    (span,) = collector.roots()
    assert (span.attributes["outcome"], span.is_error) == ("disconnected", False)
    # The steps of the disconnect are not the event's.
    assert names(span) == ["check_lesson_exists", "check_access_token", "enter_room"]
    assert span.start < span.children[0].start
    assert during_the_step < span.children[0].end


@pytest.mark.gen_test
async def test_a_join_that_is_cancelled_has_a_span(spans, collector):
    world = World(spans=spans)
    await world.connect("sid", GUEST)
    hold = world.faults.hold_at("lessons.get")
    joining = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    joining.cancel()
    await asyncio.wait([joining])
    spans.close(DEADLINE)
    (span,) = collector.roots()
    (step,) = span.children
    assert (step.name, step.attributes, step.is_error) == (
        "check_lesson_exists",
        {"error.type": "CancelledError"},
        True,
    )


@pytest.mark.gen_test
async def test_events_that_run_at_once_have_their_own_steps(spans, collector):
    world = World(spans=spans)
    sids = ["a", "b", "c"]
    for sid in sids:
        await world.connect(sid, PARTICIPANT)
    hold = world.faults.hold_at("lessons.get")
    joins = [asyncio.create_task(world.join(sid)) for sid in sids]
    await hold.reached.wait()
    await settle()
    hold.release()
    await asyncio.gather(*joins)
    spans.close(DEADLINE)
    roots = collector.roots()
    assert sorted(span.attributes["sid"] for span in roots) == sids
    assert [names(span) for span in roots] == [STEPS] * 3


@pytest.mark.gen_test
async def test_the_metrics_and_the_trace_of_the_console_learn_of_a_step_too(spans, collector):
    world = World(spans=spans)
    connection = (await world.connect("sid", PARTICIPANT)).connection
    tap = Tap(connection)
    tap.queues.append(queue := asyncio.Queue())
    assert await world.join("sid") == SUCCESS
    tap.remove()
    traced = [queue.get_nowait() for _ in range(queue.qsize())]
    assert [data["step"] for name, data in traced if name == "step"] == STEPS
    (family,) = world.metrics.step_seconds.collect()
    counted = Counter({s.labels["step"]: int(s.value) for s in family.samples if s.name.endswith("_count")})
    assert counted == Counter(STEPS)
    await world.disconnect("sid")  # in the task of the event, which has ended
    spans.close(DEADLINE)
    assert [names(span) for span in collector.roots()] == [STEPS]


# Which traces are sampled


def share_sampled(region, count=2_000):
    spans = Spans()
    begun = [span for _ in range(count) if (span := spans.begin(region)) is not None]
    for span in begun:
        span.end("success")
    spans.close(DEADLINE)
    return len(begun) / count


@pytest.mark.parametrize(
    ("sampler", "at_least", "at_most"),
    [
        ({"OTEL_TRACES_SAMPLER": "always_off"}, 0, 0),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}, 0.3, 0.7),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, 1, 1),
        # 20 of 2,000 on average: none at all, or more than 100, is rarer than one in a hundred million.
        ({}, 1 / 2_000, 0.05),
        ({"OTEL_TRACES_SAMPLER": ""}, 1 / 2_000, 0.05),
    ],
    ids=["none", "half", "all", "by default", "empty"],
)
@pytest.mark.gen_test
async def test_the_standard_variables_say_how_many_are_sampled(otel, monkeypatch, sampler, at_least, at_most):
    monkeypatch.delenv("OTEL_TRACES_SAMPLER")
    for name, value in sampler.items():
        monkeypatch.setenv(name, value)
    region = await World().connect("sid", GUEST)
    assert at_least <= share_sampled(region) <= at_most


def test_the_default_is_one_in_a_hundred():
    assert DEFAULT_RATIO == 0.01


@pytest.mark.gen_test
async def test_a_join_that_is_not_sampled_sends_nothing(otel, collector, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    spans = Spans()
    world = World(spans=spans)
    await world.connect("sid", PARTICIPANT)
    assert await world.join("sid") == SUCCESS
    spans.close(DEADLINE)
    assert collector.bodies == []


# Off


@pytest.mark.parametrize("environ", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}], ids=["not set", "empty"])
def test_without_the_variable_nothing_of_it_is_imported(monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "lesson_server.gateway.spans", None)  # an import would raise
    assert _make_spans() is None


def test_without_spans_a_step_costs_what_its_metric_costs():
    world = World()
    for machine in world.gateway._machines.values():
        assert machine.observe_step.__qualname__ == "Metrics.step_observer.<locals>.observe"


def test_without_the_extra_the_start_warns_and_the_server_serves(
    otel, io_loop, start_server, monkeypatch, caplog, collector
):
    monkeypatch.delitem(sys.modules, "lesson_server.gateway.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    server = start_server()
    # The library's thread of an earlier test may still try to reach the collector of that test.
    (record,) = (record for record in caplog.records if record.name.startswith("lesson_server"))
    assert (record.event, record.levelno) == ("otel_not_installed", logging.WARNING)
    assert "pip install 'lesson-server[otel]'" in record.getMessage()

    async def story():
        async with client(server, **GUEST) as sio:
            assert await join(sio) == SUCCESS

    io_loop.run_sync(story)
    io_loop.run_sync(server.stop)
    assert collector.bodies == []
