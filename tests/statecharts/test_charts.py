"""The charts: sound by themselves, literal, in the order of the diagrams, and the only way by which a connection moves.

The rule of design.md about who may import whom stands here too: it keeps the charts pure.
"""

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest
from fakes import World

import statecharts.participant
import statecharts.teacher
from lesson_server.errors import InvalidTransition
from lesson_server.events.connection import Connection, ParticipantConnection, TeacherConnection

ROOT = Path(__file__).parents[2]
CHARTS = [statecharts.teacher, statecharts.participant]
KINDS = [TeacherConnection, ParticipantConnection]
AUTHS = {
    TeacherConnection: {"client": "teacher", "lesson_id": "1", "access_token": "teacher:t-1"},
    ParticipantConnection: {"client": "participant", "lesson_id": "1", "access_token": "student:p-1"},
}

every_chart = pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.CLIENT)


def triggers(chart: ModuleType) -> list[str]:
    return sorted({row["trigger"] for row in chart.TRANSITIONS})


def rows(chart: ModuleType, trigger: str, state: str) -> list[dict]:
    return [row for row in chart.TRANSITIONS if (row["trigger"], row["source"]) == (trigger, state)]


def names(chart: ModuleType, *lists: str) -> set[str]:
    """The methods that the lists of the chart's rows name."""
    return {name for row in chart.TRANSITIONS for kind in lists for name in row.get(kind, [])}


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
def test_the_join_is_a_walk_from_the_initial_state(chart):
    state = chart.INITIAL
    for trigger in chart.JOIN:
        (row,) = [row for row in chart.TRANSITIONS if row["trigger"] == trigger]
        assert row["source"] == state
        state = row["dest"]
    assert state == "registered"


@every_chart
def test_every_state_but_the_last_can_end_and_the_last_is_final(chart):
    ends = {row["source"] for row in chart.TRANSITIONS if row["trigger"] == "disconnect"}
    assert ends == chart.STATES.keys() - {"disconnected"}
    assert not [row for row in chart.TRANSITIONS if row["source"] == "disconnected"]


@every_chart
def test_a_join_that_failed_on_its_way_leads_back_to_the_beginning(chart):
    backs = {row["source"]: row["dest"] for row in chart.TRANSITIONS if row["trigger"] == "abandon"}
    assert backs == dict.fromkeys(("connected", "lesson_validated", "seated"), chart.INITIAL)


@every_chart
def test_states_are_those_of_the_contract_each_with_its_sentence(chart):
    assert list(chart.STATES) == ["connected", "lesson_validated", "seated", "registered", "disconnected"]
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


# The steps

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
        (statecharts.teacher, [*BOTH, "set_teacher_presence"]),
        (
            statecharts.participant,
            [*BOTH, "get_client_id", "save_client", "set_client_presence", "report_reconnect"],
        ),
    ],
    ids=["teacher", "participant"],
)
def test_the_steps_of_a_join_are_the_arrows_of_the_diagram_in_its_order(chart, arrows):
    join = [rows(chart, trigger, state)[0] for trigger, state in zip(chart.JOIN, chart.STATES, strict=False)]
    assert [step for row in join for step in row["before"]] == arrows


GIVEN_BACK_BY = {
    "enter_room": "leave_room",
    "save_session": "clear_session",
    "save_client": "clear_session",
    "set_teacher_presence": "undo_presence",
    "set_client_presence": "undo_presence",
}


@every_chart
def test_a_way_out_gives_back_what_was_taken_even_by_a_step_that_failed(chart):
    taken: set[str] = set()
    for trigger, state in zip((*chart.JOIN, None), chart.STATES, strict=False):
        held = set(taken)
        taken |= {
            GIVEN_BACK_BY[step]
            for row in rows(chart, trigger, state)
            for step in row["before"]
            if step in GIVEN_BACK_BY
        }
        for row in rows(chart, "abandon", state):
            assert set(row["before"]) == taken
        # The session ends with its transport; and a room is entered within the process, so not by half. The presence of
        # a connection that is there is removed; that of one whose join did not come to its end is undone.
        (end,) = rows(chart, "disconnect", state)
        presence = {"remove_presence"} if state in chart.PRESENT else taken & {"undo_presence"}
        assert set(end.get("before", [])) == held - {"clear_session", "undo_presence"} | presence


def test_only_a_participant_without_a_token_stays_seated():
    conditional = [
        (chart, row["trigger"], row["conditions"])
        for chart in CHARTS
        for row in chart.TRANSITIONS
        if row.get("conditions")
    ]
    assert conditional == [(statecharts.participant, "register", ["has_access_token"])]


@every_kind
def test_every_name_in_a_chart_is_a_method_of_its_connection(kind):
    """A misspelt step would be found only when a client gets there."""
    for name in names(kind.CHART, "before", "conditions"):
        assert callable(getattr(kind, name))
        assert list(inspect.signature(getattr(kind, name)).parameters) == ["self"]


