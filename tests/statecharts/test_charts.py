"""The charts of all events: sound by themselves, literal, and the only way by which a connection changes its state.

Everything here goes over the registry of events, and over one event that only the tests know.
"""

import ast
import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest
from fakes import World
from toy_event import RAISE_HAND

from lesson_server.errors import InvalidTransition
from lesson_server.events.connection import Region
from lesson_server.events.machine import Chart, ChartMachine
from lesson_server.events.registry import EVENTS

ALL_EVENTS = (*EVENTS, RAISE_HAND)
REGIONS = [cls for event in ALL_EVENTS for cls in event.regions.values()]
CHARTS = [cls.CHART for cls in REGIONS]

every_chart = pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: f"{chart.EVENT}-{chart.CLIENT}")
every_region = pytest.mark.parametrize("cls", REGIONS, ids=lambda cls: cls.__name__)


def all_rows(chart: Chart) -> list[dict[str, Any]]:
    return chart.TRANSITIONS


def triggers(chart: Chart) -> list[str]:
    return sorted({row["trigger"] for row in all_rows(chart)})


def rows(chart: Chart, trigger: str, state: str) -> list[dict[str, Any]]:
    return [row for row in all_rows(chart) if (row["trigger"], row["source"]) == (trigger, state)]


def names(chart: Chart) -> set[str]:
    """The methods that the rows of a chart name."""
    return {name for row in all_rows(chart) for kind in ("before", "conditions") for name in row.get(kind, [])}


# Sound


@every_chart
def test_every_row_leads_from_a_state_to_a_state(chart):
    for row in chart.TRANSITIONS:
        assert {row["source"], row["dest"]} <= chart.STATES.keys()


@every_chart
def test_every_row_has_known_keys_only(chart):
    """``after``, ``unless`` or a misspelt ``befor`` would be run or ignored without a word in the drawing."""
    for row in chart.TRANSITIONS:
        assert row.keys() <= {"trigger", "source", "dest", "conditions", "before"}


@every_chart
def test_every_state_is_reachable(chart):
    reached = {chart.INITIAL}
    while more := {row["dest"] for row in chart.TRANSITIONS if row["source"] in reached} - reached:
        reached |= more
    assert reached == chart.STATES.keys()


@every_chart
def test_one_row_at_most_for_a_trigger_in_a_state(chart):
    for trigger in triggers(chart):
        for state in chart.STATES:
            assert len(rows(chart, trigger, state)) <= 1


@every_chart
def test_the_path_is_a_walk_from_the_initial_state(chart):
    state = chart.INITIAL
    for trigger in chart.PATH:
        (row,) = rows(chart, trigger, state)
        state = row["dest"]
    assert state not in chart.FINAL


@every_chart
def test_every_state_but_the_final_ones_can_end_and_a_final_one_has_no_way_out(chart):
    ends = {row["source"]: row["dest"] for row in chart.TRANSITIONS if row["trigger"] == "disconnect"}
    assert ends.keys() == chart.STATES.keys() - set(chart.FINAL)
    assert set(ends.values()) == set(chart.FINAL)
    assert not [row for row in chart.TRANSITIONS if row["source"] in chart.FINAL]


@every_chart
def test_an_event_that_failed_on_its_way_leads_back_to_the_beginning(chart):
    state, backs = chart.INITIAL, set()
    for trigger in chart.PATH:
        (row,) = rows(chart, trigger, state)
        if state != chart.INITIAL:
            (back,) = rows(chart, "abandon", state)
            assert back["dest"] == chart.INITIAL
        backs.add(state)
        state = row["dest"]
    assert {row["source"] for row in chart.TRANSITIONS if row["trigger"] == "abandon"} <= backs


@every_chart
def test_a_constant_names_states_of_the_chart_and_every_state_has_its_sentence(chart):
    assert {chart.INITIAL, *chart.FINAL, *chart.PRESENT, *chart.SEATED, *chart.RESTING} <= chart.STATES.keys()
    assert set(chart.GUEST) <= set(chart.RESTING)
    assert all(sentence.endswith(".") for sentence in chart.STATES.values())


# Literal


@every_chart
def test_charts_are_literal(chart):
    """Constants in containers, assigned to names: nothing imported, computed, looped over or hidden behind a ``*``."""
    docstring, *statements = ast.parse(Path(chart.__file__).read_text()).body
    assert isinstance(docstring, ast.Expr)
    for statement in statements:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        for node in ast.walk(statement.value):
            assert isinstance(node, ast.Constant | ast.Dict | ast.List | ast.Tuple | ast.Load), ast.unparse(node)
            assert not (isinstance(node, ast.Constant) and node.value == "*")


