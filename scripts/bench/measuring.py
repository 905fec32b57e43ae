"""The measurements besides time: a server's CPU and memory, the queries to RDS, the reads of Redis.

CPU
    The nanoseconds that the kernel ran the process and its children, in user and in kernel mode: the CPU clock of each
    process. The clock includes threads that have ended: Bun's compiler and garbage collector end their threads after
    ten idle seconds. ``/proc/<pid>/stat`` has the same time, rounded to hundredths of a second.
Connections
    The established TCP sockets of a process at the server's port.
Memory
    ``Rss`` of ``/proc/<pid>/smaps_rollup``.
Queries
    The statements that PostgreSQL logs while ``log_statement`` is ``all``. PostgreSQL's statistics have the
    same number, but up to ten seconds later.
Round trips
    The number of Valkey's reads from sockets (``total_reads_processed``): Valkey reads at once what a client writes at
    once, one command or a pipeline.
"""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg2
import redis

# The kernel's number of the clock that counts the run time of a process.
CPUCLOCK_SCHED = 2

STATEMENT = re.compile(rb"LOG:  (?:statement|execute [^:]*): ")

# A server is at rest when, in two samples in a row, it ran for less than this share of the time. Its background share,
# for clients that it merely holds, is added, with some slack.
REST_SHARE = 0.01
BACKGROUND_SLACK = 1.5
REST_LOOK = 0.03
REST_PATIENCE = 6.0

# The key in which the nodes of lesson-server count their writes, and a script that deletes all other keys at once.
NODE_COUNTS = "lesson_node_counts"
EMPTY = """
for _, key in ipairs(redis.call('KEYS', '*')) do
    if key ~= ARGV[1] then redis.call('DEL', key) end
end
"""


class Process:
    """A server under test, and its children.

    Args:
        pid: the pid of the server.

    Attributes:
        background: the share of the time that the server runs for clients that it merely holds.
    """

    def __init__(self, pid: int) -> None:
        self.background = 0.0
        self._pid = pid

    def cpu(self) -> float:
        """Return the CPU seconds so far."""
        return sum(self.cpu_of_each().values())

    def cpu_of_each(self) -> dict[int, float]:
        """Return the CPU seconds so far of the server and of each of its children, by pid."""
        seconds: dict[int, float] = {}
        for pid in self._family(self._pid):
            try:
                seconds[pid] = time.clock_gettime_ns(_cpu_clock(pid)) / 1e9
            except OSError:
                if pid == self._pid:
                    raise
                # A child that has ended since it was listed, such as a backend of PostgreSQL.
        return seconds

    def cpu_at_rest(self) -> float:
        """Wait until the server is at rest and return its CPU seconds, so that work after an answer counts as well."""
        deadline = time.monotonic() + REST_PATIENCE
        share = REST_SHARE + BACKGROUND_SLACK * self.background
        before, quiet = self.cpu(), 0
        while quiet < 2 and time.monotonic() < deadline:
            time.sleep(REST_LOOK)
            now = self.cpu()
            quiet = quiet + 1 if now - before < REST_LOOK * share else 0
            before = now
        return before

    def rss_kb(self) -> int:
        """Return the resident memory in kilobytes."""
        kilobytes = 0
        for pid in self._family(self._pid):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found = re.search(r"^Rss:\s+(\d+) kB$", rollup, re.MULTILINE)
            assert found is not None
            kilobytes += int(found[1])
        return kilobytes

    def connections(self, port: int) -> list[int]:
        """Return how many clients each worker holds; the workers are the server's children, or the server itself.

        Args:
            port: the port of the server.
        """
        holders = Counter(
            connection.pid
            for connection in psutil.net_connections("tcp4")
            if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
        )
        parent, *workers = self._family(self._pid)
        return [holders[pid] for pid in workers or [parent]]

    def _family(self, pid: int) -> Iterator[int]:
        yield pid
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the process has ended since it was listed
                for child in children.read_text().split():
                    yield from self._family(int(child))


def _cpu_clock(pid: int) -> int:
    """Return what clock_getcpuclockid(3) returns for a process; Python has it for threads only."""
    return (~pid << 3) | CPUCLOCK_SCHED


@dataclass
class StoreCount:
    """The work of the stores: SQL statements, and the socket reads and the commands of Redis."""

    queries: int = 0
    redis_reads: int = 0
    redis_commands: int = 0


class Stores:
    """Access to the stores that all servers use.

    Args:
        dsn: the DSN of PostgreSQL, as its superuser.
        redis_url: the URL of Valkey.
        log: the log file of PostgreSQL.
    """

    def __init__(self, dsn: str, redis_url: str, log: Path) -> None:
        self.dsn = dsn
        self.redis_url = redis_url
        self._log = log
        self._redis = redis.Redis.from_url(redis_url, decode_responses=True)

    def add_lessons(self, count: int, seats: int) -> None:
        """Make the lessons ``bench-0``, ``bench-1`` and so on."""
        self._execute(
            "INSERT INTO lessons (id, seat_count)"
            f" SELECT 'bench-' || n, {int(seats)} FROM generate_series(0, {int(count) - 1}) n ON CONFLICT DO NOTHING",
            "ANALYZE lessons",
        )

    def empty_redis(self) -> None:
        """Delete all keys except NODE_COUNTS, so that no next join is a reconnect.

        Without its write counts, lesson-server would treat the empty Redis as one that has lost its data, and would
        write all of its presence again during the measurement.
        """
        self._redis.eval(EMPTY, 0, NODE_COUNTS)

    def versions(self) -> dict[str, str]:
        """Return the versions of both stores."""
        with closing(psycopg2.connect(self.dsn)) as connection:
            version = str(connection.server_version // 10_000)
        return {"PostgreSQL": version, "Valkey": self._redis.info("server")["valkey_version"]}

    @contextmanager
    def counting(self) -> Iterator[StoreCount]:
        """Count the work of the stores; the numbers are set at the end, and the logging slows PostgreSQL down."""
        count = StoreCount()
        self._log_statements("all")
        start = self._log.stat().st_size
        reads, commands = self._redis_counters()
        try:
            yield count
        finally:
            reads_now, commands_now = self._redis_counters()
            # Our own INFO is one read and one command.
            count.redis_reads, count.redis_commands = reads_now - reads - 1, commands_now - commands - 1
            with self._log.open("rb") as log:
                log.seek(start)
                count.queries = len(STATEMENT.findall(log.read()))
            self._log_statements("none")

    def _redis_counters(self) -> tuple[int, int]:
        stats = self._redis.info("stats")
        return int(stats["total_reads_processed"]), int(stats["total_commands_processed"])

    def _log_statements(self, which: str) -> None:
        self._execute(f"ALTER SYSTEM SET log_statement = '{which}'", "SELECT pg_reload_conf()")
        time.sleep(0.3)  # until every backend has seen the signal

    def _execute(self, *statements: str) -> None:
        with closing(psycopg2.connect(self.dsn)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
