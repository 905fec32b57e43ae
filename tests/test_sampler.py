"""sampler.py: what no event reports."""

import asyncio
import os
import resource
import time
from pathlib import Path

import psutil
import pytest
from waiting import until

from lesson_server import sampler as sampler_module
from lesson_server.metrics import Metrics
from lesson_server.sampler import Sampler
from lesson_server.status import Status


class World:
    """Stores whose answers a test sets, and a sampler of them."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.silent: list[str] = []
        self.redis = Status("up")
        self.alive = 3
        self.asked = 0
        self.fault: Exception | None = None
        self.sampler = Sampler(
            self.metrics,
            self.probe,
            {"RDS": lambda: Status("up"), "Redis": lambda: self.redis},
            lambda: self.alive,
        )

    async def probe(self) -> list[str]:
        self.asked += 1
        if self.fault is not None:
            raise self.fault
        return self.silent

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None
        return value

    async def stores(self) -> tuple[float, float, float]:
        await self.sampler.sample_stores()
        rds, redis = (self.value("lesson_store_up", store=store) for store in ("RDS", "Redis"))
        return rds, redis, self.value("lesson_rooms_up")


@pytest.fixture
def world() -> World:
    return World()


# The stores


@pytest.mark.gen_test
async def test_a_store_that_does_not_answer_the_probe_is_down(world: World) -> None:
    assert await world.stores() == (1, 1, 1)
    world.silent = ["RDS"]
    assert await world.stores() == (0, 1, 1)
    world.silent = ["Redis", "rooms"]
    assert await world.stores() == (1, 0, 0)
    world.silent = []
    assert await world.stores() == (1, 1, 1)


@pytest.mark.gen_test
async def test_a_store_whose_requests_fail_is_down_though_it_answers_the_probe(world: World) -> None:
    """One master of a cluster is down, and another one answers the probe."""
    world.redis = Status("down", time.time(), "timeout")
    assert await world.stores() == (1, 0, 1)
    world.redis = Status("up", time.time(), "timeout")
    assert await world.stores() == (1, 1, 1)


@pytest.mark.gen_test
async def test_the_nodes_that_are_alive_are_counted(world: World) -> None:
    await world.stores()
    assert world.value("lesson_nodes") == 3


# The process


def test_open_files_are_counted_with_their_limit(world: World) -> None:
    world.sampler.sample_process()
    before = world.value("lesson_open_files")
    assert abs(before - psutil.Process().num_fds()) <= 1  # the folder of psutil's own list
    ends = os.pipe()
    world.sampler.sample_process()
    assert world.value("lesson_open_files") == before + 2
    for end in ends:
        os.close(end)
    assert world.value("lesson_open_files_limit") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_open_files_are_counted_where_the_folder_has_no_size(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Linux before 6.2."""

    class WithoutSize(type(tmp_path)):  # type: ignore[misc]
        def stat(self, **kwargs: bool) -> os.stat_result:
            return os.stat_result((0,) * 10)

    (tmp_path / "fd").mkdir()
    for number in range(7):
        (tmp_path / "fd" / str(number)).touch()
    (tmp_path / "statm").write_text("100 25 1 1 0 1 0\n")
    monkeypatch.setattr(sampler_module, "PROC", WithoutSize(tmp_path))
    world.sampler.sample_process()
    assert world.value("lesson_open_files") == 7
    assert world.value("lesson_memory_bytes") == 25 * resource.getpagesize()


def test_without_proc_there_are_no_open_files_and_no_memory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "PROC", tmp_path)
    world.sampler.sample_process()
    assert world.value("lesson_open_files") == world.value("lesson_memory_bytes") == 0


def test_memory_is_what_the_system_says(world: World) -> None:
    world.sampler.sample_process()
    assert world.value("lesson_memory_bytes") == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_cpu_time_is_counted_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for total in (1.5, 1.5, 4.0):
        monkeypatch.setattr(time, "process_time", lambda total=total: total)
        world.sampler.sample_process()
        assert world.value("lesson_cpu_seconds_total") == total


# The event loop


@pytest.mark.gen_test
async def test_the_lag_rises_when_something_blocks_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(seconds: str) -> float:
        """How many timers were later than that."""
        bucket = world.value("lesson_event_loop_lag_seconds_bucket", le=seconds)
        return world.value("lesson_event_loop_lag_seconds_count") - bucket

    monkeypatch.setattr(sampler_module, "LAG_INTERVAL", 0.02)
    world.sampler.start()
    await until(lambda: world.value("lesson_event_loop_lag_seconds_count") >= 5)
    before = world.value("lesson_event_loop_lag_seconds_sum")
    late_before = late("0.25")
    time.sleep(0.5)
    # The timers of that half a second too: those of its first half are late by more than a quarter of a second.
    await until(lambda: late("0.25") >= late_before + 10)
    await world.sampler.close()
    assert world.value("lesson_event_loop_lag_seconds_sum") >= before + 0.45


# Again and again


@pytest.mark.gen_test
async def test_samples_are_taken_again_and_again_whatever_fails(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampler_module, "SAMPLE_INTERVAL", 0.01)
    world.fault = RuntimeError("a defect")
    await world.sampler.close()  # nothing to close
    world.sampler.start()
    await until(lambda: world.asked >= 2)
    assert caplog.messages[0] == "a sample for the metrics failed"
    world.fault, world.silent = None, ["RDS"]
    await until(lambda: world.metrics.registry.get_sample_value("lesson_store_up", {"store": "RDS"}) == 0)
    await world.sampler.close()
    asked = world.asked
    await asyncio.sleep(0.05)
    assert world.asked == asked


@pytest.mark.gen_test
async def test_the_process_is_sampled_before_the_first_scrape(world: World) -> None:
    world.sampler.start()
    assert world.value("lesson_open_files_limit") > 0
    assert world.value("lesson_open_files") > 0
    await world.sampler.close()
