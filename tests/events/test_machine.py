"""machine.py: what the ``transitions`` library would do otherwise."""

import asyncio
from types import SimpleNamespace

import pytest

from lesson_server.errors import InvalidTransition
from lesson_server.events.machine import ChartMachine

# A chart of its own, so that what is tested is the machine and not a join.
CHART = SimpleNamespace(
    STATES={"lying": "It lies.", "sitting": "It sits.", "standing": "It stands."},
    INITIAL="lying",
    PATH=("sit_up", "stand_up"),
    TRANSITIONS=[
        {"trigger": "sit_up", "source": "lying", "dest": "sitting", "before": ["wake", "stretch", "yawn"]},
        {
            "trigger": "stand_up",
            "source": "sitting",
            "dest": "standing",
            "conditions": ["is_rested", "is_willing"],
            "before": ["rise"],
        },
        {"trigger": "lie_down", "source": "standing", "dest": "lying"},
    ],
)


class Body:
    """A model. Its steps note when they begin and end; ``stretch`` waits until it is let go on."""

    def __init__(self, *, rested: bool = True) -> None:
        self.state = "lying"
        self.history = ("born",)
        self.notes: list[str] = []
        self.stretched = asyncio.Event()
        self.error: Exception | None = None
        self._rested = rested

    def wake(self) -> None:
        self.notes.append("wake")

    async def stretch(self) -> None:
        self.notes.append("stretch")
        await self.stretched.wait()
        if self.error is not None:
            raise self.error
        self.notes.append("stretched")

    async def yawn(self) -> None:
        self.notes.append("yawn")

    def rise(self) -> None:
        self.notes.append("rise")

    async def is_rested(self) -> bool:
        self.notes.append("is_rested")
        await asyncio.sleep(0)
        self.notes.append("rested")
        return self._rested

    def is_willing(self) -> bool:
        self.notes.append("is_willing")
        return True


@pytest.fixture
def observed():
    return []


@pytest.fixture
def machine(observed):
    return ChartMachine(CHART, lambda *step: observed.append(step))


@pytest.mark.gen_test
async def test_steps_run_in_order_each_after_the_end_of_the_one_before(machine):
    body = Body()
    sitting_up = asyncio.create_task(machine.fire(body, "sit_up"))
    await asyncio.sleep(0.01)
    assert (body.notes, body.state) == (["wake", "stretch"], "lying")
    body.stretched.set()
    assert await sitting_up is True
    assert (body.notes, body.state) == (["wake", "stretch", "stretched", "yawn"], "sitting")


@pytest.mark.gen_test
async def test_a_step_that_raises_keeps_the_state_and_stops_the_later_ones(machine):
    body = Body()
    body.stretched.set()
    body.error = OSError("cramp")
    with pytest.raises(OSError, match="cramp"):
        await machine.fire(body, "sit_up")
    assert (body.notes, body.state) == (["wake", "stretch"], "lying")


@pytest.mark.gen_test
async def test_a_cancellation_goes_through_to_the_caller(machine):
    """The library would return False, and a timeout or a shutdown would go unnoticed."""
    body = Body()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await machine.fire(body, "sit_up")
    assert (body.notes, body.state) == (["wake", "stretch"], "lying")


@pytest.mark.gen_test
async def test_a_second_trigger_does_not_cancel_the_first(machine):
    """The library would; that the second waits is the work of the connection's lock."""
    body = Body()
    first = asyncio.create_task(machine.fire(body, "sit_up"))
    await asyncio.sleep(0)
    with pytest.raises(InvalidTransition):
        await machine.fire(body, "lie_down")
    body.stretched.set()
    assert await first is True
    assert body.state == "sitting"


@pytest.mark.gen_test
async def test_a_condition_that_does_not_hold_keeps_the_state_and_runs_no_step(machine):
    body = Body(rested=False)
    body.state = "sitting"
    assert await machine.fire(body, "stand_up") is False
    assert body.state == "sitting"
    assert "rise" not in body.notes


