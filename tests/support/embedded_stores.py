"""Embedded stores in folders of their own, and the processes that own them."""

import os
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import psycopg2
import redis

from lesson_server.embedded.stores import EmbeddedStores

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}

OWNER = """
import sys
from pathlib import Path
from lesson_server.embedded.stores import EmbeddedStores
with EmbeddedStores(Path(sys.argv[1])) as stores:
    stores.start(lambda line: None)
    print("ready", flush=True)
    sys.stdin.read()
"""


def quiet(line: str) -> None:
    pass


def processes_of(directory: Path) -> list[psutil.Process]:
    """Whatever names the directory, or a part of it, on its command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(str(directory)) for word in process.info["cmdline"] or []) and process.pid != os.getpid()
    ]


def query(dsn: str, sql: str) -> list[tuple]:
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


def lessons(dsn: str) -> list[tuple]:
    return query(dsn, "SELECT id, title, seat_count FROM lessons ORDER BY id")


def valkey(stores: EmbeddedStores) -> redis.Redis:
    return redis.Redis.from_url(stores.redis_url, decode_responses=True)


def pid_of_postgresql(data_dir: Path) -> int:
    return int((data_dir / "postgresql/postmaster.pid").read_text().partition("\n")[0])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def spawn_owner(data_dir: Path, *prefix: str, code: str = OWNER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, str(data_dir)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_owner(data_dir: Path) -> list[psutil.Process]:
    """Leave behind what a killed owner does: its two servers, returned."""
    with spawn_owner(data_dir) as owner:
        assert owner.stdout.readline() == "ready\n"
        owner.kill()
    left_behind = processes_of(data_dir)
    assert {Path(process.cmdline()[0]).name for process in left_behind} == {"postgres", "valkey-server"}
    return left_behind
