"""What real servers export, after joins and everything else that happens to clients."""

import asyncio
import json
import os
import urllib.request
from collections import defaultdict
from functools import partial
from pathlib import Path

import jwt
import pytest
from clients import SUCCESS, client, join, refusal
from cluster import KEY
from commands import ServerProcess, running
from once import made_once
from prometheus_client.parser import text_string_to_metric_families
from promql import Export
from tornado.websocket import websocket_connect
from waiting import until

from lesson_server.embedded.stores import EmbeddedStores


def token(subject: str, role: str = "student") -> str:
    return jwt.encode({"sub": subject, "role": role, "exp": 4_000_000_000}, KEY)


async def everything_happens(server: ServerProcess) -> None:
    participant = partial(client, server, client="participant")
    for _ in range(2):  # the second time is a reconnect
        async with participant(lesson_id="1", access_token=token("anna")) as anna:
            assert await join(anna) == SUCCESS
            assert (await anna.call("take_seat"))["status"] == "SUCCESS"
            assert (await anna.call("leave_seat"))["status"] == "SUCCESS"
    async with client(server, client="teacher", lesson_id="1", access_token=token("ms-hill", "teacher")) as teacher:
        assert await join(teacher) == SUCCESS
    async with participant(lesson_id="no-such-lesson") as nowhere, participant(lesson_id="1") as guest:
        assert (await join(nowhere))["message"] == "lesson no-such-lesson not found"
        assert await join(guest) == SUCCESS
    assert await refusal(server, {"client": "hub", "lesson_id": "1"}) == "the Hub does not join lessons"
    websocket = await websocket_connect(server.url.replace("http", "ws") + "/socket.io/?EIO=4&transport=websocket")
    await websocket.write_message("no such packet")
    while await websocket.read_message() is not None:
        pass
    websocket.close()


async def scrape(server: ServerProcess) -> Export:
    """Returns the metrics when all have been sampled: the workers count their connections once a second."""
    export: Export = {}

    async def is_complete() -> bool:
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{server.url}/metrics").read().decode())
        values: dict[str, defaultdict[str, set[str]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = values.setdefault(sample.name, defaultdict(set))
                for label, value in sample.labels.items():
                    labels[label].add(value)
        export.clear()
        export.update(values)
        return {"lesson_connections", "lesson_store_up", "lesson_event_loop_lag_seconds_count"} <= values.keys()

    await until(is_complete)
    return export


def export_of(stores: EmbeddedStores, workers: int) -> Export:
    environ = {
        "LESSON_RDS_DSN": stores.dsn,
        "LESSON_REDIS_URL": stores.redis_url,
        "LESSON_AUTH_KEY": KEY,
        "LESSON_SERVER_PORT": "0",
    }
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ

    async def story(server: ServerProcess) -> Export:
        await everything_happens(server)
        return await scrape(server)

    with running("--workers", workers, **environ) as server:
        return asyncio.run(story(server))


@pytest.fixture(scope="session")
def exports(running_stores: EmbeddedStores, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """What a server in one process exports, and one with workers."""

    def write(folder: Path) -> None:
        servers = {"one process": export_of(running_stores, 1), "two workers": export_of(running_stores, 2)}
        (folder / "exports.json").write_text(json.dumps(servers, default=list))

    read: dict[str, Export] = json.loads((made_once(tmp_path_factory, "exports", write) / "exports.json").read_text())
    return read


@pytest.fixture(params=["one process", "two workers"])
def export(exports: dict[str, Export], request: pytest.FixtureRequest) -> Export:
    return exports[request.param]