@pytest.mark.gen_test
async def test_conditions_are_asked_one_after_the_other_before_the_steps(machine):
    body = Body()
    body.state = "sitting"
    assert await machine.fire(body, "stand_up") is True
    assert body.notes == ["is_rested", "rested", "is_willing", "rise"]


@pytest.mark.gen_test
async def test_a_refused_trigger_names_itself_the_state_and_the_history(machine):
    body = Body()
    with pytest.raises(InvalidTransition, match=r"^can't lie_down in state lying \(before: born\)$"):
        await machine.fire(body, "lie_down")
    assert (body.notes, body.state, body.history) == ([], "lying", ("born",))


@pytest.mark.gen_test
async def test_every_step_is_observed_with_its_seconds(machine, observed):
    body = Body()
    asyncio.get_running_loop().call_later(0.05, body.stretched.set)
    await machine.fire(body, "sit_up")
    assert [(step, error) for step, _, error in observed] == [("wake", None), ("stretch", None), ("yawn", None)]
    seconds = {step: seconds for step, seconds, _ in observed}
    assert seconds["wake"] < 0.04 <= seconds["stretch"] < 5


@pytest.mark.gen_test
async def test_a_step_that_fails_is_observed_too(machine, observed):
    body = Body()
    body.stretched.set()
    body.error = OSError("cramp")
    with pytest.raises(OSError, match="cramp"):
        await machine.fire(body, "sit_up")
    assert [(step, error) for step, _, error in observed] == [("wake", None), ("stretch", body.error)]


def test_a_machine_knows_the_states_and_triggers_of_its_chart_and_no_others(machine):
    """The library would add a state to begin in, and a trigger to each state from anywhere."""
    assert list(machine.states) == list(CHART.STATES)
    assert set(machine.events) == {row["trigger"] for row in CHART.TRANSITIONS}


@pytest.mark.gen_test
async def test_one_machine_moves_many_models_at_once_and_keeps_none(machine):
    bodies = [Body() for _ in range(3)]
    sitting_up = [asyncio.create_task(machine.fire(body, "sit_up")) for body in bodies[:2]]
    await asyncio.sleep(0)
    bodies[1].stretched.set()
    assert await sitting_up[1] is True
    assert [body.state for body in bodies] == ["lying", "sitting", "lying"]
    bodies[0].stretched.set()
    await sitting_up[0]
    assert machine.models == []


@pytest.mark.parametrize(
    ("state", "rest"), [("lying", ("sit_up", "stand_up")), ("sitting", ("stand_up",)), ("standing", ())]
)
def test_the_rest_of_the_path_is_what_its_state_has_not_done(machine, state, rest):
    assert machine.rest_of_path(state) == rest


def test_from_a_state_with_rows_for_several_triggers_of_the_path_the_first_is_fired():
    rows = [{"trigger": "sit_up", "source": "sitting", "dest": "sitting"}, *CHART.TRANSITIONS]
    machine = ChartMachine(SimpleNamespace(**{**vars(CHART), "TRANSITIONS": rows}), lambda *_: None)
    assert machine.rest_of_path("sitting") == ("sit_up", "stand_up")


@pytest.mark.gen_test
async def test_a_trigger_that_the_chart_does_not_have_at_all_is_refused_likewise(machine):
    with pytest.raises(InvalidTransition, match=r"^can't fly in state lying"):
        await machine.fire(Body(), "fly")


@pytest.mark.gen_test
async def test_a_key_error_of_a_step_is_not_taken_for_a_trigger_that_is_not_there(machine):
    body = Body()
    body.stretched.set()
    body.error = KeyError("sit_up")
    with pytest.raises(KeyError):
        await machine.fire(body, "sit_up")


@pytest.mark.gen_test
async def test_a_refused_step_leaves_no_line_of_the_library_in_the_log(machine, caplog):
    """The library logs an error for each exception that passes; a refused join is no error of ours."""
    body = Body()
    body.stretched.set()
    body.error = OSError("cramp")
    with pytest.raises(OSError, match="cramp"):
        await machine.fire(body, "sit_up")
    assert caplog.records == []
