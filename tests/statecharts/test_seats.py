"""The charts of take_seat and leave_seat are those of the contract, section 12."""

import pytest

from statecharts.leave_seat import participant as leaving
from statecharts.leave_seat import teacher as leaving_teacher
from statecharts.take_seat import participant as taking
from statecharts.take_seat import teacher as taking_teacher


@pytest.mark.parametrize(
    ("chart", "steps"),
    [
        # The client is checked before the data: the order of the contract's table.
        (taking, ["check_joined", "check_access_token", "check_data", "get_session", "set_seat"]),
        (leaving, ["check_joined", "check_access_token", "check_data", "get_session", "clear_seat"]),
        (taking_teacher, ["check_joined", "check_participant"]),
        (leaving_teacher, ["check_joined", "check_participant"]),
    ],
    ids=["take_seat-participant", "leave_seat-participant", "take_seat-teacher", "leave_seat-teacher"],
)
def test_the_steps_are_the_arrows_of_the_diagram_in_its_order(chart, steps):
    (event,) = [row for row in chart.TRANSITIONS if row["trigger"] == chart.EVENT]
    assert (event["source"], event["dest"], event["before"]) == (chart.INITIAL, chart.INITIAL, steps)
    assert chart.PATH == (chart.EVENT,)
