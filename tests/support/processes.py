"""Processes and their children."""

import os
import time

import psutil

LONG = 20.0


def unmeasured(environ=os.environ):
    """The environment of a process that ``coverage run`` learns nothing from: it starts 0.25 s sooner without coverage.

    It runs none of the server's code, or is killed, or runs what other tests run, too. Mutation testing measures it.
    """
    left_out = {"COVERAGE_PROCESS_CONFIG"} if "COVERAGE_RUN" in environ else set()
    return {name: value for name, value in environ.items() if name not in left_out}


def until(condition, patience=LONG):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
    return found


def said(process, first_word):
    """The rest of the next line that begins so."""
    for line in process.stdout:
        word, _, rest = line.strip().partition(" ")
        if word == first_word:
            return rest
    raise AssertionError(f"nothing said of {first_word}: {process.stderr.read()}")


def children(process):
    return [child.pid for child in psutil.Process(process.pid).children()]