@pytest.mark.parametrize(
    ("cls", "charts"),
    [(Connection, CHARTS), *((kind, [kind.CHART]) for kind in KINDS)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_public_method_of_a_connection_is_named_by_a_chart(cls, charts):
    """So there is no join logic beside the charts. ``fire`` and ``join`` are the doors to it."""
    public = {name for name, value in vars(cls).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert public - {"fire", "join"} <= set().union(*(names(chart, "before", "conditions") for chart in charts))


# Every state, every trigger


class Recorder:
    """A model that takes every step and notes its name."""

    story = ()

    def __init__(self, state: str) -> None:
        self.state = state
        self.steps: list[str] = []

    def has_access_token(self) -> bool:
        return True

    def __getattr__(self, step: str):
        return lambda: self.steps.append(step)


def cells(*, drawn: bool) -> list[object]:
    """The cells of the table of states and triggers for which the chart has a row, or has none."""
    return [
        pytest.param(kind, state, trigger, id=f"{kind.CLIENT}-{state}-{trigger}")
        for kind in KINDS
        for state in kind.CHART.STATES
        for trigger in triggers(kind.CHART)
        if bool(rows(kind.CHART, trigger, state)) == drawn
    ]


@pytest.mark.gen_test
@pytest.mark.parametrize(("kind", "state", "trigger"), cells(drawn=True))
async def test_a_trigger_that_is_drawn_takes_its_steps_in_order_and_moves(kind, state, trigger):
    machine = World().gateway._machines[kind]
    model = Recorder(state)
    assert await machine.fire(model, trigger) is True
    (row,) = rows(kind.CHART, trigger, state)
    assert (model.state, model.steps) == (row["dest"], row.get("before", []))


@pytest.mark.gen_test
@pytest.mark.parametrize(("kind", "state", "trigger"), cells(drawn=False))
async def test_a_trigger_that_is_not_drawn_is_refused_and_nothing_has_changed(kind, state, trigger):
    world = World()
    connection = await connection_in(world, kind, state)
    story, holdings, passed = connection.story, world.snapshot(), list(world.faults.passed)
    with pytest.raises(InvalidTransition) as refused:
        await connection.fire(trigger)
    assert (refused.value.trigger, refused.value.state) == (trigger, state)
    assert (connection.state, connection.story) == (state, story)
    assert (world.snapshot(), world.faults.passed) == (holdings, passed)


async def connection_in(world: World, kind: type[Connection], state: str) -> Connection:
    """A connection that was led to a state by its chart."""
    connection = await world.connect("sid", AUTHS[kind])
    if state == "disconnected":
        await world.disconnect("sid")
    else:
        for trigger in kind.CHART.JOIN[: list(kind.CHART.STATES).index(state)]:
            await connection.fire(trigger)
    assert connection.state == state
    return connection


# Who may import whom

# A room is a package, or a module beside the packages. It imports only from the lines above its own.
LAYERS = [
    {"__init__"},
    {"errors", "metrics", "tasks", "embedded"},
    {"settings"},
    {"stores", "identity", "analytics"},
    {"events", "protocol"},
    {"gateway", "http"},
    {"server"},
    {"cli"},
]

# Who may know a library. The embedded set-up makes the stores, so it knows how to speak to them.
OWNERS = {
    "transitions": {"events/machine", "events/connection"},
    "socketio": {
        *("protocol/transport", "protocol/engine", "protocol/rooms", "protocol/local_rooms"),
        *("gateway/gateway", "server"),
    },
    "engineio": {"protocol/transport", "gateway/gateway", "server", "protocol/engine"},
    "picows": {"protocol/websocket", "protocol/engine"},
    "aiopg": {"stores/rds/rds", "stores/rds/mended_aiopg"},
    "psycopg2": {"stores/rds/rds", "stores/rds/lesson_query", "stores/rds/lesson_table", "embedded/embedded"},
    "redis": {"stores/redis/redis_store", "stores/redis/redis_shard", "embedded/embedded"},
    "hiredis": {"stores/redis/redis_shard"},
    "jwt": {"identity"},
    "mixpanel": {"analytics"},
    "statecharts": {"events/connection"},
}

PACKAGE = ROOT / "lesson_server"
MODULES = {str(path.relative_to(PACKAGE).with_suffix("")): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it: ``redis``, ``lesson_server.errors``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            # ``from lesson_server.embedded import processes`` imports a module, others import names of one.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if is_module(name)} or {node.module}
    return found


def is_module(name: str) -> bool:
    return ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()


def ours(path: Path) -> set[str]:
    """The modules of the server that a file imports: ``stores/redis/seats``."""
    names = {name.removeprefix("lesson_server.") for name in imports(path) if name.startswith("lesson_server.")}
    return {name.replace(".", "/") for name in names}


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def room(module: str) -> str:
    return module.partition("/")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_rooms_run_one_way(module):
    placed = [name for layer in LAYERS for name in layer]
    assert room(module) in placed, "a new room needs a place in LAYERS"
    (own,) = [rank for rank, layer in enumerate(LAYERS) if room(module) in layer]
    above = {name for layer in LAYERS[:own] for name in layer}
    assert {room(name) for name in ours(MODULES[module])} - {room(module)} <= above


def test_no_module_imports_itself_by_a_detour():
    left = {module: ours(path) & MODULES.keys() for module, path in MODULES.items()}
    while free := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in free}
    assert not left


@pytest.mark.parametrize("module", MODULES)
def test_each_library_has_its_owners(module):
    for package in packages(MODULES[module]) & OWNERS.keys():
        assert module in OWNERS[package], f"{module} imports {package}"


@every_chart
def test_a_chart_imports_nothing(chart):
    assert not imports(Path(chart.__file__))


@pytest.mark.parametrize("folder", ["scripts", "statecharts"])
def test_what_is_beside_the_server_imports_nothing_of_it(folder):
    """Scripts talk to the server as any client would; charts are drawn without it."""
    paths = list((ROOT / folder).glob("*.py"))
    assert paths
    for path in paths:
        assert "lesson_server" not in packages(path), path
