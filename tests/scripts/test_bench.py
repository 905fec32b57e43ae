"""The benchmark measures what it says: the load generator is understood, and its peers leave the keys that we leave."""

import base64
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import contestants
import page
import pytest
import redis
from contestants import BUN_COMMAND, CONTESTANTS, NODE, OURS, WORKERS, BenchError, Contestant
from load_generator import LESSON_SIZE, Load, frame
from measuring import NODE_COUNTS, Process, Stores
from processes import unmeasured
from workloads import LESSONS, SEATS, LoadProcess, Scale, Workloads, is_warm, load_generator, not_kept_up

from lesson_server.embedded.stores import EmbeddedStores

CLASS = 10
HOUR = 60 * 60

Run = Callable[[Contestant, Callable[[Workloads, LoadProcess], None]], None]

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules").exists(), reason="needs the peer on Node"
)
needs_bun = pytest.mark.skipif(not BUN_COMMAND.exists(), reason="needs the peer on Bun")

NODE_AND_BUN = (pytest.param("node", marks=needs_node), pytest.param("bun", marks=needs_bun))


@pytest.fixture(autouse=True)
def unmeasured_processes() -> Iterator[None]:
    """The load generator has nothing of the server in it, and the servers are killed at the end."""
    with patch.dict(os.environ, unmeasured(), clear=True):
        yield


@pytest.fixture
def bench_stores(stores: EmbeddedStores) -> Stores:
    bench_stores = Stores(stores.dsn, stores.redis_url, stores.data_dir / "postgresql.log")
    bench_stores.add_lessons(LESSONS, SEATS)
    return bench_stores


@pytest.fixture
def run(bench_stores: Stores, tmp_path: Path) -> Run:
    """Starts a contestant and its load generator, and calls with them."""
    scale = Scale(clients=CLASS, warm_ups=1, rates=(20, 40), seconds=0.5, levels=(5, CLASS), visitors=5, visits=2)

    def run(contestant: Contestant, what: Callable[[Workloads, LoadProcess], None]) -> None:
        key = secrets.token_urlsafe(32)
        with (
            contestants.running(contestant, bench_stores, key, None, tmp_path / "log") as server,
            load_generator(server.port, key) as load,
        ):
            what(Workloads(server, load, bench_stores, scale), load)

    return run


@pytest.fixture
def left_in_redis(run: Run, redis_client: "redis.Redis") -> Callable[[str], Any]:
    """What a class of a contestant has in Redis, with each sid as SID and the life of each key in hours."""

    def left_in_redis(name: str) -> object:
        redis_client.flushall()
        left = {}

        def look(_: Workloads, load: LoadProcess) -> None:
            assert load("connect", first=0, count=CLASS)["clients"] == CLASS
            for key in redis_client.scan_iter():
                if key.startswith("lesson_node"):
                    continue  # the server's own, of which its peers know nothing
                fields = redis_client.hgetall(key)
                if key.startswith("lesson_") and "seat" not in key:
                    fields = dict.fromkeys(fields, "SID")
                if "sid" in fields:
                    fields["sid"] = "SID"
                left[key] = fields, round(redis_client.ttl(key) / HOUR)

        run(CONTESTANTS[name], look)
        return left

    return left_in_redis


@pytest.mark.parametrize("peer", ["plain_tornado", *NODE_AND_BUN])
def test_a_peer_leaves_the_same_keys_as_we_do(left_in_redis: Callable[[str], Any], peer: str) -> None:
    ours = left_in_redis(OURS)
    assert len(ours) == 1 + 1 + CLASS + 1  # the seat map, the teachers, everybody, the students
    assert left_in_redis(peer) == ours


