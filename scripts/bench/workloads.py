"""The workloads: what the clients do, and the figures that are measured.

class start
    Lessons of 30 begin at once: all clients connect, join as soon as they are connected, and at the end all leave.
phases
    A class start in three steps, each started when the server is at rest: all connect, all join, all leave.
storm
    All clients of a running class close their sockets at once, and connect and join again at once.
steady
    Clients come at a fixed rate, the same for all servers; each joins, stays for a second, and leaves.
hold
    More and more clients are held; at each level a few hundred visitors connect, join and leave.
workers
    A class start on lesson-server in one process and in several; all processes, also the load, share all cores.

A figure in µs is the server's CPU for one client.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants import BenchError, Running
from measuring import StoreCount, Stores

Figures = dict[str, float]

# The number of lessons, of 30 seats each: enough for the highest level of held clients and the visitors.
LESSONS = 1_000
SEATS = 30
# The number of the first visitor of the hold workload.
VISITORS = 25_000

STAY = 1.0
IDLE_SECONDS = 2.0
# From fewer pings than this in an idle time, the cost of a ping can't be computed.
ENOUGH_PINGS = 100

# A server is warm when the median cost of its last WARM_WINDOW class starts is at most WARM_SHARE below the median of
# the WARM_WINDOW class starts before.
WARM_WINDOW = 3
WARM_SHARE = 0.03


@dataclass(frozen=True)
class Scale:
    """The sizes of the workloads.

    Attributes:
        clients: clients in class start, phases and storm.
        warm_ups: the maximum of class starts that do not count, before the first workload.
        rates: rates of steady, in clients a second, ascending.
        seconds: seconds during which clients come at each rate of steady.
        levels: numbers of held clients in hold.
        visitors: visitors at each level of hold.
        visits: visits at each level of hold.
    """

    clients: int
    warm_ups: int
    rates: tuple[int, ...]
    seconds: float
    levels: tuple[int, ...]
    visitors: int
    visits: int


class LoadProcess:
    """The process of the load generator."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self._child = child

    def __call__(self, command: str, **arguments: float) -> dict[str, Any]:
        """Execute a command in the load generator and return its answer.

        Raises:
            BenchError: no client succeeded, or the load generator has ended.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise BenchError("the load generator has ended")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("failed", 0) > 0 and answer["failed"] >= answer["clients"]:
            raise BenchError(f"{command}: all {answer['clients']} clients failed: {answer['failures']}")
        return answer


@contextmanager
def load_generator(port: int, key: str) -> Iterator[LoadProcess]:
    """Start the load generator for a server; at the end, kill the load generator and so all clients."""
    with subprocess.Popen(
        (sys.executable, str(Path(__file__).parent / "load_generator.py"), "--port", str(port)),
        env=os.environ | {"BENCH_KEY": key},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            yield LoadProcess(child)
        finally:
            child.kill()


class Workloads:
    """The workloads on one running server.

    Args:
        server: the server.
        load: the server's load generator.
        stores: the server's stores.
        scale: the sizes of the workloads.
    """

    def __init__(self, server: Running, load: LoadProcess, stores: Stores, scale: Scale) -> None:
        self._process = server.process
        self._port = server.port
        self._load = load
        self._stores = stores
        self._scale = scale
        self._load("prepare", first=0, count=scale.clients)
        self._process.cpu_at_rest()  # as after every phase

    def warm_up(self) -> list[float]:
        """Run class starts that do not count, until their cost stops falling: compilers and allocators need some.

        Returns:
            the cost of each class start.
        """
        costs: list[float] = []
        while len(costs) < self._scale.warm_ups and not is_warm(costs):
            costs.append(self.class_start()["life_us"])
        return costs

    def class_start(self, look: Callable[[], Figures] = dict) -> Figures:
        """Run a class start and return its figures.

        Args:
            look: called when all clients have joined; its figures are added.
        """
        clients = self._scale.clients
        self._stores.empty_redis()
        came, joining = self._cpu_of("connect", first=0, count=clients)
        looked = look()
        left, leaving = self._cpu_of("leave")
        return {
            "join_us": joining / clients,
            "end_us": leaving / clients,
            "life_us": (joining + leaving) / clients,
            "joins_per_s": clients / came["seconds"],
            "lives_per_s": clients / (came["seconds"] + left["seconds"]),
            **_answers(came),
            "generator_us": (came["cpu"] + left["cpu"]) * 1e6 / clients,
            **looked,
        }

    def workers(self) -> Figures:
        """Run a class start and return its figures, and how evenly the server's workers share the clients."""
        return self.class_start(self._shares)

    def _shares(self) -> Figures:
        held = self._process.connections(self._port)
        return {
            "busiest_percent": 100 * max(held) / sum(held),
            "least_busy_percent": 100 * min(held) / sum(held),
        }

    def counted_class_start(self) -> Figures:
        """Run a class start and return the work of the stores; its times are left out, because counting slows it."""
        clients = self._scale.clients
        self._stores.empty_redis()
        with self._stores.counting() as joins:
            self._cpu_of("connect", first=0, count=clients)
        with self._stores.counting() as ends:
            self._cpu_of("leave")
        return {"joins": clients, **_counts("join", joins), **_counts("end", ends)}

    def phases(self) -> Figures:
        clients = self._scale.clients
        self._stores.empty_redis()
        _, connect = self._cpu_of("connect", first=0, count=clients, join=False)
        joined, join = self._cpu_of("join")
        _, end = self._cpu_of("leave")
        return {
            "connect_us": connect / clients,
            "join_us": join / clients,
            "end_us": end / clients,
            "joins_per_s": clients / joined["seconds"],
            **_answers(joined),
        }

    def storm(self) -> Figures:
        clients = self._scale.clients
        self._stores.empty_redis()
        self._cpu_of("connect", first=0, count=clients)
        before = self._process.cpu()
        dropped = self._load("drop")
        came = self._load("connect", first=0, count=clients, seed=2)
        cpu = self._process.cpu_at_rest() - before
        self._cpu_of("leave")
        return {
            "return_us": cpu * 1e6 / clients,
            "seconds": dropped["seconds"] + came["seconds"],
            **_answers(came),
        }

    def steady(self, rate: float) -> Figures:
        """Return the figures of a rate; a server that did not keep up has unfinished work afterwards."""
        self._stores.empty_redis()
        self._load("prepare", first=0, count=int(rate * self._scale.seconds))
        phase, cpu = self._cpu_of("steady", first=0, rate=rate, seconds=self._scale.seconds, stay=STAY)
        if not phase["kept_up"]:
            return not_kept_up(rate)
        return {"rate": rate, "kept_up": True, "life_us": cpu / phase["clients"], **_answers(phase)}

    def hold(self, advance: Callable[[str], None]) -> list[dict[str, Any]]:
        """Return the figures of each level."""
        self._stores.empty_redis()
        self._load("prepare", first=0, count=max(self._scale.levels))
        self._load("prepare", first=VISITORS, count=self._scale.visitors)
        self._visit()  # one-time allocations must not count in the first level
        levels: list[dict[str, Any]] = []
        held, failed, empty_rss = 0, 0, self._rss_at_rest()
        for level in self._scale.levels:
            advance(f"{level:,} held")
            came = self._load("connect", first=held, count=level - held, calm=True)
            failed += came["failed"]
            held = level
            rss = self._rss_at_rest()
            before = self._process.cpu()
            idle = self._load("idle", seconds=IDLE_SECONDS)
            idle_us = (self._process.cpu() - before) * 1e6
            self._process.background = idle_us / 1e6 / IDLE_SECONDS
            visits = [self._visit() for _ in range(self._scale.visits)]
            levels.append(
                {
                    "held": held,
                    "failed": failed,
                    "rss_kb": rss,
                    "rss_kb_per_held": (rss - empty_rss) / held,
                    "idle_us": idle_us,
                    "idle_pings": idle["pings"],
                    "visits": visits,
                }
            )
        _take_pings_off(levels, self._scale.visitors)
        return levels

    def _visit(self) -> Figures:
        """Let the visitors connect, join and leave beside the held clients, and return the figures."""
        count = self._scale.visitors
        visitors = {"first": VISITORS, "count": count}
        connected, connect = self._cpu_of("connect", **visitors, join=False)
        joined, join = self._cpu_of("join")
        left, end = self._cpu_of("leave", **visitors)
        return {
            "connect_us": connect / count,
            "join_us": join / count,
            "end_us": end / count,
            "connect_pings": connected["pings"],
            "join_pings": joined["pings"],
            "end_pings": left["pings"],
        }

    def _rss_at_rest(self) -> int:
        self._process.cpu_at_rest()
        return self._process.rss_kb()

    def _cpu_of(self, command: str, **arguments: float) -> tuple[dict[str, Any], float]:
        """Run a phase and return its answer and the server's CPU, in µs, until the server is at rest again."""
        before = self._process.cpu()
        phase = self._load(command, **arguments)
        return phase, (self._process.cpu_at_rest() - before) * 1e6


