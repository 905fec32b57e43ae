"""Plants small defects into the server, one at a time, and reports the defects that no test sees: ``make mutants``.

For each defect, the tests that run its lines are run, the quickest first, until one fails. Results are kept in
``.mutants/``, so that a run continues an interrupted run, and repeats only trials whose result may have changed.

The exit status is 1 if a defect that ``docs/testing.md`` does not list is not seen, or if a defect that it lists is
seen; 2 if a test fails without any defect.
"""

import argparse
import ast
import difflib
import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar, cast

from defects import Defect, defects
from worker import ROOT, Outcome, Survey, Trial, work

# Files that are not part of the core.
UNTRIED = {"__init__.py", "lesson_admin.py", "aiopg_patches.py"}
MODULES = [
    "lesson_server/tokens.py",
    *sorted(
        str(path.relative_to(ROOT))
        for room in ("events", "gateway", "protocol", "stores")
        for path in ROOT.joinpath("lesson_server", room).rglob("*.py")
        if path.name not in UNTRIED
    ),
]
KEPT = ROOT / ".mutants"
ACCEPTED = ROOT / "docs/testing.md"
SEEN, HUNG, NOT_SEEN, NOT_RUN = "seen", "hung", "not seen", "not run by any test"
STATES = (SEEN, HUNG, NOT_SEEN, NOT_RUN)
# A module's own test that takes up to this many seconds runs before quicker tests of other modules.
OWN = 1.0
# Seconds of tests that are run for a defect; a module's own tests are run beyond that.
BUDGET = 10.0
PROGRESS_INTERVAL = 10.0

Key = TypeVar("Key")
Surveyed = dict[str, tuple[float, dict[str, list[int]]]]  # id of a test → its seconds, and module → lines that it runs


