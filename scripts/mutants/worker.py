"""A process that runs tests in forked children, with its own stores and its own copy of the project.

A child imports the project anew, from the copy, so that processes that a test starts have the defect, too. Everything
else that the tests import is imported before the fork, and the stores already run: a child begins its first test after
half a second.
"""

import ast
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import psutil
import pytest

from lesson_server.embedded.stores import EmbeddedStores

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
OURS = ("lesson_server", "statecharts", "tests")
PR_SET_CHILD_SUBREAPER = 36  # the processes of a killed child become our children, so that we can kill them

# Ignored warning: the libraries are imported before pytest can rewrite the assertions in its plugins.
PYTEST = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]

# A test is interrupted after PATIENCE_FACTOR times its surveyed duration plus PATIENCE seconds. At its second try,
# LAST_PATIENCE replaces PATIENCE.
PATIENCE_FACTOR, PATIENCE, LAST_PATIENCE = 5, 1.0, 3.0
# Seconds from the interruption until the child is killed, if the test has not ended.
GRACE = 2.0
POLL_INTERVAL = 0.02


Deadline = Any  # a RawValue, whose type is private


@dataclass(frozen=True)
class Survey:
    """The job to run a test file and record the duration and the lines of each test."""

    file: str


@dataclass(frozen=True)
class Trial:
    """The job to run tests, with a defect or without, until a test fails.

    Attributes:
        module: path of the module that has the defect; None: no defect.
        source: the source of the module.
        tests: id of a test → its seconds, in the order of the run.
    """

    module: str | None
    source: str
    tests: dict[str, float]


@dataclass
class Outcome:
    """The result of a job.

    Attributes:
        failed: the tests that failed, or the file that could not be imported.
        hung: whether the child was killed because the last failed test did not end.
        surveyed: id of a test → its seconds, and module → lines that it ran.
        text: what pytest printed.
    """

    failed: list[str] = field(default_factory=list)
    hung: bool = False
    surveyed: dict[str, tuple[float, dict[str, list[int]]]] = field(default_factory=dict)
    text: str = ""


