"""admission.py: how much one process takes on. The clock is the test's own."""

import pytest
from clock import Clock

from lesson_server.errors import ServiceBusy
from lesson_server.gateway import admission as admission_module
from lesson_server.gateway.admission import BURST, Admission, RateLimit


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(admission_module, "time", clock)
    return clock


def let_in(limit, tries):
    """How many of so many at once are let in."""
    count = 0
    for _ in range(tries):
        try:
            limit.take()
        except ServiceBusy:
            continue
        count += 1
    return count


def test_a_burst_is_let_in_after_a_quiet_time_and_then_the_rate(clock):
    limit = RateLimit(10)
    assert let_in(limit, 100) == 10 * BURST
    for _ in range(5):
        clock.now += 1
        assert let_in(limit, 100) == 10


def test_quiet_hours_save_up_no_more_than_a_burst(clock):
    limit = RateLimit(10)
    clock.now += 3_600
    assert let_in(limit, 100) == 10 * BURST


def test_the_refused_cost_nothing(clock):
    """A storm that keeps knocking must not lock out those whom the rate allows."""
    limit = RateLimit(1)
    let_in(limit, 10_000)
    clock.now += 1
    assert let_in(limit, 1) == 1


def test_a_rate_below_one_lets_somebody_in_from_time_to_time(clock):
    limit = RateLimit(0.1)
    assert let_in(limit, 5) == 1
    clock.now += 9.9
    assert let_in(limit, 5) == 0
    clock.now += 0.2
    assert let_in(limit, 5) == 1


def test_no_rate_is_no_limit(clock):
    assert let_in(RateLimit(0), 100_000) == 100_000


def test_connections_are_bounded_by_their_number_and_their_rate(clock):
    admission = Admission(max_connections=3, connect_rate=1, event_rates={})
    admission.admit_connection(held=2)
    with pytest.raises(ServiceBusy):
        admission.admit_connection(held=3)
    admission.admit_connection(held=0)  # the one that was too many has cost nothing
    with pytest.raises(ServiceBusy):
        admission.admit_connection(held=0)


def test_each_event_has_a_rate_of_its_own(clock):
    admission = Admission(max_connections=1, connect_rate=0.1, event_rates={"join_lesson": 1, "take_seat": 1})
    admission.admit_connection(held=0)
    admission.admit_event("join_lesson")
    admission.admit_event("join_lesson")
    with pytest.raises(ServiceBusy, match="the lesson service is busy, try again"):
        admission.admit_event("join_lesson")
    admission.admit_event("take_seat")
