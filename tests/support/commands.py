"""The commands of `lesson-server`, as processes."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from cluster import NODE, ROOT
from node import DRIFT

COMMAND = [sys.executable, "-m", "lesson_server.cli"]


def clean_environ(**more):
    return {name: value for name, value in os.environ.items() if not name.startswith("LESSON_")} | more


class ServerProcess(subprocess.Popen[str]):
    """A server: its first lines, and its address."""

    said: list[str]
    url: str


@contextlib.contextmanager
def running(*arguments, constants=(), **environ):
    """Runs a server; a drift between its messages, or those of its workers, and the AsyncAPI document fails the test.

    Args:
        arguments: those of ``lesson-server run``.
        constants: pairs module.CONSTANT, value, of the package's.
        environ: its settings.
    """
    process = ServerProcess(
        [sys.executable, NODE, json.dumps(dict(constants)), "run", *map(str, arguments)],
        env=clean_environ(PYTHONPATH=str(ROOT), **environ),
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
        _, log = process.communicate(timeout=30)
    assert DRIFT not in log, log
