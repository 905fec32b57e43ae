"""handlers.py and handshake.py: which handshakes are accepted, how events are answered, and that no error gets past."""

import asyncio
import logging
import time
from dataclasses import replace

import pytest
from fakes import World, settle, store_down
from handshakes import GUEST, PARTICIPANT, TEACHER
from joins import join_of
from seat_events import send
from socketio.exceptions import ConnectionRefusedError  # noqa: A004 (the library's, not the builtin)

from lesson_server.cli.log_format import JsonFormatter
from lesson_server.errors import InvalidTransition
from lesson_server.events.join_lesson import DEADLINE, JOIN_LESSON
from lesson_server.gateway.admission import Admission
from lesson_server.stores.redis.removals import REMOVAL_PATIENCE

SUCCESS = {"status": "SUCCESS", "data": {}}

UNAVAILABLE = {"status": "ERROR", "message": "the lesson service is unavailable, try again"}

INTERNAL_ERROR = {"status": "ERROR", "message": "internal error"}


# The answers

ANSWERS = [
    (GUEST, SUCCESS, "success"),
    (PARTICIPANT, SUCCESS, "success"),
    (TEACHER, SUCCESS, "success"),
    ({**GUEST, "lesson_id": "9"}, {"status": "ERROR", "message": "lesson 9 not found"}, "lesson_not_found"),
    (
        {**GUEST, "access_token": "expired"},
        {"status": "ERROR", "message": "access token has expired"},
        "token_expired",
    ),
    ({**GUEST, "access_token": "forged"}, {"status": "ERROR", "message": "access token is invalid"}, "token_invalid"),
    (
        {"client": "teacher", "lesson_id": "1"},
        {"status": "ERROR", "message": "access token is required"},
        "token_required",
    ),
    (
        {**TEACHER, "access_token": "student:t-1"},
        {"status": "ERROR", "message": "only a teacher can join as teacher"},
        "not_a_teacher",
    ),
]


@pytest.mark.parametrize(("auth", "answer", "outcome"), ANSWERS, ids=[outcome for *_, outcome in ANSWERS])
@pytest.mark.gen_test
async def test_a_join_is_answered_and_counted_by_its_outcome(auth, answer, outcome, caplog):
    world = World()
    await world.connect("sid", auth)
    assert await world.join("sid") == answer
    assert world.joins(auth["client"]) == {outcome: 1}
    count = world.metrics.registry.get_sample_value(
        "lesson_event_seconds_count", {"event": "join_lesson", "client": auth["client"]}
    )
    assert count == 1
    assert caplog.records == []  # a refusal is no error of ours


@pytest.mark.gen_test
async def test_a_join_is_observed_with_its_seconds():
    world = World()
    await world.connect("sid", GUEST)
    started = time.perf_counter()
    await world.join("sid")
    seconds = world.metrics.registry.get_sample_value(
        "lesson_event_seconds_sum", {"event": "join_lesson", "client": "participant"}
    )
    assert 0 < seconds < time.perf_counter() - started


@pytest.mark.parametrize(
    ("error", "answer", "outcome"),
    [(store_down(), UNAVAILABLE, "store_unavailable"), (OSError("disk"), INTERNAL_ERROR, "internal_error")],
    ids=["store", "unforeseen"],
)
@pytest.mark.gen_test
async def test_a_join_that_fails_is_counted_by_its_outcome(error, answer, outcome):
    world = World()
    await world.connect("sid", GUEST)
    world.faults.fail_at("lessons.get", error)
    assert await world.join("sid") == answer
    assert world.joins("participant") == {outcome: 1}


@pytest.mark.gen_test
async def test_a_join_whose_client_went_is_counted_as_that_and_is_no_error_of_ours(caplog):
    world = World()
    await world.connect("sid", GUEST)
    hold = world.faults.hold_at("lessons.get")
    join = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    end = asyncio.create_task(world.disconnect("sid"))
    await settle()
    hold.release()
    await end
    assert await join is None
    assert world.joins("participant") == {"disconnected": 1}
    assert caplog.records == []