def is_warm(costs: Sequence[float]) -> bool:
    """Return whether the cost of class starts has stopped falling.

    Args:
        costs: the cost of each class start so far.
    """
    if len(costs) < 2 * WARM_WINDOW:
        return False
    before, last = costs[-2 * WARM_WINDOW : -WARM_WINDOW], costs[-WARM_WINDOW:]
    return statistics.median(last) >= (1 - WARM_SHARE) * statistics.median(before)


def not_kept_up(rate: float) -> Figures:
    """Return the figures of a steady rate that the server did not keep up with."""
    return {"rate": rate, "kept_up": False}


def _take_pings_off(levels: list[dict[str, Any]], visitors: int) -> None:
    """Subtract from each visit the cost of the held clients' pings during the visit."""
    telling = [level["idle_us"] / level["idle_pings"] for level in levels if level["idle_pings"] >= ENOUGH_PINGS]
    ping_us = statistics.median(telling) if telling else 0.0
    for level in levels:
        level["ping_us"] = ping_us
        for visit in level["visits"]:
            for step in ("connect", "join", "end"):
                visit[f"{step}_us"] -= visit.pop(f"{step}_pings") * ping_us / visitors
            visit["life_us"] = visit["connect_us"] + visit["join_us"] + visit["end_us"]


def _counts(what: str, count: StoreCount) -> Figures:
    return {
        f"queries_{what}": count.queries,
        f"redis_reads_{what}": count.redis_reads,
        f"redis_commands_{what}": count.redis_commands,
    }


def _answers(phase: dict[str, Any]) -> Figures:
    """Return the latencies of a phase's acknowledgements, and the percentage of clients that got an error or none."""
    cuts = statistics.quantiles(phase["ack_ms"], n=100, method="inclusive")
    return {
        "ack_p50_ms": cuts[49],
        "ack_p95_ms": cuts[94],
        "ack_p99_ms": cuts[98],
        "arrival_p95_ms": statistics.quantiles(phase["arrival_ms"], n=100, method="inclusive")[94],
        "failed_percent": 100 * phase["failed"] / phase["clients"],
    }
