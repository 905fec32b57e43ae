"""Child processes: start them with their output in a log, find them after their parent was killed, stop them.

Specific to the stores are only two things: PostgreSQL gets another user than root, and its fast shutdown is SIGINT.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lesson_server.embedded.errors import EmbeddedError

if TYPE_CHECKING:
    from psutil import Process  # comes with the extra "embedded"

# Seconds. A start includes crash recovery: PostgreSQL replays its WAL, Valkey loads its append-only file.
START_TIMEOUT = 60.0
# Seconds for a shutdown before SIGKILL. A shutdown takes about 0.1 s; both stores are crash-safe.
STOP_TIMEOUT = 10.0
POLL_INTERVAL = 0.02

LOG_LINES = 5  # last lines of a failed server's log, shown to the operator

Checkpoint = Callable[[], None]


# Starting


@dataclass(frozen=True)
class Server:
    """A child process, made by :func:`spawn`: PostgreSQL, Valkey, or the initdb that prepares PostgreSQL's cluster.

    Attributes:
        name: the display name.
        child: the process as a child of ours.
        process: the same process as a psutil object.
        log: the file that the process' output is appended to.
        log_start: the offset in the log at which this output begins.
    """

    name: str
    child: subprocess.Popen[bytes]
    process: "Process"
    log: Path
    log_start: int

    def wait_until(self, ready: Callable[[], bool], checkpoint: Checkpoint) -> None:
        """Wait until ``ready`` returns true.

        Args:
            ready: called every POLL_INTERVAL seconds.
            checkpoint: called before each sleep; an exception that it raises ends the wait.

        Raises:
            EmbeddedError: the server has exited, or took more than START_TIMEOUT seconds.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            has_exited = self.child.poll() is not None  # before `ready`: initdb is ready when it has exited
            if ready():
                return
            checkpoint()
            if has_exited or time.monotonic() > deadline:
                raise EmbeddedError(f"{self.name} did not start; the end of {self.log}:\n{self._last_log_lines()}")
            time.sleep(POLL_INTERVAL)

    def _last_log_lines(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])


def spawn(name: str, command: Sequence[str | Path], directory: Path) -> Server:
    """Start a server.

    Args:
        name: the display name; in lower case, the name of the log.
        command: the program and its arguments.
        directory: the working directory, which also has the log.

    Raises:
        OSError: the program can't be run, or the log can't be written.
    """
    import psutil

    log = directory / f"{name.lower()}.log"
    with log.open("ab") as output:
        log_start = output.tell()  # before the start of the child, which shares the file's position
        child = subprocess.Popen(  # noqa: S603 (programs of our own wheels)
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # keeps Ctrl-C from the child: our clean-up still needs the stores
        )
        return Server(name, child, psutil.Process(child.pid), log, log_start)


@dataclass(frozen=True)
class Demotion:
    """The user that PostgreSQL runs as, and the prefix of its command that switches to this user."""

    uid: int
    gid: int
    command: tuple[str, ...] = ()


def demotion() -> Demotion:
    """Return the current user; for root return the user nobody, because PostgreSQL refuses to run as root.

    The data directory and the wheel may be in folders that the user nobody can't search, such as /root, and we don't
    change the mode of these folders. So the process keeps one capability, to search them. A user namespace that maps
    root to another user would need no capability, but containers seldom allow user namespaces.
    """
    if os.geteuid() != 0:
        return Demotion(os.geteuid(), os.getegid())
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise EmbeddedError("PostgreSQL refuses to run as root, and setpriv (of util-linux), which helps, is missing")
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedError("PostgreSQL refuses to run as root, and there is no user nobody to run it as") from None
    command = [setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--no-new-privs"]
    permitted = re.search(r"^CapPrm:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert permitted is not None
    # dac_read_search permits only reading and searching. Docker's default set has only dac_override.
    for number, capability in ((2, "dac_read_search"), (1, "dac_override")):
        if int(permitted[1], 16) >> number & 1:
            command += [f"--inh-caps=+{capability}", f"--ambient-caps=+{capability}"]
            # Without this bit, access(2) ignores the capability; initdb uses access(2) to find its companion programs.
            command.append("--securebits=+no_setuid_fixup")
            break
    return Demotion(nobody.pw_uid, nobody.pw_gid, tuple(command))


# Ending


def find_servers(*wanted: tuple[str, Path]) -> "list[Process]":
    """Return the processes that run one of these programs on its directory.

    Command lines are compared, not pid files: a server may run before its pid file exists, and the pid in a pid file
    may belong to another process by now.
    """
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if any(Path(words[0]).name == program and str(directory) in words for program, directory in wanted):
            found.append(process)
    return found


def end(processes: "Sequence[Process]") -> None:
    """Stop the processes by SIGINT; after STOP_TIMEOUT seconds kill them and their descendants by SIGKILL."""
    import psutil

    def alive(process: "Process") -> bool:
        # A dead process may stay a zombie for ever: process 1 of a container may not reap it.
        with suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    def wait() -> None:
        deadline = time.monotonic() + STOP_TIMEOUT
        while any(map(alive, processes)) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL)

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown; Valkey and initdb stop at SIGINT, too
    wait()
    for process in filter(alive, processes):
        with suppress(psutil.NoSuchProcess):
            for member in (process, *process.children(recursive=True)):
                member.kill()
    wait()


def stop_servers(servers: Sequence[Server]) -> None:
    """Stop servers that this process has started, and reap them."""
    end([server.process for server in servers])
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.child.wait(STOP_TIMEOUT)  # Valkey's other threads may end a moment after its main thread


# Signals


@contextmanager
def signals_held() -> Iterator[Checkpoint]:
    """Defer SIGINT and SIGTERM: only the yielded function raises KeyboardInterrupt for them.

    Python's own handler raises at any point, and so sometimes between a fork and the assignment of the child's pid.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Python handles signals in the main thread alone
        return
    received: list[int] = []

    def checkpoint() -> None:
        if received:
            raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield checkpoint
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does: by default SIGTERM ends the process without clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
