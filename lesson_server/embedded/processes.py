"""Processes of our own: started with their words in a log, found again after a kill, and ended for certain.

It knows nothing of a store but how to give PostgreSQL another user than root, and that its fast shutdown is SIGINT.
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

if TYPE_CHECKING:
    from psutil import Process  # comes with the extra "embedded"

# A start includes the recovery after a crash: PostgreSQL replays its log, Valkey loads its file.
START_TIMEOUT = 60.0
# What a shutdown gets before SIGKILL. It takes about 0.1 s; both stores are safe against the kill.
STOP_TIMEOUT = 10.0
POLL_INTERVAL = 0.02

LOG_LINES = 5  # of a server that failed, for the operator

Checkpoint = Callable[[], None]


class ProcessError(Exception):
    """Why a process can't be had, in words for the operator."""


# Starting


@dataclass(frozen=True)
class Server:
    """A child: PostgreSQL, Valkey, or the initdb that prepares the first. Made by :func:`spawn`.

    Attributes:
        name: for people.
        child: our end of it.
        process: the same process, as psutil knows it.
        log: the file that its output is appended to.
        log_start: where in the log its own output begins.
    """

    name: str
    child: subprocess.Popen[bytes]
    process: "Process"
    log: Path
    log_start: int

    def wait_until(self, ready: Callable[[], bool], checkpoint: Checkpoint) -> None:
        """Return when ``ready``.

        Args:
            ready: asked every POLL_INTERVAL.
            checkpoint: called before each wait; whatever it raises ends the waiting.

        Raises:
            ProcessError: the server has exited, or took more than START_TIMEOUT.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while not ready():
            checkpoint()
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise ProcessError(f"{self.name} did not start; the end of {self.log}:\n{self._last_words()}")
            time.sleep(POLL_INTERVAL)

    def _last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])


def spawn(name: str, command: Sequence[str | Path], directory: Path) -> Server:
    """Start a server.

    Args:
        name: for people; in lower case it names the log.
        command: the program and its arguments.
        directory: where it works, and where its log is.

    Raises:
        OSError: the program can't be run, or the log not written.
    """
    import psutil

    log = directory / f"{name.lower()}.log"
    with log.open("ab") as output:
        log_start = output.tell()  # before the child, which shares the file's position, can write
        child = subprocess.Popen(  # noqa: S603 (programs of our own wheels)
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C is for us: we still need the stores to clean up
        )
        return Server(name, child, psutil.Process(child.pid), log, log_start)


@dataclass(frozen=True)
class Demotion:
    """Whom PostgreSQL runs as, and the words before its command that make it so."""

    uid: int
    gid: int
    command: tuple[str, ...] = ()


def demotion() -> Demotion:
    """As ourselves; but PostgreSQL refuses to run as root: then as nobody.

    The data directory and the wheel may lie in folders that are closed to nobody, such as /root, and we won't open
    them. So the process keeps one capability, to pass through them. A user namespace that calls root by another name
    would need none, but containers seldom allow one.
    """
    if os.geteuid() != 0:
        return Demotion(os.geteuid(), os.getegid())
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ProcessError("PostgreSQL refuses to run as root, and setpriv (of util-linux), which helps, is missing")
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise ProcessError("PostgreSQL refuses to run as root, and there is no user nobody to run it as") from None
    command = [setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--no-new-privs"]
    permitted = re.search(r"^CapPrm:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert permitted is not None
    # The first may only read and pass; Docker, by default, has only the second.
    for number, capability in ((2, "dac_read_search"), (1, "dac_override")):
        if int(permitted[1], 16) >> number & 1:
            command += [f"--inh-caps=+{capability}", f"--ambient-caps=+{capability}"]
            # Without this access(2), by which initdb looks for its neighbours, ignores the capability.
            command.append("--securebits=+no_setuid_fixup")
            break
    return Demotion(nobody.pw_uid, nobody.pw_gid, tuple(command))


# Ending


def find_servers(*wanted: tuple[str, Path]) -> "list[Process]":
    """Return the processes that run one of these programs on its directory.

    By the command line and not by pid files: that has no moment at which a server is there and its file is not, and a
    pid that was given to another process deceives nobody.
    """
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if any(Path(words[0]).name == program and str(directory) in words for program, directory in wanted):
            found.append(process)
    return found


def end(processes: "Sequence[Process]") -> None:
    """Stop the processes and all that they have started: first politely, then for certain."""
    import psutil

    def alive(process: "Process") -> bool:
        # A dead one may stay a zombie for ever, where process 1 of a container doesn't reap.
        with suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    def wait() -> None:
        deadline = time.monotonic() + STOP_TIMEOUT
        while any(map(alive, processes)) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL)

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown, and the others understand it too
    wait()
    for process in filter(alive, processes):
        with suppress(psutil.NoSuchProcess):
            for member in (process, *process.children(recursive=True)):
                member.kill()
    wait()


def stop_servers(servers: Sequence[Server]) -> None:
    """End servers of our own, and reap them."""
    end([server.process for server in servers])
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.child.wait(STOP_TIMEOUT)  # Valkey's other threads may be a moment behind its first


# Signals


@contextmanager
def signals_held() -> Iterator[Checkpoint]:
    """Hold SIGINT and SIGTERM back; they raise KeyboardInterrupt from the yielded function only.

    Raised anywhere, as Python does it, it would now and then hit the moment between a fork and the note of its pid.
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
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does: by itself it would end us without any clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