def test_every_workload_has_figures_and_the_page_shows_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STAY", "IDLE_SECONDS"):
        monkeypatch.setattr(f"workloads.{name}", 0.2)
    figures: dict[str, Any] = {}

    def work(workloads: Workloads, load: LoadProcess) -> None:
        figures["counts"] = workloads.counted_class_start()
        for name, measure in (
            ("class_start", workloads.class_start),
            ("phases", workloads.phases),
            ("storm", workloads.storm),
            ("warm_ups", workloads.warm_up),
        ):
            figures[name] = [measure()]
        figures["steady"] = {"20": [workloads.steady(20)], "40": [not_kept_up(40)]}
        figures["hold"] = workloads.hold(lambda what: None)

    run(CONTESTANTS[OURS], work)
    workers = figures_of_workers(run)
    assert figures["counts"]["joins"] == CLASS
    assert 1 <= figures["counts"]["queries_join"] <= CLASS
    assert figures["counts"]["redis_reads_join"] >= 1
    assert 0 < figures["class_start"][0]["join_us"] < figures["class_start"][0]["life_us"]
    assert figures["steady"]["20"][0]["kept_up"]

    about = {"date": "", "revision": "", "cpu": "", "cores": 2, "memory_gb": 1, "kernel": "", "others_percent": 0.0}
    about |= {"versions": {}, "rounds": 1, "clients": CLASS, "visitors": 5, "window": 100}
    about |= {"rates": (20, 40), "seconds": 0.5, "warm_ups": 1}
    results = {"about": about, "titles": {OURS: "lesson-server"}, "contestants": {OURS: figures}, "workers": workers}
    page.write(results, tmp_path / "figures.json")
    written = (tmp_path / "figures.md").read_text()
    assert "| rounds in which it kept up | 1 of 1 |" in written
    assert "| rounds in which it kept up | 0 of 1 |\n| CPU µs: connection + join + end | can't keep up |" in written
    assert "\n".join(page.summary(results)).count("can't keep up") == 1
    shown_of_workers = written.partition("## Workers")[2]
    assert "| | 1 worker | 2 workers |" in shown_of_workers
    assert re.search(r"\| CPU µs: [^|]+ \| [\d,]+ \| [\d,]+ \*\*\d+\.\d\d×\*\* \|", shown_of_workers)  # noqa: RUF001
    assert re.search(r"busiest worker[^|]+ \| 100\.0 \| ", shown_of_workers)
    assert "how many times 1 worker's figure" in shown_of_workers
    for plot in ("cpu", "held", "ack"):
        assert f"(figures-{plot}.png)" in written
        assert (tmp_path / f"figures-{plot}.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("figures", "lines"),
    [
        (
            {OURS: (400, 900), "node": (500, 600), "bun": (200, 2000)},
            [
                "| class start: CPU µs | Bun: 200 | lesson-server: 400 **2.00×** |",  # noqa: RUF001
                "| class start: joins a second | Bun: 2,000 | lesson-server: 900 **0.45×** |",  # noqa: RUF001
            ],
        ),
        (
            {OURS: (400, 900), "node": (500, 600)},
            [
                "| class start: CPU µs | lesson-server: 400 | Node: 500 **1.25×** |",  # noqa: RUF001
                "| class start: joins a second | lesson-server: 900 | Node: 600 **0.67×** |",  # noqa: RUF001
            ],
        ),
        ({OURS: (400, 900)}, []),
    ],
    ids=["another", "ours", "nobody to compare with"],
)
def test_the_page_says_who_is_ahead_and_by_how_much(
    monkeypatch: pytest.MonkeyPatch, figures: dict[str, tuple[float, float]], lines: list[str]
) -> None:
    rows = (page.Row("join_us", "CPU µs"), page.Row("joins_per_s", "joins a second"))
    monkeypatch.setattr(page, "TABLES", {"class_start": ("Class start", "", rows)})
    titles = {OURS: "lesson-server", "node": "Node", "bun": "Bun"}
    results = {
        "about": {"rates": []},
        "titles": {name: titles[name] for name in figures},
        "contestants": {
            name: {"class_start": [{"join_us": cpu, "joins_per_s": joins}]} for name, (cpu, joins) in figures.items()
        },
    }
    assert [line for line in page._ahead(results) if line.startswith("| class start")] == lines


def figures_of_workers(run: Run) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    for contestant in WORKERS:

        def work(workloads: Workloads, load: LoadProcess, name: str = contestant.name) -> None:
            figures[name] = {"warm_ups": [workloads.warm_up()], "class_start": [workloads.workers()]}

        run(contestant, work)
    one, two = (figures[contestant.name]["class_start"][0] for contestant in WORKERS)
    assert one["busiest_percent"] == one["least_busy_percent"] == 100
    assert two["busiest_percent"] + two["least_busy_percent"] == pytest.approx(100)
    return {"titles": {contestant.name: contestant.title for contestant in WORKERS}, "contestants": figures}


def test_the_clients_of_each_worker_are_counted(bench_stores: Stores, tmp_path: Path) -> None:
    key = secrets.token_urlsafe(32)
    with contestants.running(WORKERS[1], bench_stores, key, None, tmp_path / "log") as server:
        load = Load("127.0.0.1", server.port, key)
        assert server.process.connections(server.port) == [0, 0]
        assert load.connect(first=0, count=CLASS)["failures"] == []
        held = server.process.connections(server.port)
        assert (len(held), sum(held)) == (2, CLASS)
        load.drop()


