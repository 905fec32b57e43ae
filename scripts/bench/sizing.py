"""``python scripts/bench/sizing.py``: what docs/sizing.md calculates with, besides docs/benchmarks.json.

It measures one process of lesson-server, and writes docs/sizing.json.

arrivals
    Clients come at a fixed rate, join, stay for a second and leave: for each client the CPU of Redis and of RDS, the
    queries, the bytes between server and Redis.
held
    Clients that have joined stay: for each of them the CPU of the server and of Redis in a second (pings, heartbeats,
    checks of presence), its memory in Redis, the bytes on its connection, and the segments of TCP that carry them.
"""

import argparse
import json
import os
import resource
import secrets
import socket
import statistics
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import machine
import psutil
import psycopg2
import redis
from contestants import CONTESTANTS, OURS, ROOT, Running, running
from load_generator import Load
from measuring import Process, Stores
from run import running_stores
from workloads import LESSONS, SEATS, STAY

RATES = (50, 250, 500)
SECONDS = 5.0
ROUNDS = 3
WARM_UPS = 6
CLASS = 500
HELD = 5_000
HOLD_SECONDS = 60.0

# Of the kernel's struct tcp_info: bytes_acked, bytes_received, segs_out, segs_in.
TCP_INFO_SIZE, TCP_COUNTERS = 144, struct.Struct("@120xQQII")

Figures = dict[str, float]


class Bench:
    """One run.

    Args:
        stores: the stores of the server.
        server: the server.
        load: the clients, in this process.
    """

    def __init__(self, stores: Stores, server: Running, load: Load) -> None:
        self._stores = stores
        self._server = server.process
        self._load = load
        self._redis = redis.Redis.from_url(stores.redis_url, decode_responses=True)
        self._redis_process = Process(self._redis.info("server")["process_id"])
        with closing(psycopg2.connect(stores.dsn)) as connection:
            backend = psutil.Process(connection.info.backend_pid)
            self._rds_process = Process(backend.ppid())

    def warm_up(self) -> None:
        """Run class starts that do not count."""
        for _ in range(WARM_UPS):
            self._load.connect(first=0, count=CLASS)
            self._load.leave()

    def arrivals(self, rate: int) -> Figures:
        """Return the figures of one client when clients come at a rate, in clients a second."""
        count = int(rate * SECONDS)
        self._stores.empty_redis()
        self._load.prepare(first=0, count=count)
        return self._during(lambda: self._load.steady(first=0, rate=rate, seconds=SECONDS, stay=STAY), count)

    def queries(self, rate: int) -> float:
        """Return the queries to RDS for one client; they are counted apart, because counting them costs CPU."""
        self._stores.empty_redis()
        with self._stores.counting() as count:
            self._load.steady(first=0, rate=rate, seconds=SECONDS, stay=STAY)
        return count.queries / int(rate * SECONDS)

    def held(self, clients: int, seconds: float) -> Figures:
        """Return the figures of one held client for a second, and what its arrival sent and received."""
        self._stores.empty_redis()
        empty = self._redis.info("memory")["used_memory"]
        self._load.prepare(first=0, count=clients)
        self._load.connect(first=0, count=clients, calm=True)
        self._server.cpu_at_rest()
        arrived = self._traffic()
        memory = self._redis.info("memory")["used_memory"] - empty
        figures = self._during(lambda: self._load.idle(seconds), clients * seconds)
        stayed = self._traffic()
        self._load.leave()
        return {
            **figures,
            "redis_memory": memory / clients,
            **{f"arrival_{name}": number / clients for name, number in arrived.items()},
            **{name: (stayed[name] - arrived[name]) / clients / seconds for name in arrived},
        }

    def _during(self, work: Callable[[], object], units: float) -> Figures:
        """Return what the server and the stores do meanwhile, divided by the units of work."""
        processes = {"server_us": self._server, "redis_us": self._redis_process, "rds_us": self._rds_process}
        before = {name: process.cpu_of_each() for name, process in processes.items()}
        stats = self._redis.info("stats")
        work()
        self._server.cpu_at_rest()
        now = self._redis.info("stats")
        counters = {
            "redis_commands": "total_commands_processed",
            "redis_bytes_in": "total_net_input_bytes",
            "redis_bytes_out": "total_net_output_bytes",
        }
        return {
            **{name: _spent(before[name], process.cpu_of_each()) * 1e6 / units for name, process in processes.items()},
            **{name: (now[counter] - stats[counter]) / units for name, counter in counters.items()},
        }

    def _traffic(self) -> dict[str, int]:
        """Return the bytes and the segments that all clients together have sent and received, without headers."""
        sums = [0, 0, 0, 0]
        for client in self._load.connected():
            counters = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
            sums = [total + number for total, number in zip(sums, TCP_COUNTERS.unpack(counters), strict=True)]
        return dict(zip(("bytes_sent", "bytes_received", "segments_sent", "segments_received"), sums, strict=True))


def _spent(before: dict[int, float], now: dict[int, float]) -> float:
    """Return the CPU seconds spent by the processes that are still there: PostgreSQL ends and starts some by itself."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in now.items())


def median(rounds: Sequence[Figures]) -> Figures:
    """Return the median of each figure, to four significant digits."""
    return {name: float(f"{statistics.median(figures[name] for figures in rounds):.4g}") for name in rounds[0]}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description="Measure what docs/sizing.md calculates with.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/sizing.json", help="default: %(default)s")
    output: Path = parser.parse_args().output
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cores = os.sched_getaffinity(0)
    core = min(cores) if len(cores) > 1 else None
    os.sched_setaffinity(0, cores - {core})  # child processes inherit it
    key = secrets.token_urlsafe(32)
    others = machine.Others()
    with tempfile.TemporaryDirectory(prefix="lesson-sizing-") as folder, running_stores(Path(folder)) as stores:
        stores.add_lessons(LESSONS, SEATS)
        with running(CONTESTANTS[OURS], stores, key, core, Path(folder) / "log") as server:
            bench = Bench(stores, server, Load("127.0.0.1", server.port, key))
            bench.warm_up()
            results = {
                "arrivals": {
                    str(rate): {
                        **median([bench.arrivals(rate) for _ in range(ROUNDS)]),
                        **median([{"rds_queries": bench.queries(rate)}]),
                    }
                    for rate in RATES
                },
                "held": median([bench.held(HELD, HOLD_SECONDS)]),
            }
        about = machine.about(stores.versions()) | {"others_percent": others.percent(), "held": HELD}
    output.write_text(json.dumps({"about": about, **results}, indent=1) + "\n", "utf-8")
    print(output.read_text("utf-8"))


if __name__ == "__main__":
    main()
