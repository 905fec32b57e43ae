"""`make bench`: runs the server and its peers in turn, and writes docs/benchmarks.md.

One run alternates the contestants (A B A B …): in each round every contestant is started anew on the same PostgreSQL
and Valkey, and runs the same workloads; figures are medians of the rounds. If there are two cores, the server has one
to itself; the load generator and the stores share the other. Each round ends with the workload "workers": lesson-server
in one process and in several, where all processes share all cores.
"""

import argparse
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import machine
import page
from contestants import CONTESTANTS, OURS, ROOT, USUAL, WORKERS, BenchError, Contestant, running
from load_generator import WINDOW
from measuring import Stores
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workloads import LESSONS, SEATS, Scale, Workloads, load_generator, not_kept_up

USUAL_SCALE = Scale(
    clients=1_000,
    warm_ups=20,
    rates=(50, 250, 500),
    seconds=5.0,
    levels=(100, 1_000, 5_000, 20_000),
    visitors=200,
    visits=7,
)
QUICK_SCALE = Scale(clients=300, warm_ups=3, rates=(50, 250), seconds=1.5, levels=(100, 1_000), visitors=100, visits=3)
ROUNDS, QUICK_ROUNDS = 5, 1

# File descriptors of a server, other than for held clients and visitors.
OTHER_DESCRIPTORS = 300

RESULTS = ROOT / "docs/benchmarks.json"
EXIT_INTERRUPTED = 130

Results = dict[str, Any]


@contextmanager
def running_stores(directory: Path) -> Iterator[Stores]:
    """Start a PostgreSQL and a Valkey: the stores of an idle lesson-server in its default set-up.

    Args:
        directory: for the stores' files and the log of that lesson-server.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LESSON_")}
    data, log = directory / "stores", directory / "stores.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            (sys.executable, "-m", "lesson_server.cli", "run", "--port", "0"),
            env=environ | {"PYTHONPATH": str(ROOT), "LESSON_SERVER_DATA_DIR": str(data)},
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        ) as keeper,
    ):
        try:
            assert keeper.stdout is not None
            said = ""
            for line in keeper.stdout:
                said += line
                if "listening on" in line:
                    break
            dsn = re.search(r"^PostgreSQL: (.+)$", said, re.MULTILINE)
            redis_url = re.search(r"^Redis: (.+)$", said, re.MULTILINE)
            if dsn is None or redis_url is None:
                raise BenchError(f"the stores did not start: {said}{_tail(log)}")
            yield Stores(dsn[1], redis_url[1], data / "postgresql.log")
        finally:
            keeper.terminate()


class Bench:
    """One run.

    Args:
        stores: the stores of all contestants.
        contestants: the contestants, in the order of each round.
        workers: the contestants of the workload "workers", which ends a round.
        scale: the sizes of the workloads.
        rounds: the number of rounds.
        directory: the directory of the logs.
        progress: shows the progress of the run.
    """

    def __init__(
        self,
        stores: Stores,
        contestants: Sequence[Contestant],
        workers: Sequence[Contestant],
        scale: Scale,
        rounds: int,
        directory: Path,
        progress: Progress,
    ) -> None:
        self._stores = stores
        self._contestants = contestants
        self._workers = workers
        self._scale = scale
        self._rounds = rounds
        self._directory = directory
        self._key = secrets.token_urlsafe(32)
        self._cores = os.sched_getaffinity(0)
        self._core = min(self._cores) if len(self._cores) > 1 else None
        self._progress = progress
        # Steps of a contestant: three workloads and the rates in each round, the counts and the levels once. Steps of a
        # contestant in workers: one workload in each round.
        steps = len(contestants) * (rounds * (3 + len(scale.rates)) + 1 + len(scale.levels)) + len(workers) * rounds
        self._bar = progress.add_task("", total=steps)
        self._results: Results = {
            contestant.name: {
                "warm_ups": [],
                "class_start": [],
                "phases": [],
                "storm": [],
                "steady": {str(rate): [] for rate in scale.rates},
            }
            for contestant in contestants
        }
        self._results |= {contestant.name: {"warm_ups": [], "class_start": []} for contestant in workers}

    def run(self) -> Results:
        """Return the results, by contestant."""
        for contestant in self._contestants:
            with self._contending(contestant, self._core) as workloads:
                self._step(contestant, "counts")
                self._results[contestant.name]["counts"] = workloads.counted_class_start()
        for number in range(1, self._rounds + 1):
            for contestant in self._contestants:
                with self._contending(contestant, self._core) as workloads:
                    self._round(f"round {number}", contestant, workloads)
            for contestant in self._workers:
                with self._contending(contestant, core=None) as workloads:
                    self._step(contestant, f"round {number}, class start")
                    self._results[contestant.name]["class_start"].append(workloads.workers())
        for contestant in self._contestants:
            with self._contending(contestant, self._core) as workloads:
                self._results[contestant.name]["hold"] = workloads.hold(partial(self._step, contestant))
        return self._results

    def _round(self, number: str, contestant: Contestant, workloads: Workloads) -> None:
        results = self._results[contestant.name]
        self._step(contestant, f"{number}, class start")
        results["class_start"].append(workloads.class_start())
        self._step(contestant, f"{number}, phases")
        results["phases"].append(workloads.phases())
        self._step(contestant, f"{number}, storm")
        results["storm"].append(workloads.storm())
        # Last, and in ascending order: a server that does not keep up has unfinished work afterwards. A higher rate is
        # then not tried.
        kept_up = True
        for rate in self._scale.rates:
            self._step(contestant, f"{number}, {rate} a second")
            figures = workloads.steady(rate) if kept_up else not_kept_up(rate)
            kept_up = bool(figures["kept_up"])
            results["steady"][str(rate)].append(figures)

    def _step(self, contestant: Contestant, what: str) -> None:
        self._progress.update(self._bar, description=f"{contestant.title}: {what}", advance=1)

    @contextmanager
    def _contending(self, contestant: Contestant, core: int | None) -> Iterator[Workloads]:
        """Start a contestant and its load generator, and warm the contestant up.

        Args:
            contestant: the contestant.
            core: the contestant's own core, which the load generator does not use; None: both may use all cores.
        """
        os.sched_setaffinity(0, self._cores - {core})  # child processes inherit it
        log = self._directory / f"{contestant.name}.log"
        with ExitStack() as stack:
            server = stack.enter_context(running(contestant, self._stores, self._key, core, log))
            load = stack.enter_context(load_generator(server.port, self._key))
            try:
                workloads = Workloads(server, load, self._stores, self._scale)
                self._progress.update(self._bar, description=f"{contestant.title}: warm-up")
                self._results[contestant.name]["warm_ups"].append(workloads.warm_up())
                yield workloads
            except BenchError as error:
                raise BenchError(f"{contestant.title}: {error}\n{_tail(log)}") from None


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2_000:]


def fitting(levels: tuple[int, ...], visitors: int) -> tuple[int, ...]:
    """Return the levels, each cut to the number of clients that the limit of open files lets a process hold."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the servers inherit the limit
    most = hard - visitors - OTHER_DESCRIPTORS
    return tuple(sorted({min(level, most) for level in levels}))


