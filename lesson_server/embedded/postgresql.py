"""The PostgreSQL of a data directory, and the database with the lessons."""

import os
import shutil
from contextlib import closing, suppress
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

from lesson_server.embedded.data_dir import DataDir
from lesson_server.embedded.errors import EmbeddedError
from lesson_server.embedded.processes import Demotion, Server, spawn

DATABASE = "lessons"
FIRST_LESSON = ("1", 30)  # id, seats: a lesson for the first demo to join

PORT = 5432  # only part of the socket's file name; always given, because PGPORT would change it
SOCKET_DIR = "pg"  # in the directory of the sockets; PostgreSQL's user owns it
SOCKET = f"{SOCKET_DIR}/.s.PGSQL.{PORT}"


class PostgreSQL:
    """PostgreSQL, reachable by a unix socket only.

    Args:
        directory: the data directory, with its sockets made.
        programs: the directory of PostgreSQL's programs.
        user: the user that PostgreSQL runs as.

    Attributes:
        dsn: the libpq connection string of the database with the lessons.
    """

    def __init__(self, directory: DataDir, programs: Path, user: Demotion) -> None:
        self._directory = directory
        self._programs = programs
        self._user = user
        self._socket_dir = directory.sockets / SOCKET_DIR
        where = {"host": str(self._socket_dir), "port": PORT, "user": "postgres"}
        self._maintenance_dsn = make_dsn(dbname="postgres", **where)
        self.dsn: str = make_dsn(dbname=DATABASE, **where)

    # The cluster. It is made under another name and then renamed, so that it is either complete or missing.

    def has_cluster(self) -> bool:
        """Return whether the cluster is there: it is missing before the first start."""
        return self._directory.cluster.exists()

    def spawn_initdb(self) -> Server:
        """Start to make the cluster, under another name; the caller stops initdb if it does not end by itself."""
        new_cluster = self._directory.new_cluster
        if new_cluster.exists():
            shutil.rmtree(new_cluster)
        self._make_dir(new_cluster)
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
        return self._spawn("initdb", new_cluster, *options)

    def rename_new_cluster(self) -> None:
        """Give the cluster that initdb has made its name."""
        self._directory.new_cluster.rename(self._directory.cluster)

    # The server

    def spawn(self) -> Server:
        """Start PostgreSQL on the cluster; the caller stops it."""
        self._make_dir(self._socket_dir)
        self._remove_stale_pid_file()
        return self._spawn(
            "postgres",
            self._directory.cluster,
            *("-c", "listen_addresses="),
            *("-c", f"port={PORT}"),
            *("-c", 'unix_socket_directories="{}"'.format(str(self._socket_dir).replace('"', '""'))),
        )

    def answers(self) -> bool:
        """Return whether PostgreSQL answers."""
        try:
            psycopg2.connect(self._maintenance_dsn, connect_timeout=2).close()
        except psycopg2.OperationalError:
            return False
        return True

    def prepare_database(self) -> None:
        """Make the database, the table and the first lesson if they are missing.

        Raises:
            EmbeddedError: PostgreSQL refuses.
        """
        try:
            _make_database(self._maintenance_dsn)
            _make_table(self.dsn)
        except psycopg2.Error as error:
            raise EmbeddedError(f"can't start the stores in {self._directory.path}: {error}") from error

    def _spawn(self, program: str, cluster: Path, *options: str) -> Server:
        command: list[str | Path] = [*self._user.command, self._programs / program, "-D", cluster, *options]
        return spawn("PostgreSQL", command, self._directory.root)

    def _make_dir(self, path: Path) -> None:
        path.mkdir(mode=0o700)
        os.chown(path, self._user.uid, self._user.gid)

    def _remove_stale_pid_file(self) -> None:
        """Remove the pid file of a killed PostgreSQL.

        PostgreSQL removes the file itself, unless the pid now belongs to another process: then PostgreSQL refuses to
        start. If somebody has started PostgreSQL here by hand, its pid file stays, and our PostgreSQL refuses to start.
        """
        import psutil

        cluster = self._directory.cluster
        pid_file = cluster / "postmaster.pid"
        with suppress(FileNotFoundError, psutil.Error):
            try:
                process = psutil.Process(int(pid_file.read_text().partition("\n")[0]))
                stale = process.name() != "postgres" or any(
                    # A relative path may be our cluster: in a container, not even root may see what it is relative to.
                    option == "-D" and Path(directory).is_absolute() and Path(directory).resolve() != cluster
                    for option, directory in pairwise(process.cmdline())
                )
            except ValueError:
                stale = True  # truncated by a power failure
            if stale:
                pid_file.unlink()


def _make_database(maintenance_dsn: str) -> None:
    with closing(psycopg2.connect(maintenance_dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE {DATABASE}")


def _make_table(dsn: str) -> None:
    """Make the table, and with it the first lesson, in one transaction: a lesson that is deleted stays deleted."""
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('lessons') IS NULL")
        (first_start,) = cursor.fetchone()
        cursor.execute(files("lesson_server").joinpath("schema.sql").read_text("utf-8"))
        if first_start:
            cursor.execute("INSERT INTO lessons (id, seat_count) VALUES (%s, %s)", FIRST_LESSON)
