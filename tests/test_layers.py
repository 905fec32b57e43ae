"""Who may import whom: design.md, "Rooms of the house"."""

import ast
from pathlib import Path

import pytest

from statecharts import export

ROOT = Path(__file__).parents[1]
CHARTS = export.find_charts()

# A room is a package, or a module beside the packages. It imports only from the lines above its own.
LAYERS = [
    {"__init__"},
    {"errors", "log", "metrics", "status", "tasks", "embedded"},
    {"settings"},
    {"stores", "tokens", "analytics", "sampler"},
    {"events", "protocol"},
    {"gateway"},
    {"http"},
    {"server"},
    {"cli"},
]

# Who may know a library. The embedded set-up makes the stores, so it knows how to speak to them.
OWNERS = {
    "transitions": {"events/machine"},
    "socketio": {
        *("protocol/transport", "protocol/engine", "protocol/rooms", "protocol/local_rooms"),
        *("gateway/handlers", "server"),
    },
    "engineio": {"protocol/transport", "gateway/handlers", "server", "protocol/engine"},
    "picows": {
        *("protocol/websocket", "protocol/websocket_handshake", "protocol/websocket_protocol"),
        "protocol/engine",
    },
    "aiopg": {"stores/rds/connections", "stores/rds/aiopg_patches"},
    "psycopg2": {"stores/rds/connections", "stores/rds/lesson_query", "stores/rds/lesson_admin", "embedded/postgresql"},
    "redis": {
        "stores/redis/receiver",
        "stores/redis/client",
        "stores/redis/shard",
        "stores/redis/pipelines",
        "embedded/valkey",
    },
    "hiredis": {"stores/redis/pipelines"},
    "jwt": {"tokens"},
    "mixpanel": {"analytics"},
    "opentelemetry": {"gateway/spans"},
    "statecharts": {"events/join_lesson", "events/take_seat", "events/leave_seat"},
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


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
def test_a_chart_imports_nothing(chart):
    assert not imports(Path(chart.__file__))


@pytest.mark.parametrize("folder", ["scripts", "statecharts"])
def test_what_is_beside_the_server_imports_nothing_of_it(folder):
    """Scripts talk to the server as any client would; charts are drawn without it."""
    paths = list((ROOT / folder).glob("*.py"))
    assert paths
    for path in paths:
        assert "lesson_server" not in packages(path), path