def work(pipe: Connection, folder: Path) -> None:
    """Run the jobs from ``pipe`` and send back the outcomes, until None is received."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.suppress(KeyboardInterrupt, EOFError), Bench(folder) as bench:
        while (job := pipe.recv()) is not None:
            pipe.send(bench.run(job))


class Bench:
    """The copy of the project, the stores, and the children that use them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copy = folder / "copy"
        self._outcome = folder / "outcome.json"
        self._printed = folder / "printed.txt"
        self._stores: EmbeddedStores | None = None
        self._deadline = RawValue("d", math.inf)  # of the running test, by the monotonic clock; shared with the child

    def __enter__(self) -> "Bench":
        shutil.copytree(ROOT, self._copy, ignore=LEFT_OUT)
        os.environ |= {"PYTHONPATH": str(self._copy)}
        import_libraries()
        self._in_child(lambda stores: pytest.main([*PYTEST, "--collect-only"]))  # writes the byte code of all modules
        sys.dont_write_bytecode = True  # the byte code of a defect could be loaded for the next defect
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        gc.freeze()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop_stores()

    def run(self, job: Survey | Trial) -> Outcome:
        if isinstance(job, Survey):
            return self._in_child(lambda stores: survey(job, stores, self._folder, self._outcome))
        if job.module is None:
            return self._in_child(lambda stores: trial(job, stores, self._outcome, self._deadline))
        path = self._copy / job.module
        original = path.read_text("utf-8")
        path.write_text(job.source, "utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()
        try:
            return self._in_child(lambda stores: trial(job, stores, self._outcome, self._deadline))
        finally:
            path.write_text(original, "utf-8")

    def _in_child(self, task: Callable[[EmbeddedStores], object]) -> Outcome:
        stores = self._running_stores()
        own = set(psutil.Process().children())
        self._outcome.write_text("{}")
        self._deadline.value = math.inf
        pid = os.fork()
        if pid == 0:
            self._be_child(task, stores)
        try:
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > self._deadline.value:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(POLL_INTERVAL)
        finally:
            kill_all(set(psutil.Process().children()) - own)
        status = ended[1]
        outcome = Outcome(**json.loads(self._outcome.read_text()), text=self._printed.read_text("utf-8", "replace"))
        outcome.hung = os.WIFSIGNALED(status) and time.monotonic() > self._deadline.value
        if os.WIFSIGNALED(status):
            self._stop_stores()  # the killed child has not cleaned them up
        elif status != 0 and not outcome.failed:
            outcome.failed = ["an import"]
        return outcome

    def _be_child(self, task: Callable[[EmbeddedStores], object], stores: EmbeddedStores) -> None:
        status = 1
        try:
            os.setsid()
            printed = os.open(self._printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            os.chdir(self._copy)
            sys.path.insert(0, str(self._copy))
            for name in [name for name in sys.modules if name.startswith(OURS)]:
                del sys.modules[name]
            # No shrinking: many tests search for examples, and a defect needs any failing example, not the smallest.
            quick = hypothesis.settings(database=None, derandomize=True, phases=[hypothesis.Phase.generate])
            hypothesis.settings.register_profile("mutants", quick)
            hypothesis.settings.load_profile("mutants")
            status = int(bool(task(stores)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _running_stores(self) -> EmbeddedStores:
        if self._stores is None:
            self._stores = EmbeddedStores(self._folder / "stores")
            self._stores.start(lambda line: None)
        return self._stores

    def _stop_stores(self) -> None:
        if self._stores is not None:
            self._stores.stop()
            self._stores = None


def import_libraries() -> None:
    """Import everything that the project and its tests import, except their own modules."""
    names: set[str] = set()
    for path in [*ROOT.glob("lesson_server/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module)
    folders = (".", "tests/support", "scripts", "scripts/bench", "scripts/mutants")
    ours = {path.stem for folder in folders for path in ROOT.joinpath(folder).iterdir()}
    for name in sorted(names):
        if name.partition(".")[0] not in ours:
            importlib.import_module(name)


def kill_all(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for descendant in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
    psutil.wait_procs(processes)


# In the child


class Plugin:
    """Gives the tests the running stores, and records which test failed."""

    def __init__(self, stores: EmbeddedStores, outcome: Path) -> None:
        self._stores = stores
        self._path = outcome
        self.failed: list[str] = []

    def note(self, **facts: Any) -> None:
        self._path.write_text(json.dumps({"failed": self.failed, **facts}))

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> EmbeddedStores | None:
        if fixturedef.argname != "running_stores":
            return None
        fixturedef.cached_result = (self._stores, fixturedef.cache_key(request), None)
        return self._stores

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            self.note()

    pytest_collectreport = pytest_runtest_logreport


class TookTooLong(KeyboardInterrupt):
    """Ends a test as Ctrl-C would: no event loop and no ``except Exception`` of the tested code stops it."""


class TrialPlugin(Plugin):
    """Runs only the tests of a trial, in its order; a test that takes too long has failed, and is the last."""

    def __init__(
        self, stores: EmbeddedStores, outcome: Path, deadline: Deadline, tests: dict[str, float], patience: float
    ) -> None:
        super().__init__(stores, outcome)
        self._deadline = deadline
        self._tests = tests
        self._patience = patience

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self._tests if test in found]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.note(failed=[item.nodeid])  # in case we are killed
        allowed = self._patience + PATIENCE_FACTOR * self._tests[item.nodeid]
        self._deadline.value = time.monotonic() + allowed + GRACE
        signal.signal(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, allowed)
        try:
            result = yield
        except TookTooLong:
            self.failed.append(item.nodeid)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.note()
        return result

    def pytest_unconfigure(self) -> None:
        self._deadline.value = math.inf

    @staticmethod
    def _interrupt(number: int, frame: object) -> None:
        raise TookTooLong


def trial(job: Trial, stores: EmbeddedStores, outcome: Path, deadline: Deadline) -> int:
    """Run the tests of the first file before the other files are imported: most defects need no other file.

    A failed test is run once more, because some tests fail now and then on an overloaded machine.
    """
    left = dict(job.tests)
    while left:
        first = next(iter(left)).partition("::")[0]
        batch = {test: seconds for test, seconds in left.items() if test.startswith(first + "::")}
        if len(left) < len(job.tests):
            batch = left
        failed = run_until_failure(batch, stores, outcome, deadline, PATIENCE)
        if failed is not None:
            again = {failed: left[failed]} if failed in left else {}
            if not again or run_until_failure(again, stores, outcome, deadline, LAST_PATIENCE):
                return 1
        done = list(batch)[: list(batch).index(failed) + 1] if failed else batch
        left = {test: seconds for test, seconds in left.items() if test not in done}
    return 0


def run_until_failure(
    tests: dict[str, float], stores: EmbeddedStores, outcome: Path, deadline: Deadline, patience: float
) -> str | None:
    """Run tests until one fails; return the failed test, or the file that could not be imported, or None."""
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    plugin = TrialPlugin(stores, outcome, deadline, tests, patience)
    status = pytest.main([*PYTEST, "--exitfirst", *files], [plugin])
    return plugin.failed[0] if plugin.failed else "an import" if status else None


class SurveyPlugin(Plugin):
    def __init__(self, stores: EmbeddedStores, outcome: Path, measured: coverage.Coverage, data: Path) -> None:
        super().__init__(stores, outcome)
        self._coverage = measured
        self._data = data
        self._surveyed: dict[str, tuple[float, dict[str, list[int]]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._coverage.switch_context(item.nodeid)
        started = time.perf_counter()
        try:
            return (yield)
        finally:
            seconds = time.perf_counter() - started
            self._surveyed[item.nodeid] = (seconds, dict(self._lines_of_processes()))

    def _lines_of_processes(self) -> Iterator[tuple[str, list[int]]]:
        """Return the lines, by module, that ended processes of the test ran."""
        lines: dict[str, set[int]] = {}
        for path in self._data.parent.glob(self._data.name + ".*"):
            if f".pid{os.getpid()}." in path.name:
                continue  # the data of this process
            data = coverage.CoverageData(str(path))
            with contextlib.suppress(coverage.CoverageException):  # a process was killed while it wrote the file
                data.read()
            for file in data.measured_files():
                lines.setdefault(module_of(file), set()).update(data.lines(file) or ())
            data.close()
            path.unlink()
        return ((module, sorted(numbers)) for module, numbers in lines.items())

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        for file in data.measured_files():
            for line, tests in data.contexts_by_lineno(file).items():
                for test in filter(None, tests):
                    own = self._surveyed[test][1]
                    own[module_of(file)] = sorted({*own.get(module_of(file), ()), line})
        self.note(surveyed=self._surveyed)


def module_of(file: str) -> str:
    return str(Path(file).relative_to(Path.cwd()))


def survey(job: Survey, stores: EmbeddedStores, folder: Path, outcome: Path) -> int:
    data = folder / "coverage"
    measured = coverage.Coverage(data_file=str(data), config_file="pyproject.toml")
    measured.set_option("run:disable_warnings", ["no-data-collected"])  # of a test file that only starts processes
    measured.start()
    return pytest.main([*PYTEST, job.file], [SurveyPlugin(stores, outcome, measured, data)])