def test_no_state_is_named_outside_of_its_chart():
    """What the code must know of a state is a constant of the chart."""
    package = Path(__file__).parents[2] / "lesson_server"
    states = {state for event in EVENTS for cls in event.regions.values() for state in cls.CHART.STATES}
    own_words = {"connected", "disconnected"}  # of sockets too, and of a metric's label
    for path in package.rglob("*.py"):
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not texts & (states - own_words), path


@every_region
def test_every_name_in_a_chart_is_a_method_of_its_region(cls):
    """A misspelt step would be found only when a client gets there."""
    for name in names(cls.CHART):
        assert callable(getattr(cls, name))
        assert list(inspect.signature(getattr(cls, name)).parameters)[1:] == []


def test_every_public_method_of_a_region_is_named_by_a_chart():
    """So there is no logic of an event beside its charts."""
    named = {cls: names(cls.CHART) for cls in REGIONS}
    for base in {base for cls in REGIONS for base in cls.__mro__} - set(Region.__mro__):
        public = {name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")}
        steps = set().union(*(named[cls] for cls in REGIONS if issubclass(cls, base)))
        assert public - vars(Region).keys() <= steps, base


# Every state, every trigger


class Recorder:
    """A model that takes every step and notes its name; a test may have one of them fail."""

    def __init__(self, state: str, failing: str = "", error: BaseException | None = None) -> None:
        self.state = state
        self.history: tuple[str, ...] = ()
        self.steps: list[str] = []
        self._failing, self._error = failing, error

    def has_access_token(self) -> bool:
        return True

    def __getattr__(self, step: str):
        def take() -> None:
            self.steps.append(step)
            if step == self._failing:
                raise self._error

        return take


def machine(cls: type[Region]) -> ChartMachine:
    return ChartMachine(cls.CHART, lambda *_: None)


def cells(*, drawn: bool) -> list[object]:
    """The cells of the table of states and triggers for which the chart has a row, or has none."""
    return [
        pytest.param(cls, state, trigger, id=f"{cls.__name__}-{state}-{trigger}")
        for cls in REGIONS
        for state in cls.CHART.STATES
        for trigger in triggers(cls.CHART)
        if bool(rows(cls.CHART, trigger, state)) == drawn
    ]


def steps() -> list[object]:
    return [
        pytest.param(cls, row, step, id=f"{cls.__name__}-{row['source']}-{row['trigger']}-{step}")
        for cls in REGIONS
        for row in all_rows(cls.CHART)
        for step in row.get("before", ())
    ]


@pytest.mark.gen_test
@pytest.mark.parametrize(("cls", "state", "trigger"), cells(drawn=True))
async def test_a_trigger_that_is_drawn_takes_its_steps_in_order_and_moves(cls, state, trigger):
    model = Recorder(state)
    assert await machine(cls).fire(model, trigger) is True
    (row,) = rows(cls.CHART, trigger, state)
    assert (model.state, model.steps) == (row["dest"], row.get("before", []))


@pytest.mark.gen_test
@pytest.mark.parametrize("error", [OSError("broken"), asyncio.CancelledError()], ids=["fails", "cancelled"])
@pytest.mark.parametrize(("cls", "row", "step"), steps())
async def test_a_step_that_fails_or_is_cancelled_keeps_the_state_and_stops_the_later_ones(cls, row, step, error):
    model = Recorder(row["source"], step, error)
    with pytest.raises(type(error)):
        await machine(cls).fire(model, row["trigger"])
    assert model.state == row["source"]
    assert model.steps == row["before"][: row["before"].index(step) + 1]


@pytest.mark.gen_test
@pytest.mark.parametrize(("cls", "state", "trigger"), cells(drawn=False))
async def test_a_trigger_that_is_not_drawn_is_refused_and_nothing_has_changed(cls, state, trigger):
    world = World(events=ALL_EVENTS)
    await world.connect("sid", {"client": cls.CHART.CLIENT, "lesson_id": "1"})
    region = world.gateway.connections["sid"].region(cls)
    region.state = state
    holdings = world.snapshot()
    with pytest.raises(InvalidTransition) as refused:
        await region.fire(trigger)
    assert (refused.value.trigger, refused.value.state) == (trigger, state)
    assert (region.state, region.history) == (state, ())
    assert (world.snapshot(), world.faults.passed) == (holdings, [])
