"""``python scripts/bench/seats.py``: what seats cost. Prints tables, and writes no file.

storm
    People on one node and on two take, change and leave the seats of a lesson, all at once, beside the joins of a class
    start. Each history is checked; see seat_history.py.
room
    A few people take and leave seats, while more and more people in the lesson see each change.
map
    The scripts on maps of ten thousand seats: their time in Redis, and the commands that they call there.
nodes
    How often the nodes read each change from Redis, when the people of the lesson are on two nodes. ``--before ROOT``
    also measures an older working tree, in which every node reads what is emitted to any room.
class start
    With ``--before ROOT``: a class start in both trees, in turn. The end of a connection begins the grace of a seat.

If there are two cores, the nodes share one; the load and the stores have the other.
"""

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis
from contestants import CONTESTANTS, OURS, Contestant, Running, running
from measuring import Stores
from redis.client import PubSub
from rich.console import Console
from rich.table import Table
from run import running_stores
from seat_costs import Costs
from workloads import LESSONS, SEATS, LoadProcess, Scale, Workloads, load_generator

PEOPLE, ATTEMPTS = 200, 50  # the storm: ten thousand attempts
ROOMS = (30, 200, 1_000)
MOVERS, TURNS = 10, 60  # in turns; few enough for the pace of one connection
NODES = (2, 8)
CLASS = Scale(clients=400, warm_ups=8, rates=(), seconds=0, levels=(), visitors=0, visits=0)
ROUNDS = 5

Rows = list[tuple[str, ...]]