@pytest.mark.parametrize(
    "data", [({},), ("1",), (0,), (False,), ([],), (None, None), ({"lesson_id": "2"},), ("", None)], ids=repr
)
@pytest.mark.gen_test
async def test_a_join_with_data_is_refused_and_nothing_is_done(data):
    world = World()
    connection = await world.connect("sid", GUEST)
    assert await world.join("sid", *data) == {"status": "ERROR", "message": "join_lesson takes no data"}
    assert connection.state == "connected"
    assert world.faults.passed == []
    assert world.joins("participant") == {"unexpected_data": 1}


@pytest.mark.parametrize("data", [(), (None,)], ids=["nothing", "one null"])
@pytest.mark.gen_test
async def test_no_data_or_one_null_joins(data):
    world = World()
    await world.connect("sid", GUEST)
    assert await world.join("sid", *data) == SUCCESS


@pytest.mark.parametrize("retryable", [store_down(), RuntimeError("unforeseen")], ids=["store", "unforeseen"])
@pytest.mark.gen_test
async def test_after_an_error_the_client_may_try_again_on_the_same_connection(retryable):
    world = World()
    connection = await world.connect("sid", PARTICIPANT)
    world.faults.fail_at("presence.write, done", retryable)
    assert (await world.join("sid"))["status"] == "ERROR"
    assert connection.state == "connected"
    assert await world.join("sid") == SUCCESS
    assert connection.state == "registered"


@pytest.mark.gen_test
async def test_a_lesson_that_is_made_later_can_be_joined_then():
    world = World()
    await world.connect("sid", {**GUEST, "lesson_id": "9"})
    assert (await world.join("sid"))["message"] == "lesson 9 not found"
    world.lessons.seat_counts["9"] = 1
    assert await world.join("sid") == SUCCESS


# Two at once


async def two_joins(world: World, point: str, error: Exception | None = None) -> list[object]:
    """The answers to two joins of one connection, the second of which arrives while the first is at ``point``."""
    await world.connect("sid", PARTICIPANT)
    hold = world.faults.hold_at(point)
    joins = [asyncio.create_task(world.join("sid")) for _ in range(2)]
    await hold.reached.wait()
    await settle()
    assert not any(join.done() for join in joins)
    hold.release(error)
    return [await join for join in joins]


@pytest.mark.gen_test
async def test_two_joins_in_flight_are_one_join_and_two_successes():
    world = World()
    assert await two_joins(world, "presence.write") == [SUCCESS, SUCCESS]
    assert world.faults.passed.count("lessons.get") == 1
    assert len(world.presence.written) == 1
    assert not [point for point in world.faults.passed if point.startswith(("lessons.get #", "presence.write #"))]
    assert world.analytics.reconnects == []


@pytest.mark.gen_test
async def test_two_joins_in_flight_that_fail_are_two_errors_and_nothing_is_left():
    world = World()
    assert await two_joins(world, "presence.write, done", store_down()) == [UNAVAILABLE, UNAVAILABLE]
    assert join_of(world.gateway.connections["sid"]).state == "connected"
    assert world.held_by("sid") == []


@pytest.mark.gen_test
async def test_a_join_that_arrives_on_the_way_back_gets_the_same_answer():
    world = World()
    await world.connect("sid", PARTICIPANT)
    world.faults.fail_at("presence.write", store_down())
    hold = world.faults.hold_at("presence.remove")
    joins = [asyncio.create_task(world.join("sid"))]
    await hold.reached.wait()
    joins.append(asyncio.create_task(world.join("sid")))
    await settle()
    hold.release()
    assert [await join for join in joins] == [UNAVAILABLE, UNAVAILABLE]


@pytest.mark.gen_test
async def test_a_waiting_join_that_is_cancelled_breaks_no_other():
    world = World()
    await world.connect("sid", PARTICIPANT)
    hold = world.faults.hold_at("seats.ensure_map")
    first, second, third = (asyncio.create_task(world.join("sid")) for _ in range(3))
    await hold.reached.wait()
    await settle()
    second.cancel()
    await settle()
    assert second.cancelled()
    hold.release()
    assert [await first, await third] == [SUCCESS, SUCCESS]


