"""The charts of join_lesson are those of the contract and of the two diagrams."""

import pytest

from statecharts.join_lesson import participant, teacher

CHARTS = [teacher, participant]

every_chart = pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.CLIENT)


def row_of(chart, trigger, state):
    (row,) = [row for row in chart.TRANSITIONS if (row["trigger"], row["source"]) == (trigger, state)]
    return row


@every_chart
def test_the_states_are_those_of_the_contract(chart):
    assert list(chart.STATES) == ["connected", "lesson_validated", "seated", "registered", "disconnected"]


def test_the_charts_differ_in_the_step_that_registers_and_in_what_their_states_say():
    constants = ("EVENT", "INITIAL", "FINAL", "PATH", "SEATED", "PRESENT")
    assert [getattr(teacher, name) for name in constants] == [getattr(participant, name) for name in constants]
    assert list(teacher.STATES) == list(participant.STATES)
    different = [
        (mine, theirs)
        for mine, theirs in zip(teacher.TRANSITIONS, participant.TRANSITIONS, strict=True)
        if mine != theirs
    ]
    assert [mine["trigger"] for mine, _ in different] == ["register", "restore"]
    _, (_, restore_participant) = different
    assert restore_participant["before"] == [*row_of(teacher, "restore", "registered")["before"], "restore_seat"]


BOTH = [
    "check_lesson_exists",
    "check_access_token",  # errors are tried in the order of the diagram, and a bad token never enters the room
    "enter_room",
    "get_seat",
    "get_session",
    "add_seat",
    "save_session",
    "ensure_seat_map",
]


@pytest.mark.parametrize(
    ("chart", "arrows"),
    [
        (teacher, [*BOTH, "set_teacher_presence"]),
        (participant, [*BOTH, "get_client_id", "save_client", "set_client_presence", "report_reconnect"]),
    ],
    ids=["teacher", "participant"],
)
def test_the_steps_are_the_arrows_of_the_diagram_in_its_order(chart, arrows):
    path = [row_of(chart, trigger, state) for trigger, state in zip(chart.PATH, chart.STATES, strict=False)]
    assert [step for row in path for step in row["before"]] == arrows


CLEANED_UP_BY = {
    "enter_room": "leave_room",
    "save_session": "clear_session",
    "save_client": "clear_session",
    "set_teacher_presence": "undo_presence",
    "set_client_presence": "undo_presence",
}


@every_chart
def test_a_way_out_cleans_up_what_was_done_even_by_a_step_that_failed(chart):
    done: set[str] = set()
    for trigger, state in zip((*chart.PATH, None), chart.STATES, strict=False):
        held = set(done)
        if trigger is not None:
            steps = row_of(chart, trigger, state)["before"]
            done |= {CLEANED_UP_BY[step] for step in steps if step in CLEANED_UP_BY}
            assert set(row_of(chart, "abandon", state)["before"]) == done
        # The session ends with its transport; and a room is entered within the process, so not by half. The presence of
        # a connection that is there is removed; that of one whose join did not come to its end is undone.
        presence = {"remove_presence"} if state in chart.PRESENT else done & {"undo_presence"}
        end = row_of(chart, "disconnect", state)
        assert set(end.get("before", [])) == held - {"clear_session", "undo_presence"} | presence
        assert row_of(chart, "remove", state)["before"] == [*end.get("before", []), "close_connection"]


def test_only_a_participant_without_a_token_stays_seated():
    conditional = [
        (chart, row["trigger"], row["conditions"])
        for chart in CHARTS
        for row in chart.TRANSITIONS
        if row.get("conditions")
    ]
    assert conditional == [(participant, "register", ["has_access_token"])]
    assert (participant.GUEST, teacher.GUEST) == (("seated",), ())
    assert (participant.RESTING, teacher.RESTING) == (("seated", "registered"), ("registered",))
