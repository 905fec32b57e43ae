"""SIGTERM from the first moment of a process on, also of process 1 of a container."""

import functools
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from commands import COMMAND, clean_environ
from processes import until

# The console script, with a signal at the moment at which it imports the commands.
SIGNALLED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "lesson_server.cli.commands":
            print("importing as", os.getpid(), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
from lesson_server.cli.entry import main
sys.exit(main())
"""


def ended(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(("command", "status"), [("run", 0), ("settings", -signal.SIGTERM)])
def test_sigterm_while_the_commands_are_imported_ends_run_cleanly(command, status):
    process = ended(sys.executable, "-c", SIGNALLED, command)
    assert process.stdout.startswith("importing as ")
    assert (process.stderr, process.returncode) == ("", status)


# As process 1


@functools.cache
def unshare():
    """A command in a PID namespace of its own; its exit status is the command's."""
    command = [shutil.which("unshare") or "unshare", "--fork", "--pid", "--kill-child"]
    try:
        usable = ended(*command, "true").returncode == 0
    except OSError:
        usable = False
    if not usable:
        pytest.skip("no PID namespace can be made here: that takes Linux and root")
    return command


def test_sigterm_while_process_1_imports_the_commands_is_not_lost():
    process = ended(*unshare(), sys.executable, "-c", SIGNALLED, "run")
    assert (process.stdout, process.stderr, process.returncode) == ("importing as 1\n", "", 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_process_1_drains_and_ends_with_status_0(environ, workers):
    process = subprocess.Popen(
        [*unshare(), *COMMAND, "run", "--workers", str(workers)],
        env=clean_environ(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "listening" in process.stdout.readline()
        [server] = psutil.Process(process.pid).children()
        server.send_signal(signal.SIGTERM)
        assert until(lambda: process.poll() is not None)
        assert (process.stderr.read(), process.returncode) == ("", 0)
    finally:
        process.kill()
        process.communicate()
