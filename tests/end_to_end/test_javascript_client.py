"""The official JavaScript client, as the Teacher App and the Participant's page use it."""

import asyncio
import contextlib
import json
import shutil

import pytest
from clients import client, join
from cluster import ROOT
from roster_api import TOKEN

JS = ROOT / "tests/js"
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


# docs/events/seat_changed.md


@contextlib.asynccontextmanager
async def seat_example(server, **auth):
    """The example of the page, as tests/js/show_seats.js runs it."""
    options = json.dumps({"auth": auth, "page": str(ROOT / "docs/events/seat_changed.md"), "token": TOKEN})
    command, pipe = ("node", JS / "show_seats.js", server.url, options), asyncio.subprocess.PIPE
    node = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield node
    finally:
        node.stdin.close()
        await node.wait()


async def shown(node, **seats):
    """Waits until the example shows exactly these seats as taken."""
    taken = None
    while taken != seats:
        shown_map = json.loads(await node.stdout.readline())
        taken = {f"seat_{seat}": person for seat, person in shown_map.items() if person}
    assert len(shown_map) == 30


def test_the_example_of_the_page_shows_the_seats_without_a_gap(io_loop, start_server, mint):
    here, there = (start_server(LESSON_ADMIN_TOKEN=TOKEN) for _ in range(2))

    async def story():
        async with client(there, client="participant", lesson_id="1", access_token=mint("anna")) as anna:
            await join(anna)
            await anna.call("take_seat", {"seat": 5})
            async with seat_example(here, client="participant", lesson_id="1") as node:
                await shown(node, seat_5="anna")  # from the map of the back end
                await anna.call("take_seat", {"seat": 7})
                await shown(node, seat_7="anna")  # from two changes
                node.stdin.write(b"reconnect\n")
                await anna.call("leave_seat")  # before, while or after it is away
                await shown(node)
                await anna.call("take_seat")
                await shown(node, seat_1="anna")

    io_loop.run_sync(story, timeout=30)
