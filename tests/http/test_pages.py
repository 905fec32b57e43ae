"""pages.py: what operators, orchestrators and Prometheus are told."""

import asyncio
import logging
from collections import Counter
from functools import partial

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as CounterMetric
from prometheus_client.parser import text_string_to_metric_families
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.web import Application

from lesson_server.errors import StoreUnavailable
from lesson_server.http import pages
from lesson_server.http.pages import Readiness
from lesson_server.http.routes import routes
from lesson_server.protocol.http_server import NotFoundHandler

SECRET = "eyJhbGciOiJIUzI1NiJ9.secret"


class FakeStore:
    """Answers probes, or fails, hangs, or has a defect; counts how often it was asked."""

    asked = 0
    fault: Exception | None = None
    hangs = False

    async def ping(self) -> None:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def rds() -> FakeStore:
    return FakeStore()


@pytest.fixture
def redis() -> FakeStore:
    return FakeStore()


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    joins = CounterMetric("lesson_events", "Events answered", ("outcome",), registry=registry)
    joins.labels("success").inc()
    return registry


@pytest.fixture
def app(io_loop: object, rds: FakeStore, redis: FakeStore, registry: CollectorRegistry) -> Application:
    return Application(
        routes(Readiness({"RDS": rds.ping, "Redis": redis.ping}), partial(generate_latest, registry)),
        default_handler_class=NotFoundHandler,
        log_function=lambda handler: None,
    )


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "READINESS_AGE", -1.0)


async def get(http_client: AsyncHTTPClient, url: str, **options: object) -> HTTPResponse:
    return await http_client.fetch(url, raise_error=False, **options)


def answer(response: HTTPResponse) -> tuple[int, str]:
    return response.code, response.body.decode()


# Health


@pytest.mark.gen_test
async def test_health_asks_no_store(
    http_client: AsyncHTTPClient, base_url: str, rds: FakeStore, redis: FakeStore
) -> None:
    rds.hangs = True
    assert answer(await get(http_client, f"{base_url}/healthz")) == (200, "ok\n")
    assert (rds.asked, redis.asked) == (0, 0)


# Readiness


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("down", "expected"),
    [
        ((), (200, "ready\n")),
        (("rds",), (503, "RDS down\n")),
        (("redis",), (503, "Redis down\n")),
        (("rds", "redis"), (503, "RDS, Redis down\n")),
    ],
)
@pytest.mark.gen_test
async def test_readiness_names_what_is_down(
    http_client: AsyncHTTPClient,
    base_url: str,
    rds: FakeStore,
    redis: FakeStore,
    down: tuple[str, ...],
    expected: tuple[int, str],
) -> None:
    for name, store in (("rds", rds), ("redis", redis)):
        store.fault = StoreUnavailable("a store", "its cause") if name in down else None
    assert answer(await get(http_client, f"{base_url}/readyz")) == expected
    rds.fault = redis.fault = None
    assert answer(await get(http_client, f"{base_url}/readyz")) == (200, "ready\n")


@pytest.mark.usefixtures("no_cache")
@pytest.mark.gen_test
async def test_a_server_that_drains_still_tells_the_metrics_which_store_is_silent(
    rds: FakeStore, redis: FakeStore
) -> None:
    readiness = Readiness({"RDS": rds.ping, "Redis": redis.ping})
    readiness.close()
    redis.fault = StoreUnavailable("a store", "its cause")
    assert await readiness.down() == ["the server"]
    assert await readiness.silent() == ["Redis"]


@pytest.mark.parametrize("hanging", ["rds", "redis"])
@pytest.mark.gen_test
async def test_a_store_that_hangs_is_down(
    http_client: AsyncHTTPClient,
    base_url: str,
    monkeypatch: pytest.MonkeyPatch,
    rds: FakeStore,
    redis: FakeStore,
    hanging: str,
) -> None:
    monkeypatch.setattr(pages, "PROBE_TIMEOUT", 0.05)
    store, name = {"rds": (rds, "RDS"), "redis": (redis, "Redis")}[hanging]
    store.hangs = True
    assert answer(await get(http_client, f"{base_url}/readyz")) == (503, f"{name} down\n")


@pytest.mark.gen_test
async def test_many_probes_are_one_question(
    http_client: AsyncHTTPClient, base_url: str, monkeypatch: pytest.MonkeyPatch, rds: FakeStore, redis: FakeStore
) -> None:
    monkeypatch.setattr(pages, "READINESS_AGE", 60.0)
    responses = await asyncio.gather(*(get(http_client, f"{base_url}/readyz") for _ in range(10)))
    assert Counter(response.code for response in responses) == {200: 10}
    assert (rds.asked, redis.asked) == (1, 1)


@pytest.mark.gen_test
async def test_an_answer_of_the_stores_counts_for_about_a_second(
    http_client: AsyncHTTPClient, base_url: str, monkeypatch: pytest.MonkeyPatch, rds: FakeStore
) -> None:
    assert pages.READINESS_AGE == 1.0
    monkeypatch.setattr(pages, "READINESS_AGE", 0.02)
    await get(http_client, f"{base_url}/readyz")
    await asyncio.sleep(0.03)
    await get(http_client, f"{base_url}/readyz")
    assert rds.asked == 2


@pytest.mark.usefixtures("no_cache")
@pytest.mark.gen_test
async def test_a_defect_in_a_probe_is_told_to_the_log_only(
    http_client: AsyncHTTPClient, base_url: str, caplog: pytest.LogCaptureFixture, rds: FakeStore
) -> None:
    rds.fault = LookupError("a defect")
    response = await get(http_client, f"{base_url}/readyz?access_token={SECRET}")
    assert answer(response) == (500, "500 Internal Server Error\n")
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "GET request failed")
    assert SECRET not in caplog.text
    rds.fault = None
    assert (await get(http_client, f"{base_url}/readyz")).code == 200


# Metrics


@pytest.mark.gen_test
async def test_metrics_are_in_the_text_format_of_prometheus(http_client: AsyncHTTPClient, base_url: str) -> None:
    response = await get(http_client, f"{base_url}/metrics")
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (sample.name, sample.labels["outcome"]): sample.value
        for family in text_string_to_metric_families(response.body.decode())
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    assert samples == {("lesson_events_total", "success"): 1.0}


# Everything else


@pytest.mark.parametrize("path", ["/", "/nowhere", "/socket.io", f"/{SECRET}", f"/?access_token={SECRET}", "/%ff%00"])
@pytest.mark.gen_test
async def test_another_path_is_not_found_and_not_echoed(
    http_client: AsyncHTTPClient, base_url: str, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    response = await get(http_client, base_url + path)
    assert answer(response) == (404, "404 Not Found\n")
    assert response.headers["Content-Type"] == "text/plain; charset=UTF-8"
    assert caplog.records == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
@pytest.mark.gen_test
async def test_pages_can_only_be_read(
    http_client: AsyncHTTPClient, base_url: str, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    response = await get(http_client, base_url + path, method="POST", body="")
    assert answer(response) == (405, "405 Method Not Allowed\n")
    assert caplog.records == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
@pytest.mark.gen_test
async def test_answers_are_not_to_be_stored(http_client: AsyncHTTPClient, base_url: str, path: str) -> None:
    assert (await get(http_client, base_url + path)).headers["Cache-Control"] == "no-store"