@pytest.mark.gen_test
async def test_a_running_join_that_is_cancelled_leaves_no_other_waiting():
    """Only a shutdown does that; there is no answer then, but an end."""
    world = World()
    await world.connect("sid", PARTICIPANT)
    world.faults.hang_at("seats.ensure_map")
    first, second = (asyncio.create_task(world.join("sid")) for _ in range(2))
    await settle()
    first.cancel()
    assert await second is None
    assert first.cancelled()
    assert await world.join("sid") == SUCCESS  # what was left of it


@pytest.mark.gen_test
async def test_joins_of_different_connections_do_not_wait_for_each_other():
    world = World()
    await world.connect("a", PARTICIPANT)
    await world.connect("b", TEACHER)
    world.faults.hang_at("lessons.get")
    waiting = asyncio.create_task(world.join("a"))
    await settle()
    assert await world.join("b") == SUCCESS
    waiting.cancel()


# Whatever happens


@pytest.mark.gen_test
async def test_a_join_that_hangs_is_answered_in_time_and_logged(caplog):
    world = World(events=[replace(JOIN_LESSON, deadline=0.02)])
    await world.connect("sid", GUEST)
    world.faults.hang_at("lessons.get")
    async with asyncio.timeout(1):
        assert await world.join("sid") == UNAVAILABLE
    [record] = caplog.records
    assert record.getMessage() == (
        "<join_lesson of participant sid lesson 1 connected> failed: the stores: not done within 0.02 s"
    )


def test_the_deadline_leaves_time_to_give_back_within_the_five_seconds_of_the_contract():
    assert DEADLINE + REMOVAL_PATIENCE < 5


@pytest.mark.gen_test
async def test_a_defect_is_told_to_the_log_and_not_to_the_client(caplog):
    world = World()
    await world.connect("sid-7", PARTICIPANT)
    world.faults.fail_at("seats.ensure_map", RuntimeError("a secret of ours"))
    assert await world.join("sid-7") == INTERNAL_ERROR
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "sid-7" in record.getMessage()
    assert (record.event, record.fields) == (
        "event_failed",
        {
            "socketio_event": "join_lesson",
            "client": "participant",
            "sid": "sid-7",
            "lesson_id": "1",
            "state": "lesson_validated",
        },
    )
    assert record.exc_info[0] is RuntimeError
    assert record.exc_info[2] is not None


@pytest.mark.gen_test
async def test_a_join_that_the_chart_refuses_is_a_defect_while_its_client_is_there(caplog):
    world = World()
    connection = await world.connect("sid", GUEST)
    hold = world.faults.hold_at("lessons.get")
    join = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    other = asyncio.create_task(connection.fire("seat"))  # nobody but the join should do that
    await settle()
    hold.release()
    assert await join == INTERNAL_ERROR
    assert await other
    (record,) = caplog.records
    assert record.exc_info[0] is InvalidTransition


@pytest.mark.gen_test
async def test_no_token_gets_into_the_log(caplog):
    caplog.set_level(logging.DEBUG)
    world = World()
    secret = "student:p-secret"
    connection = await world.connect("sid", {**PARTICIPANT, "access_token": secret})
    for point in ("sockets.leave_room", "lessons.get", "sockets.enter_room", "presence.write"):
        world.faults.fail_at(point, RuntimeError("unforeseen"))
    for _ in range(3):
        assert await world.join("sid") == INTERNAL_ERROR
    await world.disconnect("sid")
    formatters = logging.Formatter(), JsonFormatter()
    formatted = [formatter.format(record) for record in caplog.records for formatter in formatters]
    assert len(formatted) == 2 * 4
    assert not [line for line in formatted if secret in line]
    assert secret not in repr(connection)


@pytest.mark.gen_test
async def test_a_join_of_a_connection_that_is_gone_has_no_answer():
    world = World()
    await world.connect("sid", GUEST)
    await world.disconnect("sid")
    assert await world.join("sid") is None
    assert await world.join("never-seen") is None
    assert await world.join("never-seen", "data") is None


@pytest.mark.gen_test
async def test_the_end_of_a_connection_that_was_refused_is_nothing():
    await World().gateway.disconnect("never-seen", "transport close")