def test_an_emptied_redis_is_not_taken_for_one_that_has_lost_its_data(bench_stores: Stores, tmp_path: Path) -> None:
    """lesson-server would write all of its presence again in the middle of what is measured."""
    key, log = secrets.token_urlsafe(32), tmp_path / "log"
    client = redis.Redis.from_url(bench_stores.redis_url, decode_responses=True)
    with client, contestants.running(CONTESTANTS[OURS], bench_stores, key, None, log) as server:
        load = Load("127.0.0.1", server.port, key)
        load.connect(first=0, count=CLASS)
        load.leave()
        bench_stores.empty_redis()
        assert client.keys() == [NODE_COUNTS]
        counts = client.hgetall(NODE_COUNTS)
        deadline = time.monotonic() + 10
        while client.hgetall(NODE_COUNTS) == counts:  # until the next heartbeat
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.hkeys(NODE_COUNTS) == list(counts)
    assert "Redis has lost" not in log.read_text()


def test_a_client_that_fails_stops_the_bench(run: Run) -> None:
    def join_nowhere(_: Workloads, load: LoadProcess) -> None:
        with pytest.raises(contestants.BenchError, match=f"lesson bench-{LESSONS} not found"):
            load("connect", first=LESSONS * LESSON_SIZE, count=1)

    run(CONTESTANTS[OURS], join_nowhere)


INVALID, EXPIRED = "access token is invalid", "access token has expired"
CLAIMS = {"sub": "student-1", "role": "student"}


def token(key: str, alg: str = "HS256", life: float = 60, **claims: Any) -> str:
    """A token with the HMAC-SHA256 of ``key``, whatever its header says."""
    claims = {**CLAIMS, "exp": int(time.time() + life), **claims}
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": alg}, claims))
    text = b".".join(parts)
    signature = base64.urlsafe_b64encode(hmac.digest(key.encode(), text, "sha256")).rstrip(b"=")
    return f"{text.decode()}.{signature.decode()}"


@pytest.mark.parametrize("name", [OURS, "plain_tornado", *NODE_AND_BUN])
def test_a_peer_refuses_the_tokens_that_we_refuse(
    monkeypatch: pytest.MonkeyPatch, bench_stores: Stores, tmp_path: Path, name: str
) -> None:
    key = secrets.token_urlsafe(32)
    with contestants.running(CONTESTANTS[name], bench_stores, key, None, tmp_path / "log") as server:
        load = Load("127.0.0.1", server.port, key)

        def failures(access_token: str) -> list[str]:
            auth = {"client": "participant", "lesson_id": "bench-0", "access_token": access_token}
            monkeypatch.setattr("load_generator.handshake", lambda *_: frame(b"40" + json.dumps(auth).encode()))
            answer = load.connect(first=1, count=1)
            load.drop()
            return answer["failures"]

        assert failures(token(key)) == []
        assert EXPIRED in failures(token(key, life=-1))[0]
        for wrong in (
            token(key[::-1]),
            token(key, alg="HS512"),
            token(key, alg="none"),
            token(key).rpartition(".")[0] + ".",
            token(key) + ".more",
            token(key, role=None),
            token(key, sub=None),
            token(key, exp=None),
            "none at all",
        ):
            assert INVALID in failures(wrong)[0], wrong


def test_a_server_that_does_not_keep_up_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        host, port = deaf.getsockname()
        load = Load(host, port, secrets.token_urlsafe(32))
        phase = load.steady(first=0, rate=20, seconds=1.0, stay=0.1)
    assert not phase["kept_up"]
    assert phase["seconds"] < 2.0
    assert load.connect(first=0, count=0)["clients"] == 0  # and nothing is left of it


def test_warm_is_what_gets_no_cheaper() -> None:
    falling = [900.0, 700.0, 500.0]
    assert not is_warm([])
    assert not is_warm([500.0] * 5)  # too few to say
    assert is_warm([500.0] * 6)
    assert not is_warm([*falling, 450.0, 430.0, 420.0])
    assert is_warm([*falling, 500.0, 490.0, 510.0, 480.0, 490.0, 495.0])
    assert is_warm([500.0, 500.0, 500.0, 900.0, 490.0, 490.0])  # one that was disturbed says nothing
    assert is_warm([500.0, 500.0, 500.0, 600.0, 600.0, 600.0])


THREAD_THAT_ENDS = """
import threading, time

def work():
    while time.thread_time() < 0.3:
        pass

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(flush=True)
input()
"""


def test_the_cpu_of_threads_that_have_ended_counts() -> None:
    with subprocess.Popen(
        (sys.executable, "-c", THREAD_THAT_ENDS), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert Process(child.pid).cpu() >= 0.3
        child.communicate(b"\n")


def test_a_peer_whose_runtime_is_missing_says_how_to_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name, runtime in (("node", "Node"), ("bun", "Bun")):
        with pytest.raises(BenchError, match=f"the peer on {runtime} needs node and npm; --only leaves it out"):
            CONTESTANTS[name].prepare()
