"""``lesson-server run --workers N``, with real clients."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter

import psutil
import pytest
from clients import SUCCESS, client, join
from cluster import ROOT
from commands import COMMAND, clean_environ, running
from processes import LONG, children, until

from lesson_server.cli import run


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


JOINS = 'lesson_events_total{client="participant",event="join_lesson",outcome="success"}'


def test_two_workers_are_one_server(environ, io_loop, mint, tmp_path):
    with running("--workers", "2", **environ, TMPDIR=str(tmp_path)) as server:
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
            assert {figure(server.url, JOINS) for _ in range(10)} == {20.0}
            # A sample of each worker: the sum of both, or the smaller one.
            memory = sum(psutil.Process(pid).memory_info().rss for pid in workers)
            assert figure(server.url, "lesson_memory_bytes") == pytest.approx(memory, rel=0.3)
            until(lambda: figure(server.url, "lesson_rooms_up") == 1)
            assert figure(server.url, 'lesson_store_up{store="RDS"}') == 1

        io_loop.run_sync(class_joins)

        # The next worker goes on with the files of the one that died: otherwise each death would make a scrape slower.
        files = set(tmp_path.glob("lesson-server-metrics-*/*.db"))
        os.kill(workers[0], signal.SIGKILL)
        (new,) = until(lambda: set(children(server)) - set(workers))
        until(lambda: figure(server.url, "lesson_processes") == 2 and fetch(server.url + "/readyz")[0] == 200)
        assert set(tmp_path.glob("lesson-server-metrics-*/*.db")) == files != set()
        assert figure(server.url, JOINS) == 20
        server.terminate()
        assert server.wait(LONG) == 0
        assert not any(psutil.pid_exists(pid) for pid in (*workers, new))
        assert "Traceback" not in server.communicate()[1]


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
    # The crowd is killed at the end: clients that a server has not missed yet would have it drain for 10 s.
    with running("--workers", "3", **environ, LESSON_SERVER_DRAIN="0") as server:
        workers = children(server)
        crowd = subprocess.Popen(
            ["node", CROWD, server.url, json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            before = all_joined(crowd, come_to, count)
            workers_of = [int(sid.partition(".")[0]) for sid in before["engine_sids"]]
            held = Counter(workers_of)
            victim = min(held, key=held.__getitem__)
            lost = {sid for sid, worker in zip(before["sids"], workers_of, strict=True) if worker == victim}
            os.kill(workers[victim], signal.SIGKILL)
            after = all_joined(crowd, come_to, count)
            while lost & set(after["sids"]):  # some have joined again before others have noticed
                after = all_joined(crowd, come_to, count)
            stayed = set(before["sids"]) & set(after["sids"])
            assert len(stayed) <= count - held[victim]
            assert stayed or held[victim] == count, "those of other workers stay"
            assert set(redis_client.hgetall("lesson_student_1").values()) == set(after["sids"])
        finally:
            crowd.kill()
            crowd.communicate()


def all_joined(crowd, transport, count):
    """What a crowd says when all have joined by that transport."""
    for line in crowd.stdout:
        seen = json.loads(line)
        if seen["transports"] == {transport: count}:
            return seen
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
        asyncio.get_running_loop().add_reader(parent_gone, run._stop_as_orphan, parent_gone, signals)
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