@pytest.mark.gen_test
async def test_nothing_is_kept_of_what_is_over():
    world = World()
    for sid in ("a", "b", "c"):
        await world.connect(sid, PARTICIPANT)
        await world.join(sid)
        await world.disconnect(sid)
    assert world.gateway.connections == {}
    assert world.gateway._running == {}


# Admission

BUSY = "the lesson service is busy, try again"


@pytest.mark.gen_test
async def test_a_handshake_that_is_one_too_many_is_told_so_and_leaves_no_connection():
    world = World(admission=Admission(1, 0, {"join_lesson": 0}))
    await world.connect("first", PARTICIPANT)
    with pytest.raises(ConnectionRefusedError) as refused:
        await world.connect("second", PARTICIPANT)
    assert refused.value.error_args == {"message": BUSY}
    assert world.metrics.registry.get_sample_value("lesson_handshakes_refused_total", {"reason": "busy"}) == 1
    await world.disconnect("first")
    await world.connect("third", PARTICIPANT)
    assert list(world.gateway.connections) == ["third"]


@pytest.mark.gen_test
async def test_a_join_that_comes_too_fast_is_told_so_and_one_that_is_done_is_never_refused():
    world = World(admission=Admission(10, 0, {"join_lesson": 0.001}))
    first, second = await world.connect("first", PARTICIPANT), await world.connect("second", TEACHER)
    assert await world.join("first") == SUCCESS
    assert await world.join("second") == {"status": "ERROR", "message": BUSY}
    assert (second.state, world.held_by("second")) == ("connected", [])
    assert await world.join("first") == SUCCESS
    assert first.state == "registered"
    assert world.joins("teacher") == {"busy": 1}


# What Redis has lost


@pytest.mark.gen_test
async def test_what_redis_has_lost_is_written_again_and_it_is_no_reconnect():
    world = World()
    for sid, auth in (("teacher", TEACHER), ("participant", PARTICIPANT), ("guest", GUEST), ("idle", PARTICIPANT)):
        await world.connect(sid, auth)
        if sid != "idle":
            await world.join(sid)
    before = world.snapshot()
    world.redis.flushall()
    assert await world.gateway.restore(["teacher", "participant", "guest", "idle", "gone"]) == 3
    assert world.snapshot() == before
    assert join_of(world.gateway.connections["idle"]).state == "connected"


@pytest.mark.gen_test
async def test_those_who_are_present_are_registered_and_a_seat_map_has_somebody_in_its_lesson():
    world = World()
    world.lessons.seat_counts["single"] = 1
    for sid, auth in (
        ("idle", {**PARTICIPANT, "lesson_id": "2"}),
        ("guest", GUEST),
        ("participant", PARTICIPANT),
        ("no seats", {**PARTICIPANT, "lesson_id": "0"}),
        ("one seat", {**GUEST, "lesson_id": "single"}),
    ):
        await world.connect(sid, auth)
        if sid != "idle":
            await world.join(sid)
    assert world.gateway.present() == ["participant", "no seats"]
    assert world.gateway.seated() == {"1": ["guest", "participant"], "single": ["one seat"]}
    await world.disconnect("participant")
    assert world.gateway.present() == ["no seats"]
    assert world.gateway.seated() == {"1": ["guest"], "single": ["one seat"]}


@pytest.mark.gen_test
async def test_who_has_taken_a_seat_and_not_left_it_has_one_that_redis_should_know():
    world = World()
    for sid, auth in (("participant", PARTICIPANT), ("guest", GUEST), ("teacher", TEACHER)):
        await world.connect(sid, auth)
        await world.join(sid)
    assert world.gateway.holders() == {}
    await send(world, "take_seat", "participant", {"seat": 2})
    assert world.gateway.holders() == {"participant": ("1", "p-1")}
    await send(world, "leave_seat", "participant")
    assert world.gateway.holders() == {}


@pytest.mark.gen_test
async def test_a_connection_whose_join_failed_needs_no_seat_map():
    world = World()
    await world.connect("sid", PARTICIPANT)
    world.faults.fail_at("presence.write", store_down())
    assert await world.join("sid") == UNAVAILABLE
    assert world.gateway.seated() == {}