def measure(contestants: list[Contestant], scale: Scale, rounds: int, console: Console) -> Results:
    """Run all workloads and return the results, with the conditions of the run."""
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    workers = WORKERS if any(contestant.name == OURS for contestant in contestants) else ()
    others = machine.Others()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lesson-bench-")))
        stores = stack.enter_context(running_stores(directory))
        stores.add_lessons(LESSONS, SEATS)
        about = machine.about(stores.versions())
        progress = stack.enter_context(Progress(*columns, console=console))
        bench = Bench(stores, contestants, workers, scale, rounds, directory, progress)
        results = bench.run()
    about |= {"rounds": rounds, "clients": scale.clients, "visitors": scale.visitors, "window": WINDOW}
    about |= {"rates": scale.rates, "seconds": scale.seconds, "warm_ups": scale.warm_ups}
    return {
        "about": {**about, "others_percent": others.percent()},
        **_results_of(contestants, results),
        "workers": _results_of(workers, results),
    }


def _results_of(contestants: Sequence[Contestant], results: Results) -> Results:
    return {
        "titles": {contestant.name: contestant.title for contestant in contestants},
        "contestants": {contestant.name: results[contestant.name] for contestant in contestants},
    }


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Measure lesson-server and its peers; write docs/benchmarks.md.")
    parser.add_argument("--rounds", type=int, help=f"at least 1 (default {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="a small run; without --output it writes no file")
    parser.add_argument("--only", help=f"names, separated by commas, of {', '.join(CONTESTANTS)}")
    parser.add_argument("--output", type=Path, help=f"the results; the page goes beside them (default {RESULTS})")
    parser.add_argument("--redraw", action="store_true", help="measure nothing, write the page of the last results")
    args = parser.parse_args()
    console = Console(highlight=False)
    output: Path = args.output or RESULTS
    names = args.only.split(",") if args.only else list(USUAL)
    if unknown := set(names) - CONTESTANTS.keys():
        parser.error(f"argument --only: unknown: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.redraw:
            page.write(json.loads(output.read_text("utf-8")), output)
            return 0
        for name in names:
            CONTESTANTS[name].prepare()
        scale = QUICK_SCALE if args.quick else USUAL_SCALE
        scale = Scale(**{**vars(scale), "levels": fitting(scale.levels, scale.visitors)})
        rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
        results = measure([CONTESTANTS[name] for name in names], scale, rounds, console)
    except BenchError as error:
        console.print(str(error), markup=False, style="bold red")
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    for line in page.summary(results):
        console.print(line, markup=False)
    if args.output or not args.quick:
        page.write(results, output)
        console.print(f"written: {output}, {output.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
