"""workers.py with trivial workers, each supervisor in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from cluster import ROOT
from commands import clean_environ
from processes import LONG, children, said, until


@contextlib.contextmanager
def supervising(work, count=2, before=""):
    """A supervisor whose workers run ``work``; what they and it say comes out of ``stdout`` line by line.

    Args:
        before: runs in the supervisor before it begins.
    """
    script = textwrap.dedent(
        """
        import logging, os, signal, sys, time
        from lesson_server.cli import workers

        workers.FIRST_PAUSE = 0.02
        logging.basicConfig(format="%(message)s")

        def say(*words):
            os.write(1, (" ".join(map(str, words)) + "\\n").encode())

        parent = os.getpid()

        def stay():
            while os.getppid() == parent:  # a signal that arrives just before a sleep is seen after it
                time.sleep(0.05)

        def on_sigterm(handler):
            signal.signal(signal.SIGTERM, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, workers.SIGNALS)

        def serve(number, ready, parent_gone):
        {work}

        {before}
        supervisor = workers.Supervisor({count}, serve, lambda number: say("buried", number))
        status = supervisor.run(lambda: say("ready"))
        say("end", status, sorted(workers.SIGNALS & signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        sys.exit(status)
        """
    ).format(work=textwrap.indent(textwrap.dedent(work), "    "), count=count, before=before)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environ(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        for child in children:
            child.kill()
        process.kill()
        process.communicate()


PATIENT = """
on_sigterm(lambda *_: sys.exit(0))
ready()
say("serving", os.getpid())
stay()
"""

STUBBORN = """
def first(*_):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    say("draining", os.getpid())
on_sigterm(first)
ready()
stay()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_workers_serve_before_it_says_so_and_a_signal_ends_them_all(number):
    with supervising(PATIENT, count=3) as process:
        said(process, "ready")
        assert len(children(process)) == 3
        process.send_signal(number)
        assert said(process, "end") == "0 []"  # and the signals are unblocked again
        assert process.wait(LONG) == 0


def test_a_worker_that_is_killed_is_buried_and_replaced():
    with supervising(PATIENT) as process:
        said(process, "ready")
        victim, other = children(process)
        for _ in range(3):
            os.kill(victim, signal.SIGKILL)
            assert said(process, "buried") == "0"
            (victim,) = until(lambda gone=victim: set(children(process)) - {other, gone})
            assert int(said(process, "serving")) == victim
        process.terminate()
        assert process.wait(LONG) == 0
        assert re.findall(r"in ([0-9.]+) s", process.stderr.read()) == ["0.02", "0.04", "0.08"]


def test_a_worker_that_cannot_start_ends_the_supervisor_with_its_status_and_says_why_once():
    with supervising('say("tries", os.getpid())\nreturn 3') as process:
        out, _ = process.communicate(timeout=LONG)
        assert process.returncode == 3
        assert out.count("tries") == 1
        assert "ready" not in out.split()


def test_a_later_worker_that_cannot_start_takes_the_others_down():
    work = """
    on_sigterm(lambda *_: sys.exit(0))
    if supervisor._slots[1].pid == 0:
        raise RuntimeError("a defect")
    ready()
    stay()
    """
    with supervising(work) as process:
        _, error = process.communicate(timeout=LONG)
        assert process.returncode == 1
        assert "a defect" in error  # a worker's traceback is not lost


def test_a_second_signal_is_passed_on_too_and_waiting_costs_no_time():
    with supervising(STUBBORN) as process:
        said(process, "ready")
        process.terminate()
        drains = {said(process, "draining"), said(process, "draining")}
        assert drains == {str(pid) for pid in children(process)}
        os.kill(int(min(drains)), signal.SIGKILL)  # while it stops, nothing is started anew
        said(process, "buried")
        before = sum(psutil.Process(process.pid).cpu_times()[:2])
        time.sleep(0.3)
        assert len(children(process)) == 1
        assert sum(psutil.Process(process.pid).cpu_times()[:2]) - before < 0.1
        process.terminate()
        assert process.wait(LONG) == 0


def test_a_signal_during_the_start_ends_it():
    with supervising("on_sigterm(lambda *_: sys.exit(0))\nsay('up')\nstay()") as process:
        said(process, "up")
        process.terminate()
        assert process.wait(LONG) == 0
        assert "ready" not in process.stdout.read().split()


def test_a_worker_that_is_told_to_stop_while_it_starts_handles_it_when_it_can():
    """It has the handlers of its parent until then, which raise KeyboardInterrupt wherever it is."""
    work = """
    say("starting")
    while signal.SIGTERM not in signal.sigpending():
        time.sleep(0.01)
    on_sigterm(lambda *_: say("stops"))
    return 0
    """
    with supervising(work) as process:
        said(process, "starting")
        process.terminate()
        said(process, "stops")
        assert said(process, "end") == "0 []"


FAILING_FORK = """
import errno
forks = []
fork = os.fork

def failing_fork():
    forks.append(1)
    if len(forks) in {failing}:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()

os.fork = failing_fork
"""


@pytest.mark.parametrize("failing", [{1}, {2}, {2, 3}])
def test_a_worker_that_can_not_be_forked_is_tried_again_and_takes_no_other_down(failing):
    with supervising(PATIENT, before=FAILING_FORK.format(failing=failing)) as process:
        said(process, "ready")
        assert len(children(process)) == 2
        process.terminate()
        assert process.wait(LONG) == 0
        log = process.stderr.read()
        assert log.count("a worker could not be started: [Errno 11]") == len(failing)
        assert log.count("died") == 0


def test_a_worker_that_died_is_replaced_also_when_its_fork_fails():
    with supervising(PATIENT, before=FAILING_FORK.format(failing={3})) as process:
        said(process, "ready")
        victim, other = children(process)
        os.kill(victim, signal.SIGKILL)
        until(lambda: set(children(process)) - {victim, other})
        assert other in children(process)
        process.terminate()
        assert process.wait(LONG) == 0


def test_workers_that_die_in_the_same_moment_are_replaced():
    with supervising(PATIENT) as process:
        said(process, "ready")
        victims = children(process)
        process.send_signal(signal.SIGSTOP)
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        until(lambda: len(set(children(process)) - set(victims)) == 2)
        process.terminate()
        assert process.wait(LONG) == 0


def test_a_worker_can_read_from_its_start_when_its_parent_is_gone():
    work = """
    say("starting")
    os.read(parent_gone, 1)
    ready()
    say("orphan", os.getpid())
    """
    with supervising(work) as process:
        said(process, "starting")
        process.kill()
        said(process, "orphan")
