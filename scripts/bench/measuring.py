"""What is measured besides time: a server's CPU and memory, the queries that RDS saw, what Redis read.

CPU
    The nanoseconds that the kernel ran the process and its children, in user and in kernel mode: the CPU clock of each
    process. It counts threads that have ended, too: Bun's compiler and its garbage collector end theirs after ten idle
    seconds. ``/proc/<pid>/stat`` rounds the same to hundredths of a second.
Connections
    The established TCP sockets of a process at the server's port.
Memory
    ``Rss`` of ``/proc/<pid>/smaps_rollup``.
Queries
    The statements that PostgreSQL logs while ``log_statement`` is ``all``. Its statistics would say the same up to ten
    seconds later.
Round trips
    How often Valkey read from a socket (``total_reads_processed``): what a client writes at once is read at once, be
    it one command or a pipeline.
"""

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

# What the kernel calls the clock that counts the time that a process was run.
CPUCLOCK_SCHED = 2

STATEMENT = re.compile(rb"LOG:  (?:statement|execute [^:]*): ")

# A server is at rest when it ran less than this share of the time, over two looks in a row; besides what it does for
# clients that it holds, with some slack.
REST_SHARE = 0.01
BACKGROUND_SLACK = 1.5
REST_LOOK = 0.03
REST_PATIENCE = 6.0

# Where the nodes of lesson-server count their writes; and what deletes everything else, in one step.
NODE_COUNTS = "lesson_node_counts"
EMPTY = """
for _, key in ipairs(redis.call('KEYS', '*')) do
    if key ~= ARGV[1] then redis.call('DEL', key) end
end
"""


class Process:
    """A server under test, and its children.

    Args:
        pid: of the process.

    Attributes:
        background: the share of the time that it runs for clients that it merely holds.
    """

    def __init__(self, pid: int) -> None:
        self.background = 0.0
        self._pid = pid

    def cpu(self) -> float:
        """Seconds that it has run so far."""
        return sum(time.clock_gettime_ns(_cpu_clock(pid)) for pid in self._family(self._pid)) / 1e9

    def cpu_at_rest(self) -> float:
        """Seconds that it has run, when it has nothing left to do: what follows an answer counts as well."""
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
        """Return the kilobytes of its resident memory."""
        kilobytes = 0
        for pid in self._family(self._pid):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found = re.search(r"^Rss:\s+(\d+) kB$", rollup, re.MULTILINE)
            assert found is not None
            kilobytes += int(found[1])
        return kilobytes

    def connections(self, port: int) -> list[int]:
        """Return how many clients each worker holds. The workers are its children, or the process itself.

        Args:
            port: of the server.
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
            for child in children.read_text().split():
                yield from self._family(int(child))


def _cpu_clock(pid: int) -> int:
    """Return what clock_getcpuclockid(3) returns for a process; Python has it for threads only."""
    return (~pid << 3) | CPUCLOCK_SCHED


@dataclass
class StoreCount:
    """What the stores had to do: SQL statements; reads from sockets and commands of Redis."""

    queries: int = 0
    redis_reads: int = 0
    redis_commands: int = 0


class Stores:
    """The stores that all servers use, from outside.

    Args:
        dsn: of PostgreSQL, whose superuser we are.
        redis_url: of Valkey.
        log: PostgreSQL's.
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
        """Forget all presence: the next joins are nobody's reconnect.

        How many writes lesson-server has counted stays: else it would take the emptied Redis for one that has lost its
        data, and write all of its presence again in the middle of what is measured.
        """
        self._redis.eval(EMPTY, 0, NODE_COUNTS)

    def versions(self) -> dict[str, str]:
        """Of both."""
        with closing(psycopg2.connect(self.dsn)) as connection:
            version = str(connection.server_version // 10_000)
        return {"PostgreSQL": version, "Valkey": self._redis.info("server")["valkey_version"]}

    @contextmanager
    def counting(self) -> Iterator[StoreCount]:
        """Count what happens meanwhile; the numbers are there at the end. Logging slows PostgreSQL down."""
        count = StoreCount()
        self._log_statements("all")
        start = self._log.stat().st_size
        reads, commands = self._redis_counters()
        try:
            yield count
        finally:
            reads_now, commands_now = self._redis_counters()
            # One read and one command of INFO are our own.
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
