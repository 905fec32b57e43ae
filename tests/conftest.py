"""Real stores for the tests: one PostgreSQL and one Valkey for the run, emptied before each test that uses them."""

import asyncio
import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import coverage
import jwt
import psycopg2
import pytest
import redis
import uvloop
from cluster import KEY
from configurations import WriteToml
from recorder import no_drift
from tornado.ioloop import IOLoop

from lesson_server.embedded.stores import EmbeddedStores
from lesson_server.events.event import Event
from lesson_server.events.registry import EVENTS
from lesson_server.server import LessonServer
from lesson_server.settings.schema import RdsSettings
from lesson_server.settings.sources import load
from lesson_server.stores.rds.connections import Rds
from lesson_server.stores.rds.lessons import Lessons

# The loop of `lesson-server run`.
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

# A job that a shell runs in the background ignores SIGINT, and so would the servers that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A test must see the settings that it makes, whatever the shell of the developer exports.
for name in [name for name in os.environ if name.startswith(("LESSON_", "OTEL_"))]:
    del os.environ[name]


# The files and folders of the tests that take seconds. They run first: at the end, no process of xdist waits long for
# the last test of the other.
LONG_TESTS = ("cli/", "end_to_end/", "faults/", "scripts/", "stores/redis/test_client.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that need stores, so that the others can be run without, and moves the long ones to the front."""
    for item in items:
        if isinstance(item, pytest.Function) and "running_stores" in item.fixturenames:
            item.add_marker("stores")
    items.sort(key=lambda item: not item.nodeid.startswith(tuple(f"tests/{path}" for path in LONG_TESTS)))


@contextlib.contextmanager
def without_coverage() -> Iterator[None]:
    """Suspends what ``coverage run`` measures, but not what mutation testing does."""
    measured = coverage.Coverage.current() if "COVERAGE_RUN" in os.environ else None
    if measured is None:
        yield
        return
    measured.stop()
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore", category=coverage.exceptions.CoverageWarning):
            measured.start()  # it may say that what it measures has been imported before


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects without coverage: this file has imported the server already, and what else is imported are tests."""
    with without_coverage():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Runs the tests that are marked so without coverage."""
    if item.get_closest_marker("without_coverage") is None:
        return (yield)
    with without_coverage():
        return (yield)


@pytest.fixture(autouse=True)
def drifts(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Fails a test in which a server of this process sends a client what its AsyncAPI document does not describe."""
    if request.node.get_closest_marker("unrecorded"):
        yield []
        return
    with no_drift() as drifts:
        yield drifts


@pytest.fixture
def toml(tmp_path: Path) -> WriteToml:
    """Writes a file of settings."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def running_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStores]:
    with EmbeddedStores(tmp_path_factory.mktemp("stores")) as stores:
        stores.start(print)
        yield stores


# The lessons as a first start leaves them; nothing is written when they are.
RESTORE_LESSONS = """
DELETE FROM lessons WHERE id <> '1';
UPDATE lessons SET seat_count = 30, title = '' WHERE (seat_count, title) IS DISTINCT FROM (30, '')
"""


@pytest.fixture(scope="session")
def restore_lessons(running_stores: EmbeddedStores) -> Iterator[Callable[[], None]]:
    """Makes lesson 1 the only one, on one connection: for each new one PostgreSQL would start a process."""
    connection: psycopg2.extensions.connection | None = None

    def restore() -> None:
        nonlocal connection
        for _ in range(2):
            if connection is None or connection.closed:
                connection = psycopg2.connect(running_stores.dsn)
                connection.autocommit = True
            try:
                with connection.cursor() as cursor:
                    cursor.execute(RESTORE_LESSONS)
                return
            except psycopg2.OperationalError:  # a test has ended all connections
                connection.close()
        raise AssertionError("RDS is gone")

    yield restore
    if connection is not None:
        connection.close()


@pytest.fixture
def stores(running_stores: EmbeddedStores, restore_lessons: Callable[[], None]) -> EmbeddedStores:
    """The stores as a first start leaves them: lesson 1 with 30 seats, and nothing in Redis."""
    restore_lessons()
    with redis.Redis.from_url(running_stores.redis_url) as client:
        client.flushall()
    return running_stores


class Onlooker(redis.Redis):
    """A client whose ``keys()`` are those of the diagrams; the server's own have to be asked for by their name."""

    def keys(self, pattern: Any = "*", **kwargs: Any) -> list[Any]:
        return [key for key in super().keys(pattern) if pattern != "*" or "lesson_node" not in key]


@pytest.fixture
def redis_client(stores: EmbeddedStores) -> Iterator["redis.Redis"]:
    """A client of the tests' own, to look at what the server wrote."""
    with Onlooker.from_url(stores.redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def sql(stores: EmbeddedStores) -> Iterator["psycopg2.extensions.cursor"]:
    """A cursor of the tests' own in the embedded RDS; each statement is committed."""
    connection = psycopg2.connect(stores.dsn)
    connection.autocommit = True
    with connection.cursor() as cursor:
        yield cursor
    connection.close()


@pytest.fixture
def environ(stores: EmbeddedStores) -> dict[str, str]:
    """The environment of a server on the running stores, on a free port."""
    return {
        "LESSON_RDS_DSN": stores.dsn,
        "LESSON_REDIS_URL": stores.redis_url,
        "LESSON_AUTH_KEY": KEY,
        "LESSON_SERVER_PORT": "0",
    }


@pytest.fixture
def start_server(io_loop: IOLoop, environ: dict[str, str]) -> Iterator[Callable[..., LessonServer]]:
    """Starts servers in this process; keyword arguments are further environment variables, or those of the server."""
    servers = []

    def start_server(events: Sequence[Event] = EVENTS, *, is_embedded: bool = False, **more: str) -> LessonServer:
        server = LessonServer(load(environ={**environ, **more}), events=events, is_embedded=is_embedded)
        io_loop.run_sync(server.start)
        servers.append(server)
        return server

    yield start_server
    for server in servers:
        io_loop.run_sync(server.stop)


@pytest.fixture
def server(start_server: Callable[..., LessonServer]) -> LessonServer:
    return start_server()


@pytest.fixture
def mint() -> Callable[..., str]:
    """Mints access tokens that the server of :func:`environ` accepts, or nearly."""

    def mint(subject: object = "p1", role: object = "student", key: str = KEY, ttl: int = 60, **more: object) -> str:
        claims = {"sub": subject, "role": role, "exp": int(time.time()) + ttl, **more}
        return jwt.encode({name: value for name, value in claims.items() if value is not None}, key)

    return mint


@pytest.fixture
def open_lessons(io_loop: IOLoop, stores: EmbeddedStores) -> Iterator[Callable[..., Lessons]]:
    """Opens lookups in RDS. When they are closed, nothing of them may be left."""
    opened = []

    def open_lessons(
        query: str = RdsSettings().lesson_query, timeout: float = 3.0, pool_size: int = 2, dsn: str = stores.dsn
    ) -> Lessons:
        lessons = Lessons(dsn, query, timeout, pool_size)
        opened.append((lessons, pool_size))
        io_loop.run_sync(lessons.open)
        return lessons

    yield open_lessons
    for lessons, pool_size in opened:
        io_loop.run_sync(lessons.close)
        assert not lessons._lookups._lookups
        assert not lessons._tasks
        assert lessons._under_way == 0
        assert lessons._turns._value == pool_size
        assert lessons._slow_turns._value == max(pool_size - 1, 1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The lessons that each query to RDS asked for."""
    asked = []
    fetch = Rds.fetch

    async def watch(self: Rds, query: str, parameters: Mapping[str, str] | None) -> list[Any]:
        asked.append(list((parameters or {}).values()))
        return await fetch(self, query, parameters)

    monkeypatch.setattr(Rds, "fetch", watch)
    return asked