def main() -> int:
    options = parse_options()
    KEPT.mkdir(exist_ok=True)
    planted = [defect for module in options.modules for defect in defects(module, (ROOT / module).read_text("utf-8"))]
    if options.sample:
        planted = random.Random(options.seed).sample(planted, min(options.sample, len(planted)))
    results = Results()
    with workers(options.workers) as pipes:
        surveyed, failing = survey(pipes)
        saw = try_defects(planted, surveyed, results, pipes)
        failing += check(saw, surveyed, results, pipes)
    status = report(planted, results)
    for test in failing:
        print(f"fails without any defect: {test}")
    return 2 if failing else status


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help="all of the core when none is given")
    parser.add_argument("--sample", type=int, metavar="N", help="try that many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    workers = 2 * (os.cpu_count() or 1)  # tests wait half of their time
    parser.add_argument("--workers", type=int, default=workers, help="processes that run tests at once")
    return parser.parse_args()


# Workers


@contextmanager
def workers(count: int) -> Iterator[list[Connection]]:
    """Start processes that run tests, and yield a pipe to each process."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        os.chmod(folder, 0o755)  # PostgreSQL does not run as root, and must reach its data directory
        for number in range(count):
            ours, theirs = context.Pipe()
            path = Path(folder, str(number))
            path.mkdir()
            process = context.Process(target=work, args=(theirs, path))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            yield pipes
        finally:
            for pipe in pipes:
                with suppress(BrokenPipeError):
                    pipe.send(None)
            for process in processes:
                process.join()


def distribute(jobs: Iterable[tuple[Key, Survey | Trial]], pipes: list[Connection]) -> Iterator[tuple[Key, Outcome]]:
    """Send each job to the next free worker, and yield the outcomes."""
    left = iter(jobs)
    free, busy = list(pipes), {}
    while True:
        for pipe, (key, job) in zip(free, left, strict=False):
            pipe.send(job)
            busy[pipe] = key
        if not busy:
            return
        free = cast(list[Connection], wait(busy))
        for pipe in free:
            yield busy.pop(pipe), pipe.recv()


# Which tests run which lines


def survey(pipes: list[Connection]) -> tuple[Surveyed, list[str]]:
    """Find which tests run which lines; run only test files without a valid result of an earlier run.

    Returns:
        the seconds and the lines of each test that passes, and the ids of the tests that fail.
    """
    path = KEPT / "survey.json"
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/**/test_*.py"))
    helpers = ["tests/conftest.py", *(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/support/*.py"))]

    def read_by(file: str, tests: Surveyed) -> str:
        modules = {module for _, lines in tests.values() for module in lines}
        return digest(*(ROOT / name for name in {file, *helpers, *modules}))

    stale = [file for file in files if file not in known or known[file]["read"] != read_by(file, known[file]["tests"])]
    surveyed: Surveyed = {
        test: facts for file in set(files) - set(stale) for test, facts in known[file]["tests"].items()
    }
    failing = []
    for done, (file, outcome) in enumerate(distribute(((file, Survey(file)) for file in stale), pipes), 1):
        print(f"surveyed {done}/{len(stale)}: {file}, {len(outcome.surveyed)} tests", flush=True)
        if outcome.failed:
            print(outcome.text)
            failing += outcome.failed
        else:
            known[file] = {"read": read_by(file, outcome.surveyed), "tests": outcome.surveyed}
            path.write_text(json.dumps(known))
        surveyed |= {test: facts for test, facts in outcome.surveyed.items() if test not in outcome.failed}
    return surveyed, failing


def tests_of(defect: Defect, surveyed: Surveyed) -> dict[str, float]:
    """Return the tests that run a line of the defect and their seconds: the module's own first, then the quickest.

    Tests of other modules are left out beyond BUDGET seconds in all: the tests of its own module should see a defect in
    the core.
    """
    modules = [defect.module] if defect.lines else users_of(defect.module)  # constants alone run elsewhere

    def runs(lines: Sequence[int]) -> bool:
        return bool(defect.lines & set(lines)) if defect.lines else bool(lines)

    names = [re.sub(r"^lesson_server/(.*/)?", r"tests/\1test_", module.removesuffix(".py")) for module in modules]

    def is_own(test: str) -> bool:
        return test.startswith(tuple(f"{name}{end}" for name in names for end in (".py::", "_")))

    running = sorted(
        (seconds > OWN or not is_own(test), seconds, test)
        for test, (seconds, lines) in surveyed.items()
        if any(runs(lines.get(module, ())) for module in modules)
    )
    chosen = zip(running, accumulate(seconds for _, seconds, _ in running), strict=True)
    return {test: seconds for (_, seconds, test), total in chosen if total < BUDGET or is_own(test)}


def users_of(module: str) -> list[str]:
    """Return the modules of the core that import from a module."""
    statement = f"from {module.removesuffix('.py').replace('/', '.')} import "
    return [user for user in MODULES if statement in (ROOT / user).read_text("utf-8")]


# Trials


class Results:
    """The result of each defect, kept in a file."""

    def __init__(self) -> None:
        self._path = KEPT / "results.jsonl"
        self._everything = digest(*ROOT.glob("lesson_server/**/*.py"), *ROOT.glob("tests/**/*.py"))
        rows = map(json.loads, self._path.read_text("utf-8").splitlines()) if self._path.exists() else ()
        self._rows: dict[str, dict[str, str]] = {row["name"]: row for row in rows}

    def state(self, defect: Defect) -> str | None:
        """Return the state of a defect; None if it was never tried, or if its state may have changed since."""
        row = self._rows.get(defect.name)
        if row is None or row["source"] != digest_of(defect.source) or row["tests"] != self._digest(row["test"]):
            return None
        return row["state"]

    def test(self, defect: Defect) -> str:
        """Return the test that saw the defect."""
        return self._rows[defect.name]["test"]

    def add(self, defect: Defect, state: str, failed: Sequence[str] = ()) -> None:
        test = failed[0] if failed else ""
        row = {"name": defect.name, "state": state, "test": test, "source": digest_of(defect.source)}
        self._keep(row | {"tests": self._digest(test)})

    def forget(self, test: str) -> None:
        """Discard the state of every defect that this test has seen."""
        for row in list(self._rows.values()):
            if row["test"] == test:
                self._keep(row | {"state": "", "tests": ""})

    def _keep(self, row: dict[str, str]) -> None:
        self._rows[row["name"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _digest(self, test: str) -> str:
        """Return the digest of what a state depends on: the test that saw the defect, or all code and tests."""
        return digest_of(text_of(test)) if test else self._everything


def try_defects(planted: list[Defect], surveyed: Surveyed, results: Results, pipes: list[Connection]) -> set[str]:
    """Try every defect without a known state; try a hung one once more, because the machine may have been overloaded.

    Returns:
        the tests that saw a defect.
    """
    left = [defect for defect in planted if results.state(defect) is None]
    print(f"{len(planted)} defects, {len(planted) - len(left)} known from an earlier run", flush=True)
    counts: Counter[str] = Counter()
    hung: list[Defect] = []
    saw: set[str] = set()
    started = told = time.monotonic()

    def trials(defects: Iterable[Defect]) -> Iterator[tuple[Defect, Trial]]:
        for defect in defects:
            if tests := tests_of(defect, surveyed):
                yield defect, Trial(defect.module, defect.source, tests)
            else:
                counts[NOT_RUN] += 1
                results.add(defect, NOT_RUN)

    for defect, outcome in distribute(trials(left), pipes):
        if outcome.hung:
            hung.append(defect)
            continue
        state = SEEN if outcome.failed else NOT_SEEN
        results.add(defect, state, outcome.failed)
        saw |= surveyed.keys() & outcome.failed  # a failed import is not a test
        counts[state] += 1
        if time.monotonic() > told + PROGRESS_INTERVAL:
            told = time.monotonic()
            done = counts.total() + len(hung)
            minutes = (told - started) / done * (len(left) - done) / 60
            so_far = ", ".join(f"{count} {state}" for state, count in counts.items())
            print(f"{done}/{len(left)}: {so_far}; {minutes:.0f} min left", flush=True)
    for defect, outcome in distribute(trials(hung), pipes):
        results.add(defect, HUNG if outcome.hung else SEEN if outcome.failed else NOT_SEEN, outcome.failed)
        saw |= surveyed.keys() & outcome.failed
    return saw


def check(saw: set[str], surveyed: Surveyed, results: Results, pipes: list[Connection]) -> list[str]:
    """Run the tests that saw a defect once more without a defect, in the same environment.

    Returns:
        the test that fails without a defect, if any; the state of every defect that it saw is discarded.
    """
    control = Trial(None, "", {test: surveyed[test][0] for test in sorted(saw)})
    failing = []
    for _, outcome in distribute([("control", control)] if saw else [], pipes[:1]):
        failing = outcome.failed
        for test in failing:
            results.forget(test)
    return failing


# The report


def report(planted: list[Defect], results: Results) -> int:
    """Print the counts of each module, and the defects that should have been seen.

    Returns:
        the exit status.
    """
    equivalent, unseen = accepted("equivalent"), accepted("unseen")
    alive = [defect for defect in planted if results.state(defect) in (NOT_SEEN, NOT_RUN)]
    new = [defect for defect in alive if defect.name not in equivalent | unseen]
    for defect in new:
        print(f"\n{defect.name}\n    {results.state(defect)}")
        original = (ROOT / defect.module).read_text("utf-8")
        diff = difflib.unified_diff(original.splitlines(), defect.source.splitlines(), lineterm="", n=2)
        print("\n".join(f"    {line}" for line in list(diff)[2:]))
    print(f"\n{'':36}" + "".join(f"{state:>24}" for state in STATES))
    for module in sorted({defect.module for defect in planted}):
        counts = Counter(results.state(defect) for defect in planted if defect.module == module)
        print(f"{module:36}" + "".join(f"{counts[state]:>24}" for state in STATES))
    changing = [defect for defect in planted if defect.name not in equivalent]
    seen = sum(results.state(defect) in (SEEN, HUNG) for defect in changing)
    print(f"{seen} of the {len(changing)} that change behaviour are seen: {seen / max(len(changing), 1):.1%}")
    outdated = {defect.name for defect in planted if defect not in alive} & (equivalent | unseen)
    for name in sorted(outdated):
        print(f"{ACCEPTED.name} lists what is seen: {name}")
    if new:
        print(f"{len(new)} should be seen, or be listed in {ACCEPTED.relative_to(ROOT)} with the reason")
    return 1 if new or outdated else 0


def accepted(kind: str) -> set[str]:
    """Return the names of the defects in the blocks of that kind in ``docs/testing.md``."""
    text = ACCEPTED.read_text("utf-8") if ACCEPTED.exists() else ""
    return {name for block in re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for name in block.splitlines()}


@cache
def text_of(test: str) -> str:
    """Return the source of a test function, by the test's id; empty if there is no such function."""
    file, _, name = test.partition("::")
    path = ROOT / file
    tree = ast.parse(path.read_text("utf-8") if path.is_file() else "")
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return next((ast.unparse(node) for node in functions if node.name == name.partition("[")[0]), "")


def digest(*paths: Path) -> str:
    return digest_of("".join(f"{path}\n{path.read_text('utf-8') if path.exists() else ''}" for path in sorted(paths)))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
