"""The official JavaScript client, as the Teacher App and the Participant's page use it."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

JS = Path(__file__).parents[1] / "js"
SUCCESS = {"status": "SUCCESS", "data": {}}

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not there"),
    pytest.mark.skipif(not (JS / "node_modules/socket.io-client").exists(), reason="socket.io-client is not installed"),
]


async def run(server, joins=1, transports=("websocket",), **auth):
    """What the client saw, as tests/js/join.js prints it."""
    options = json.dumps({"auth": auth, "joins": joins, "transports": transports})
    command = ("node", JS / "join.js", server.url, options)
    node = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await node.communicate()
    return json.loads(output)


@pytest.mark.parametrize("transports", [["websocket"], ["polling"]], ids="/".join)
def test_it_joins(io_loop, server, mint, transports):
    seen = io_loop.run_sync(
        lambda: run(server, 3, transports, client="teacher", lesson_id=1, access_token=mint("t1", "teacher"))
    )
    assert seen == {"answers": [SUCCESS] * 3, "transport": transports[0]}


@pytest.mark.gen_test
async def test_it_upgrades_from_polling_to_websocket(server, mint):
    seen = await run(server, 1, ["polling", "websocket"], client="participant", lesson_id=1, access_token=mint())
    assert seen["transport"] == "websocket"
    assert seen["answers"]
    assert all(answer == SUCCESS for answer in seen["answers"])


@pytest.mark.parametrize("transports", [["websocket"], ["polling"]], ids="/".join)
def test_it_is_told_why_it_is_refused(io_loop, server, transports):
    seen = io_loop.run_sync(lambda: run(server, 1, transports, client="hub", lesson_id=1))
    assert seen == {"answers": [], "connect_error": "the Hub does not join lessons"}


@pytest.mark.gen_test
async def test_it_gets_an_error_as_an_answer(server):
    seen = await run(server, 1, client="participant", lesson_id="none-such")
    assert seen["answers"] == [{"status": "ERROR", "message": "lesson none-such not found"}]
