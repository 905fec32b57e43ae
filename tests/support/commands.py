"""The commands of `lesson-server`, as processes."""

import contextlib
import os
import subprocess
import sys

import pytest
from cluster import ROOT

COMMAND = [sys.executable, "-m", "lesson_server.cli"]


def clean_environ(**more):
    return {name: value for name, value in os.environ.items() if not name.startswith("LESSON_")} | more


class ServerProcess(subprocess.Popen[str]):
    """A server: its first lines, and its address."""

    said: list[str]
    url: str


@contextlib.contextmanager
def running(*arguments, **environ):
    """Runs a server."""
    process = ServerProcess(
        [*COMMAND, "run", *map(str, arguments)],
        env=clean_environ(**environ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.said = []
        for line in process.stdout:
            process.said.append(line.rstrip("\n"))
            if "listening" in line:
                process.url = line.split()[-1]
                break
        else:
            pytest.fail(process.stderr.read())
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)
