"""The contestants: lesson-server and its peers, each a server on the same stores with the same key."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from measuring import Process, Stores
from psycopg2.extensions import parse_dsn

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEERS = HERE / "peers"

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0


class BenchError(Exception):
    """There are no figures; the message is the reason, for people."""


@dataclass(frozen=True)
class Contestant:
    """A server under test.

    Attributes:
        name: the name in the results.
        title: the name for people.
        command: the program and its arguments.
        environ: environment variables besides the common ones.
        prepare: installs missing dependencies.
        ready: the output that it serves now, if its port accepts connections earlier.
        stop: the signal that ends the server. The default avoids a wait for disconnects of thousands of clients.
    """

    name: str
    title: str
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    ready: bytes = b""
    stop: signal.Signals = signal.SIGKILL


OURS = "lesson_server"

NODE, BUN = PEERS / "node", PEERS / "bun"
BUN_COMMAND = BUN / "node_modules/.bin/bun"


def prepare_node() -> None:
    """Install the dependencies of the peer on Node, if they are missing.

    Raises:
        BenchError: there is no Node, or npm failed.
    """
    _require_npm("Node")
    if not (NODE / "node_modules/socket.io").exists() and not _npm_install(NODE):
        raise BenchError("npm could not install what the peer on Node needs; --only leaves it out")


def prepare_bun() -> None:
    """Install the dependencies of the peer on Bun, including Bun itself, if they are missing.

    Raises:
        BenchError: there is no Node, which npm runs on, or npm failed, or Bun does not run on this machine.
    """
    _require_npm("Bun")
    if _succeeds(str(BUN_COMMAND), "--version"):
        return
    # Whether npm runs Bun's install script depends on npm's version and settings, so we run the script ourselves. The
    # engine's only peer dependency is TypeScript, which a server in JavaScript does not need.
    package = BUN / "node_modules/bun"
    installed = _npm_install(BUN, "--ignore-scripts", "--omit=peer") and _succeeds("node", "install.js", cwd=package)
    if not installed or not _succeeds(str(BUN_COMMAND), "--version"):
        raise BenchError("npm could not install what the peer on Bun needs; --only leaves it out")


def _require_npm(runtime: str) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise BenchError(f"the peer on {runtime} needs node and npm; --only leaves it out")


def _npm_install(folder: Path, *options: str) -> bool:
    return _succeeds("npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent", *options, cwd=folder)


def _succeeds(*command: str, cwd: Path | None = None) -> bool:
    try:
        return subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


OUR_COMMAND = (sys.executable, "-m", "lesson_server.cli", "run")

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(OURS, "lesson-server", OUR_COMMAND),
        Contestant("plain_tornado", "plain, Tornado", (sys.executable, str(PEERS / "plain_tornado.py"))),
        Contestant("plain_asgi", "plain, uvicorn", (sys.executable, str(PEERS / "plain_asgi.py"))),
        Contestant("node", "Node socket.io", ("node", str(NODE / "server.js")), prepare=prepare_node),
        Contestant("bun", "Bun socket.io", (str(BUN_COMMAND), str(BUN / "server.js")), prepare=prepare_bun),
        # Not in the usual run. It shows how much of the difference is due to the event loop.
        Contestant(
            "plain_uvloop",
            "plain, Tornado on uvloop",
            (sys.executable, str(PEERS / "plain_tornado.py")),
            {"BENCH_UVLOOP": "1"},
        ),
    )
}
USUAL = (OURS, "plain_tornado", "plain_asgi", "node", "bun")

# lesson-server with 1 worker, the base of the comparison, and with 2. The parent opens the port before it starts the
# workers, and must live until they have ended: the workers of a killed parent could disturb the next contestant.
WORKERS = tuple(
    Contestant(
        f"workers_{count}",
        f"{count} worker{'s' * (count > 1)}",
        (*OUR_COMMAND, "--workers", str(count)),
        ready=b"listening on",
        stop=signal.SIGTERM,
    )
    for count in (1, 2)
)


@dataclass(frozen=True)
class Running:
    """A server that accepts connections."""

    port: int
    process: Process


@contextmanager
def running(contestant: Contestant, stores: Stores, key: str, core: int | None, log: Path) -> Iterator[Running]:
    """Start a server, yield when it accepts connections, and stop the server at the end.

    Args:
        contestant: the server to start.
        stores: the stores that the server uses.
        key: the HS256 key of the access tokens.
        core: the only core that the server may run on; None: all cores that this process may run on.
        log: the file that the server's output is appended to.

    Raises:
        BenchError: the server did not start.
    """
    port = _free_port()
    where = parse_dsn(stores.dsn)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LESSON_")} | {
        "PYTHONPATH": str(ROOT),
        "NODE_ENV": "production",
        "LESSON_RDS_DSN": stores.dsn,
        "LESSON_REDIS_URL": stores.redis_url,
        "LESSON_AUTH_KEY": key,
        "LESSON_SERVER_PORT": str(port),
        "BENCH_DSN": stores.dsn,
        "BENCH_REDIS_URL": stores.redis_url,
        "BENCH_REDIS_SOCKET": unquote(urlsplit(stores.redis_url).path),
        "BENCH_KEY": key,
        "BENCH_PORT": str(port),
        "PGHOST": where["host"],
        "PGPORT": where["port"],
        "PGUSER": where["user"],
        "PGDATABASE": where["dbname"],
        **contestant.environ,
    }
    with log.open("ab") as output:
        log_start = output.tell()
        child = subprocess.Popen(
            contestant.command,
            env=environ,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while contestant.ready not in log.read_bytes()[log_start:] or not _accepts(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{contestant.title} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield Running(port, Process(child.pid))
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(child.pid, contestant.stop)
        child.wait(STOP_TIMEOUT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
