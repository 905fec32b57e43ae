"""Goes through every order in which the commands of small scenarios can reach Redis, with a fault at each point.

See tests/support/explorer.py. Exits 1 when a rule of presence does not hold, and prints the schedule that shows it;
and when a kind of fault never happened, for then nothing is known of it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import redis
from explorer import Counterexample, Report, explore, replay
from explorer_scenarios import PRESENCE_SCENARIOS, Scenario
from explorer_seat_scenarios import SEAT_SCENARIOS
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lesson_server.embedded.stores import EmbeddedStores

SCENARIOS = {**PRESENCE_SCENARIOS, **SEAT_SCENARIOS}
# Schedules of one scenario with so many faults. All of them take minutes; what is cut is said.
LIMIT = 3_000

console = Console(highlight=False, soft_wrap=True, emoji=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, metavar="N", help="schedules of a scenario, for each number of faults"
    )
    parser.add_argument("--replay", metavar="SCHEDULE", help="carry out this one schedule of a counterexample")
    args = parser.parse_args(argv)
    name, *schedule = (args.replay or "").split() or [""]
    for unknown in {*args.scenarios, *([name] if name else [])} - SCENARIOS.keys():
        parser.error(f"there is no scenario {unknown}")
    with own_valkey() as client:
        if name:
            return show(client, SCENARIOS[name], schedule)
        results = [search(client, SCENARIOS[name], args.limit) for name in args.scenarios or SCENARIOS]
        return 0 if all(results) else 1


@contextmanager
def own_valkey() -> Iterator["redis.Redis"]:
    """A client of a Valkey that nobody else uses: each schedule begins with FLUSHALL."""
    with tempfile.TemporaryDirectory() as directory, EmbeddedStores(Path(directory)) as stores:
        stores.start(lambda line: None)
        with redis.Redis.from_url(
            stores.redis_url, decode_responses=True, single_connection_client=True, protocol=2
        ) as client:
            client.config_set("appendonly", "no")
            yield client


def search(client: "redis.Redis", scenario: Scenario, limit: int) -> bool:
    """Explores one scenario; returns whether all rules hold and every kind of fault happened."""
    started = time.monotonic()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(scenario.name)

        def describe(report: Report) -> None:
            progress.update(task, description=f"{scenario.name}: {report.schedules.total():,} schedules")

        report = explore(client, scenario, limit, describe)
    console.print(f"{report}, {time.monotonic() - started:.0f} s")
    if report.counterexample is not None:
        console.print(str(report.counterexample), markup=False)
        return False
    if report.missing:
        console.print(f"{scenario.name}: never injected: {', '.join(report.missing)}")
    return not report.missing


def show(client: "redis.Redis", scenario: Scenario, schedule: Sequence[str]) -> int:
    """Carries out one schedule and prints it; returns the exit status."""
    try:
        outcome = replay(client, scenario, schedule)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    if isinstance(outcome, Counterexample):
        console.print(str(outcome), markup=False)
        return 1
    console.print("\n".join(outcome), "all rules hold", sep="\n", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
