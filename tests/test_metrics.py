"""metrics.py: names of metrics, and their values before anything has happened."""

import pytest

from lesson_server.metrics import Metrics


def values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_the_names_are_ours_or_those_of_the_process():
    families = [family.name for family in Metrics().registry.collect()]
    assert all(name.startswith(("lesson_", "process_", "python_")) for name in families)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("lesson_seats_changed_total", ["taken", "left", "freed", "restored"]),
        ("lesson_presence_corrections_total", ["swept", "restored", "removed"]),
        ("lesson_mixpanel_events_total", ["sent", "failed", "dropped"]),
    ],
)
def test_what_an_alert_or_a_panel_needs_begins_at_zero(name: str, labels: list[str]):
    assert values(Metrics(), name) == {(label,): 0 for label in labels}


def test_events_and_handshakes_begin_at_zero():
    metrics = Metrics()
    metrics.begin_at_zero([("join_lesson", "teacher"), ("take_seat", "teacher")], ["success", "busy"], ["busy"])
    assert values(metrics, "lesson_events_total") == {
        (event, "teacher", outcome): 0 for event in ("join_lesson", "take_seat") for outcome in ("success", "busy")
    }
    assert values(metrics, "lesson_handshakes_refused_total") == {("busy",): 0}


def test_a_drop_is_counted_by_its_reason_without_the_name_of_an_exception():
    metrics = Metrics()
    for why in ("slow reader", "malformed packet (ValueError)", "malformed packet (TypeError)"):
        metrics.observe_drop(why)
    assert values(metrics, "lesson_clients_dropped_total") == {("slow_reader",): 1, ("malformed_packet",): 2}
