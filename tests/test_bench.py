"""The benchmark measures what it says: the load generator is understood, and its peers leave the keys that we leave."""

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import contestants
import page
import pytest
import redis
from contestants import CONTESTANTS, OURS, PEERS
from load_generator import LESSON_SIZE
from measuring import Stores
from workloads import LESSONS, SEATS, LoadProcess, Scale, Workloads, load_generator

from lesson_server.embedded import EmbeddedStores

CLASS = 10
HOUR = 60 * 60

Run = Callable[[str, Callable[[Workloads, LoadProcess], None]], None]

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (PEERS / "node/node_modules").exists(), reason="needs the peer on Node"
)


@pytest.fixture
def bench_stores(stores: EmbeddedStores) -> Stores:
    bench_stores = Stores(stores.dsn, stores.redis_url, stores.data_dir / "postgresql.log")
    bench_stores.add_lessons(LESSONS, SEATS)
    return bench_stores


@pytest.fixture
def run(bench_stores: Stores, tmp_path: Path) -> Run:
    """Starts a contestant and its load generator, and calls with them."""
    scale = Scale(clients=CLASS, seconds=0.5, levels=(5, CLASS), visitors=5, visits=2)

    def run(name: str, what: Callable[[Workloads, LoadProcess], None]) -> None:
        key = secrets.token_urlsafe(32)
        with (
            contestants.running(CONTESTANTS[name], bench_stores, key, None, tmp_path / "log") as server,
            load_generator(server.port, key) as load,
        ):
            what(Workloads(server, load, bench_stores, scale), load)

    return run


@pytest.fixture
def left_in_redis(run: Run, redis_client: "redis.Redis") -> Callable[[str], object]:
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

        run(name, look)
        return left

    return left_in_redis


@pytest.mark.parametrize("peer", ["plain_tornado", pytest.param("node", marks=needs_node)])
def test_a_peer_leaves_the_same_keys_as_we_do(left_in_redis: Callable[[str], object], peer: str) -> None:
    ours = left_in_redis(OURS)
    assert len(ours) == 1 + 1 + CLASS + 1  # the seat map, the teachers, everybody, the students
    assert left_in_redis(peer) == ours


def test_every_workload_has_figures_and_the_page_shows_them(run: Run, tmp_path: Path) -> None:
    figures: dict[str, object] = {}

    def work(workloads: Workloads, load: LoadProcess) -> None:
        figures["counts"] = workloads.counted_class_start()
        for name, measure in (
            ("class_start", workloads.class_start),
            ("phases", workloads.phases),
            ("steady", lambda: workloads.steady(rate=20)),
            ("storm", workloads.storm),
        ):
            figures[name] = [measure()]
        figures["hold"] = workloads.hold(lambda what: None)

    run(OURS, work)
    assert figures["counts"]["joins"] == CLASS
    assert 1 <= figures["counts"]["queries_join"] <= CLASS
    assert figures["counts"]["redis_reads_join"] >= 1
    assert 0 < figures["class_start"][0]["join_us"] < figures["class_start"][0]["life_us"]

    about = {"date": "", "revision": "", "cpu": "", "cores": 2, "memory_gb": 1, "kernel": "", "others_percent": 0.0}
    about |= {"versions": {}, "rounds": 1, "clients": CLASS, "visitors": 5, "window": 100}
    results = {"about": about, "titles": {OURS: "lesson-server"}, "contestants": {OURS: figures}}
    page.write(results, tmp_path / "figures.json")
    written = (tmp_path / "figures.md").read_text()
    for plot in ("cpu", "held", "ack"):
        assert f"(figures-{plot}.png)" in written
        assert (tmp_path / f"figures-{plot}.png").stat().st_size > 0


def test_a_client_that_fails_stops_the_bench(run: Run) -> None:
    def join_nowhere(_: Workloads, load: LoadProcess) -> None:
        with pytest.raises(contestants.BenchError, match=f"lesson bench-{LESSONS} not found"):
            load("connect", first=LESSONS * LESSON_SIZE, count=1)

    run(OURS, join_nowhere)