class Bench:
    """One run.

    Args:
        directory: for the stores and the logs.
        before: the root of an older working tree, or None.
        rounds: the number of rounds of the storm and of the class start.
    """

    def __init__(self, directory: Path, before: Path | None, rounds: int) -> None:
        self._directory = directory
        self._before = before
        self._rounds = rounds
        self._key = secrets.token_urlsafe(32)
        self._cores = os.sched_getaffinity(0)
        self._core = min(self._cores) if len(self._cores) > 1 else None
        self._lessons = iter(range(LESSONS - 1, 0, -1))  # the load of a class start begins with the first

    def run(self, console: Console) -> None:
        """Measure and print everything."""
        os.sched_setaffinity(0, self._cores - {self._core})  # child processes inherit it
        with running_stores(self._directory) as stores:
            self.use(stores)
            for name, (columns, measure) in self.tables().items():
                table = Table(*columns, title=name)
                for row in measure():
                    table.add_row(*row)
                console.print(table)

    def use(self, stores: Stores) -> None:
        """Use these stores."""
        self._stores = stores
        self._redis = redis.Redis.from_url(stores.redis_url, decode_responses=True)
        stores.add_lessons(LESSONS, SEATS)

    def tables(self) -> dict[str, tuple[tuple[str, ...], Callable[[], Rows]]]:
        """Return the columns of each table, and what measures its rows."""
        tables = {
            "storm": (("", "a second", "CPU µs each", "ack p50 ms", "p95", "changes"), self._storm),
            "room": (("people", "CPU µs a change", "a person and change"), self._room),
            "map": (("map", "script", "µs", "commands", "HGETALL"), self._map),
            "nodes": (("nodes", "nodes that read a change", "reads a change", "idle nodes' CPU µs"), self._nodes),
        }
        if self._before is not None:
            tables["class start"] = (("", "join µs", "end µs", "both", "ratio"), self._class_start)
        return tables

    # Storm

    def _storm(self) -> Rows:
        """Measure joins and attempts, in turn, and return the medians of the rounds."""
        figures: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)
        for _ in range(self._rounds):
            with self._running(1) as nodes, self._workloads(nodes[0]) as workloads:
                workloads.warm_up()
                for _ in range(3):
                    start = workloads.class_start()
                    names = ("joins_per_s", "join_us", "ack_p50_ms", "ack_p95_ms")
                    figures["joins of a class start"].append((*(start[name] for name in names), 0))
            for count in (1, 2):
                with self._running(count) as nodes:
                    figures[f"attempts on {count} node{'s' * (count > 1)}"].append(self._storm_on(nodes))
        rows: Rows = []
        for name, measured in figures.items():
            rate, cpu, p50, p95, changes = map(statistics.median, zip(*measured, strict=True))
            rows.append((name, f"{rate:,.0f}", f"{cpu:.0f}", f"{p50:.1f}", f"{p95:.1f}", f"{changes:,.0f}"))
        return rows

    def _storm_on(self, nodes: Sequence[Running]) -> tuple[float, ...]:
        lesson = next(self._lessons)
        with self._people(nodes, lesson, PEOPLE) as load:
            phase, cpu = cpu_of(nodes, load, "storm", attempts=ATTEMPTS)
            self._tell_end(lesson)
            load("finish")
            history = load("check")
        attempts = PEOPLE * ATTEMPTS
        cuts = statistics.quantiles(phase["ack_ms"], n=100)
        return attempts / phase["seconds"], cpu / attempts, cuts[49], cuts[94], history["changes"]

    # Room

    def _room(self) -> Rows:
        costs = {}
        with self._running(1) as nodes:
            for people in ROOMS:
                self._redis.flushdb()
                with self._people(nodes, next(self._lessons), people) as load:
                    load("take_turns", clients=MOVERS, attempts=4)
                    _, cpu = cpu_of(nodes, load, "take_turns", clients=MOVERS, attempts=TURNS)
                    costs[people] = cpu / (MOVERS * TURNS)
        fewest = min(ROOMS)
        return [
            (
                f"{people:,}",
                f"{cost:,.0f}",
                "" if people == fewest else f"{(cost - costs[fewest]) / (people - fewest):.2f}",
            )
            for people, cost in costs.items()
        ]

    # Map

    def _map(self) -> Rows:
        return asyncio.run(Costs(self._redis).measure())

    # Nodes

    def _nodes(self) -> Rows:
        rows: Rows = []
        for root in (None,) if self._before is None else (self._before, None):
            for count in NODES:
                with self._running(count, root) as nodes:
                    rows.append(self._reads(nodes, is_before=root is not None))
        return rows

    def _reads(self, nodes: Sequence[Running], *, is_before: bool) -> tuple[str, ...]:
        """Let people on the first two nodes make changes, and count who reads the changes."""
        lesson, changes = next(self._lessons), MOVERS * TURNS
        channel = "lesson_node_rooms" if is_before else room(lesson)
        own: PubSub = self._redis.pubsub()  # type: ignore[no-untyped-call]
        with self._people(nodes[:2], lesson, SEATS) as load, own:
            (own.subscribe if is_before else own.ssubscribe)(channel)  # reads each change once, as a measure
            before, cpu = self._read_bytes(own), [node.process.cpu() for node in nodes]
            if is_before:  # the emits of python-socketio
                for seat in range(changes):
                    self._redis.publish(channel, emit(lesson, "seat_changed", {"seat": seat, "client_id": "p1"}))
            else:
                load("take_turns", clients=MOVERS, attempts=TURNS)
            idle = [node.process.cpu_at_rest() - spent for node, spent in zip(nodes[2:], cpu[2:], strict=True)]
            after = self._read_bytes(own)
        each = after.pop(0) - before.pop(0)
        reads = [round((after[name] - before[name]) / each, 2) for name in before]
        readers = [share for share in reads if share > 0.5]
        idle_us = f"{sum(idle) / len(idle) * 1e6 / changes:.0f}" if idle else ""
        return f"{len(nodes)}{' before' * is_before}", str(len(readers)), f"{sum(readers):.2f}", idle_us

    def _read_bytes(self, own: PubSub) -> dict[int, int]:
        """Return the bytes that Redis has sent to each subscriber, by the id of its connection; ours has the id 0."""
        assert own.connection is not None
        while own.get_message(timeout=0.2) is not None:
            pass
        own.connection.send_command("CLIENT", "ID")
        own_id = own.connection.read_response()
        clients = self._redis.client_list(_type="pubsub")
        return {
            0 if int(client["id"]) == own_id else int(client["id"]): int(client["tot-net-out"]) for client in clients
        }

    # Class start

    def _class_start(self) -> Rows:
        """Measure class starts of both trees, in turn, and return the medians of the rounds."""
        figures: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(self._rounds):
            for name, root in (("before", self._before), ("now", None)):
                with self._running(1, root) as nodes, self._workloads(nodes[0]) as workloads:
                    workloads.warm_up()
                    for _ in range(3):
                        start = workloads.class_start()
                        figures[name].append((start["join_us"], start["end_us"]))
        lives = {name: statistics.median(map(sum, costs)) for name, costs in figures.items()}
        return [
            (
                name,
                *(f"{statistics.median(column):.0f}" for column in zip(*costs, strict=True)),
                f"{lives[name]:.0f}",
                f"{lives[name] / lives['before']:.3f}",
            )
            for name, costs in figures.items()
        ]

    # Servers and loads

    @contextmanager
    def _running(self, count: int, root: Path | None = None) -> Iterator[list[Running]]:
        """Start nodes, of another working tree if there is a root."""
        ours = CONTESTANTS[OURS]
        environ = {} if root is None else {"PYTHONPATH": str(root)}
        contestant = Contestant(ours.name, ours.title, ours.command, environ)
        self._redis.flushall()
        with ExitStack() as stack:
            log = self._directory / "nodes.log"
            yield [
                stack.enter_context(running(contestant, self._stores, self._key, self._core, log)) for _ in range(count)
            ]

    @contextmanager
    def _workloads(self, node: Running) -> Iterator[Workloads]:
        with load_generator(node.port, self._key) as load:
            yield Workloads(node, load, self._stores, CLASS)

    @contextmanager
    def _people(self, nodes: Sequence[Running], lesson: int, count: int) -> Iterator[LoadProcess]:
        """Let people join a lesson."""
        ports = ",".join(str(node.port) for node in nodes)
        command = ("--ports", ports, "--lesson", f"bench-{lesson}", "--seats", str(SEATS))
        with subprocess.Popen(
            (sys.executable, str(Path(__file__).parent / "seat_load.py"), *command),
            env=os.environ | {"BENCH_KEY": self._key},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as child:
            try:
                load = LoadProcess(child)
                load("prepare", first=0, count=count)
                load("connect", first=0, count=count)
                for node in nodes:
                    node.process.cpu_at_rest()
                yield load
            finally:
                child.kill()

    def _tell_end(self, lesson: int) -> None:
        self._redis.execute_command("SPUBLISH", room(lesson), emit(lesson, "end"))  # type: ignore[no-untyped-call]


def room(lesson: int) -> str:
    """Return the channel of a lesson."""
    return f"lesson_node_room:{{lesson_seat_bench-{lesson}}}"


def emit(lesson: int, event: str, *data: dict[str, Any]) -> str:
    """Return the message of an emit to a lesson."""
    return json.dumps({"method": "emit", "event": event, "namespace": "/", "room": f"bench-{lesson}", "data": data})


def cpu_of(nodes: Sequence[Running], load: LoadProcess, command: str, **arguments: float) -> tuple[Any, float]:
    """Run a command of the load, and return its answer and the CPU of the nodes in µs, until they are at rest."""
    before = sum(node.process.cpu() for node in nodes)
    phase = load(command, **arguments)
    return phase, (sum(node.process.cpu_at_rest() for node in nodes) - before) * 1e6


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the root of an older working tree")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    started = time.monotonic()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="lesson-bench-") as directory:
        Path(directory).chmod(0o755)  # PostgreSQL has a user of its own
        Bench(Path(directory), args.before, args.rounds).run(console)
    console.print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
