"""workers.py with trivial workers, each supervisor in a process of its own; then the command line with real ones."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request

import psutil
import pytest
from clients import SUCCESS, client, join
from cluster import ROOT
from commands import COMMAND, clean_environ, running

from lesson_server.cli import commands

LONG = 20.0


def until(condition, patience=LONG):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
    return found


# Supervisor


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
        supervisor = workers.Supervisor({count}, serve, lambda pid: say("buried", pid))
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


def said(process, first_word):
    """The rest of the next line that begins so."""
    for line in process.stdout:
        word, _, rest = line.strip().partition(" ")
        if word == first_word:
            return rest
    raise AssertionError(f"nothing said of {first_word}: {process.stderr.read()}")


def children(process):
    return [child.pid for child in psutil.Process(process.pid).children()]


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
            assert said(process, "buried") == str(victim)
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


# lesson-server run --workers 2


def fetch(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def figure(url, start):
    (line,) = [line for line in fetch(url + "/metrics")[1].splitlines() if line.startswith(start)]
    return float(line.split()[-1])


def test_two_workers_are_one_server(environ, io_loop, mint):
    with running("--workers", "2", **environ) as server:
        workers = children(server)
        assert len(workers) == 2
        assert fetch(server.url + "/readyz") == (200, "ready\n")

        async def class_joins():
            async with contextlib.AsyncExitStack() as stack:
                for number in range(20):
                    auth = {"client": "participant", "lesson_id": "1", "access_token": mint(f"p{number}")}
                    assert await join(await stack.enter_async_context(client(server, **auth))) == SUCCESS
                await io_loop.run_in_executor(None, check_sums)

        def check_sums():
            registered = 'lesson_connections{client="participant",event="join_lesson",state="registered"}'
            until(lambda: figure(server.url, registered) == 20)
            joins = 'lesson_events_total{client="participant",event="join_lesson",outcome="success"}'
            assert {figure(server.url, joins) for _ in range(10)} == {20.0}

        io_loop.run_sync(class_joins)

        os.kill(workers[0], signal.SIGKILL)
        (new,) = until(lambda: set(children(server)) - set(workers))
        until(lambda: psutil.Process(new).num_threads() and fetch(server.url + "/readyz")[0] == 200)
        server.terminate()
        assert server.wait(LONG) == 0
        assert not any(psutil.pid_exists(pid) for pid in (*workers, new))
        assert "Traceback" not in server.stderr.read()


CROWD = ROOT / "tests/js/crowd.js"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not there")
@pytest.mark.skipif(not (CROWD.parent / "node_modules/socket.io-client").exists(), reason="no socket.io-client")
@pytest.mark.parametrize(
    ("transports", "come_to"),
    [(["polling", "websocket"], "websocket"), (["polling"], "polling"), (["websocket"], "websocket")],
    ids=lambda value: "/".join(value) if isinstance(value, list) else "",
)
def test_official_clients_of_three_workers_join_and_join_again_when_one_is_killed(
    environ, redis_client, mint, transports, come_to
):
    """Each request of a polling client may be accepted by any worker."""
    count = 200 if len(transports) == 2 else 30
    options = {"lesson_id": "1", "tokens": [mint(f"p{number}") for number in range(count)], "transports": transports}
    with running("--workers", "3", **environ) as server:
        workers = children(server)
        crowd = subprocess.Popen(
            ["node", CROWD, server.url, json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            before = all_joined(crowd, come_to, count)
            held = {pid: connections(pid) for pid in workers}
            victim = min((pid for pid in workers if held[pid]), key=held.__getitem__)
            os.kill(victim, signal.SIGKILL)
            after = all_joined(crowd, come_to, count)
            assert before - after
            assert held[victim] == sum(held.values()) or before & after, "those of other workers stay"
            assert set(redis_client.hgetall("lesson_student_1").values()) == after
        finally:
            crowd.kill()
            crowd.communicate()


def connections(pid):
    """How many clients a worker has."""
    return sum(1 for connection in psutil.Process(pid).net_connections("tcp") if connection.status == "ESTABLISHED")


def all_joined(crowd, transport, count):
    """The sids of a crowd when all have joined by that transport."""
    for line in crowd.stdout:
        seen = json.loads(line)
        if seen["transports"] == {transport: count}:
            return set(seen["sids"])
    raise AssertionError(crowd.stderr.read())


def test_a_server_that_is_told_to_stop_while_its_workers_start_stops_cleanly(environ):
    server = subprocess.Popen(
        [*COMMAND, "run", "--workers", "2"],
        cwd=ROOT,
        env=clean_environ(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: children(server))
    server.terminate()
    said, log = server.communicate(timeout=LONG)
    assert (server.returncode, said, log) == (0, "", "")


def test_workers_end_when_their_parent_was_killed_and_nothing_is_left(environ, tmp_path):
    with running("--workers", "2", TMPDIR=str(tmp_path), **environ) as server:
        workers = children(server)
        assert len(list(tmp_path.iterdir())) == 1
        server.kill()
        server.wait(LONG)
        until(lambda: not any(map(_runs, workers)))
        assert not list(tmp_path.iterdir())


def test_an_orphan_is_told_to_stop_once(io_loop):
    """Twice would be to stop at once, without sending its clients away."""

    async def story():
        parent_gone, parent_lives = os.pipe()
        os.close(parent_lives)
        signals = asyncio.Queue()
        asyncio.get_running_loop().add_reader(parent_gone, commands._stop_as_orphan, parent_gone, signals)
        await signals.get()
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert signals.empty()
        os.close(parent_gone)

    io_loop.run_sync(story)


def test_what_killed_workers_left_is_removed_by_the_next_start(environ, tmp_path):
    with running("--workers", "2", TMPDIR=str(tmp_path), **environ) as server:
        workers = children(server)
        for process in (server.pid, *workers):
            os.kill(process, signal.SIGKILL)
        until(lambda: not any(map(_runs, workers)))
    (left,) = tmp_path.iterdir()
    with running("--workers", "2", TMPDIR=str(tmp_path), **environ):
        (used,) = tmp_path.iterdir()
        assert used != left


def _runs(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("broken", "status", "named"),
    [
        ({"LESSON_REDIS_URL": "redis://127.0.0.1:1"}, 1, "lesson-server: Redis: "),
        ({"LESSON_AUTH_ALGORITHM": "RS256"}, 2, "lesson-server: auth.key"),
    ],
)
def test_what_keeps_a_worker_from_starting_is_said_once(environ, broken, status, named):
    ended = subprocess.run(
        [sys.executable, "-m", "lesson_server.cli", "run", "--workers", "3"],
        env=clean_environ(**environ | broken),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == status
    assert sum(line.startswith(named) for line in ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
