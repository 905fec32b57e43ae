"""processes.py, with small processes in place of the stores."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lesson_server.embedded import processes
from lesson_server.embedded.errors import EmbeddedError
from lesson_server.embedded.processes import (
    Server,
    demotion,
    end,
    find_servers,
    signals_held,
    sigterm_interrupts,
    spawn,
    stop_servers,
)

AS_ROOT = os.geteuid() == 0

Shell = Callable[[str], Server]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """Spawns shells, each with its directory as ``$1``; afterwards none of them may run."""
    servers: list[Server] = []

    def shell(script: str) -> Server:
        server = spawn("Shell", ["sh", "-c", script, "sh", tmp_path], tmp_path)
        servers.append(server)
        return server

    yield shell
    left = [server.process for server in servers if server.child.poll() is None]
    end(left)
    assert left == []


@pytest.fixture
def _handlers_unchanged() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def nothing() -> None:
    pass


# Starting


def test_a_server_is_waited_for(shell: Shell, tmp_path: Path) -> None:
    server = shell("touch ready; exec sleep 60")
    server.wait_until((tmp_path / "ready").exists, nothing)
    assert os.getsid(server.child.pid) == server.child.pid  # a Ctrl-C in the terminal doesn't reach it
    stop_servers([server])


def test_a_program_that_ends_just_after_it_was_asked_has_ended_well(shell: Shell, tmp_path: Path) -> None:
    """As initdb may, which is ready when it has ended."""
    program = shell('until [ -e "$1/go" ]; do sleep 0.01; done')

    def has_ended() -> bool:
        answer = program.child.poll() == 0
        (tmp_path / "go").touch()
        program.child.wait()
        return answer

    program.wait_until(has_ended, nothing)


def test_the_error_shows_the_last_words_of_this_run_alone(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "shell.log").write_text("of an earlier run\n")
    server = shell("seq 1 9; echo alas >&2; exit 1")
    with pytest.raises(EmbeddedError) as raised:
        server.wait_until(lambda: False, nothing)
    assert str(raised.value) == f"Shell did not start; the end of {tmp_path}/shell.log:\n6\n7\n8\n9\nalas"
    short = shell("echo only")
    with pytest.raises(EmbeddedError, match=r"shell\.log:\nonly$"):
        short.wait_until(lambda: False, nothing)


def test_a_server_that_takes_too_long_is_an_error(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "START_TIMEOUT", 0.1)
    server = shell("exec sleep 60")
    with pytest.raises(EmbeddedError, match="Shell did not start"):
        server.wait_until(lambda: False, nothing)
    stop_servers([server])


@pytest.mark.skipif(AS_ROOT, reason="needs an ordinary user")
def test_an_ordinary_user_stays_one() -> None:
    assert demotion() == processes.Demotion(os.geteuid(), os.getegid())


@pytest.mark.skipif(not AS_ROOT, reason="needs root")
def test_root_becomes_nobody(shell: Shell, tmp_path: Path) -> None:
    nobody = demotion()
    server = spawn("Id", [*nobody.command, "sh", "-c", "echo $(id -u) $(id -g) $(id -G)"], tmp_path)
    assert server.child.wait(10) == 0
    assert (tmp_path / "id.log").read_text().split() == [str(nobody.uid), str(nobody.gid), str(nobody.gid)]
    assert nobody.uid != 0


# Ending


def test_a_server_is_found_by_its_program_and_its_directory(shell: Shell, tmp_path: Path) -> None:
    server = shell('exec tail -f "$1/shell.log"')
    # Right after the fork it is not yet to be seen as what it will be.
    server.wait_until(lambda: find_servers(("tail", tmp_path / "shell.log")) == [server.process], nothing)
    assert find_servers(("sh", tmp_path / "shell.log"), ("tail", tmp_path)) == []
    stop_servers([server])
    assert find_servers(("tail", tmp_path / "shell.log")) == []


def test_a_stopped_server_is_reaped(shell: Shell) -> None:
    server = shell("exec sleep 60")
    stop_servers([server])
    assert server.child.returncode == -signal.SIGINT
    stop_servers([server])  # nothing is left to do


def test_a_server_that_does_not_stop_is_killed_with_its_children(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = shell("sleep 60 & touch ready; wait")
    server.wait_until((tmp_path / "ready").exists, nothing)
    family = [server.process, *server.process.children(recursive=True)]
    assert len(family) == 2
    for process in family:
        process.suspend()
    monkeypatch.setattr(processes, "STOP_TIMEOUT", 0.2)
    stop_servers([server])
    psutil.wait_procs(family, timeout=5)
    assert not any(map(running, family))


# Signals


@pytest.mark.usefixtures("_handlers_unchanged")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_held_signal_raises_at_the_checkpoint_only(number: signal.Signals) -> None:
    with signals_held() as checkpoint:
        checkpoint()
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            checkpoint()


@pytest.mark.usefixtures("_handlers_unchanged")
def test_sigterm_interrupts_as_sigint_does() -> None:
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("_handlers_unchanged")
def test_in_other_threads_signals_are_left_alone() -> None:
    done = threading.Event()

    def other() -> None:
        with signals_held() as checkpoint, sigterm_interrupts():
            checkpoint()
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert done.is_set()
