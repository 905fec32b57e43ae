"""A client or a node is gone; a deploy and a storm; and docs/faults.md, which names the proof of each fault."""

import ast
import asyncio
import contextlib
import math
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import socketio
from clients import SUCCESS, client, join, refusal
from cluster import PATIENCE, QUICK_NODES, ROOT
from everyone import (
    answered,
    everyone,
    get,
    has_no_trace_of,
    held_up,
    indexed,
    indexes,
    is_whole,
    not_ready_because_of,
    present,
    serving,
    succeeds,
)
from waiting import until

from lesson_server import server as server_module
from lesson_server.events import join_lesson
from lesson_server.settings.schema import Settings
from lesson_server.stores import availability
from lesson_server.stores.redis import nodes, receiver, removals, seat_sweeper, store, subscription

pytestmark = pytest.mark.usefixtures("quick_nodes")

BUSY = "the lesson service is busy, try again"


# The clients


async def stays_away(sio):
    """Ends a client's connection without a word, as a closed laptop does once its network notices."""
    await sio.eio.http.close()


# A client is gone


@pytest.mark.parametrize("name", ["connected", "seated", "registered", "teacher"])
def test_a_client_that_is_gone_leaves_nothing_behind(io_loop, server, redis_client, mint, name):
    async def story():
        async with everyone(server, mint) as people:
            sid = vars(people)[name].get_sid()
            await stays_away(vars(people)[name])
            await until(lambda: sid not in server.gateway.connections)
            rest = {"registered", "teacher"} - {name}
            await until(lambda: is_whole(redis_client, people, *rest))
            assert name == "registered" or not redis_client.exists(name)

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_a_client_gone_in_mid_join_leaves_nothing_behind(server, redis_proxy, redis_client, mint):
    async with everyone(server, mint) as people:
        sid = people.joining.get_sid()
        redis_proxy.hang()
        await people.joining.emit("join_lesson")
        await held_up(server)
        await stays_away(people.joining)
        await until(lambda: sid not in server.gateway.connections)
        redis_proxy.restore()
        await until(lambda: sid not in dict(server._rooms.get_participants("/", "1")))
        await until(lambda: has_no_trace_of(redis_client, "joining"))
        assert is_whole(redis_client, people, "registered", "teacher")


@pytest.mark.gen_test
async def test_a_client_gone_while_redis_registers_it_leaves_nothing_behind(
    server, redis_client, redis_proxy, mint, monkeypatch
):
    """Its presence arrives in Redis after its connection has begun to end."""
    seats = server.gateway._services.seats
    ensure_map = seats.ensure_map

    async def then_redis_hangs(*args):
        await ensure_map(*args)
        redis_proxy.hang()

    async with everyone(server, mint) as people:
        sid = people.joining.get_sid()
        monkeypatch.setattr(seats, "ensure_map", then_redis_hangs)
        await people.joining.emit("join_lesson")
        await held_up(server, "seated", 2)
        await stays_away(people.joining)
        await until(lambda: sid not in server.gateway.connections)
        redis_proxy.restore()
        await until(lambda: redis_client.exists("joining"))  # it got in, so its next join is a reconnect
        await until(lambda: is_whole(redis_client, people, "registered", "teacher"))
        await until(lambda: sid not in indexed(redis_client))


# A node is gone


@pytest.mark.gen_test(timeout=60)
async def test_the_ghosts_of_a_killed_node_are_removed_by_another(
    start_node, environ, fragile, redis_proxy, redis_client, mint
):
    dying, other = start_node(fragile), start_node(environ)
    async with everyone(dying, mint) as people, everyone_elsewhere(other, mint) as elsewhere:
        redis_proxy.hang()
        await people.joining.emit("join_lesson")
        await held_up(dying)
        dying.send(signal.SIGKILL)
        redis_proxy.restore()  # what it had sent before it died arrives nevertheless
        await until(lambda: not any(sio.connected for sio in vars(people).values()))
        await until(lambda: present(redis_client) == {"elsewhere": elsewhere.get_sid()})
        await until(lambda: redis_client.hlen("lesson_node_counts") == 1)
        assert len(indexes(redis_client)) == 1
        assert has_no_trace_of(redis_client, "joining")
        assert has_no_trace_of(redis_client, "connected")
        assert has_no_trace_of(redis_client, "teacher")
        # The record by which a reconnect is known outlives its connection by the contract's 24 h.
        assert redis_client.hget("registered", "sid")
        _, figures = await get(other, "/metrics")
        assert "lesson_nodes_lost_total 1.0\n" in figures
        assert re.search(r'lesson_presence_corrections_total\{correction="swept"\} [23]\.0\n', figures)


@contextlib.asynccontextmanager
async def everyone_elsewhere(node, mint):
    """A participant of the lesson at another node."""
    async with client(node, client="participant", lesson_id="1", access_token=mint("elsewhere")) as elsewhere:
        assert await join(elsewhere) == SUCCESS
        yield elsewhere


@pytest.mark.gen_test(timeout=60)
async def test_a_ghost_lives_15_seconds_at_most(start_node, environ, redis_client, mint, monkeypatch):
    """The contract's number, in wall time, by the times of production."""
    monkeypatch.undo()
    dying, other = start_node(environ, times={}), start_node(environ, times={})
    async with everyone(dying, mint), everyone_elsewhere(other, mint) as elsewhere:
        dying.send(signal.SIGKILL)
        killed = time.monotonic()
        await until(lambda: present(redis_client) == {"elsewhere": elsewhere.get_sid()}, 15)
        assert (
            time.monotonic() - killed > nodes.HEARTBEAT_INTERVAL * nodes.LOST_AFTER - 1
        )  # it was not the times of a test


@pytest.mark.gen_test
async def test_a_node_that_starts_later_removes_the_ghosts_of_the_last_one(environ, start_node, redis_client, mint):
    """One node, killed, and started again by its supervisor."""
    last = start_node(environ)
    async with everyone(last, mint):
        last.send(signal.SIGKILL)
        last.wait()
        assert set(present(redis_client)) == {"registered", "teacher"}
        async with serving(environ):
            await until(lambda: not present(redis_client) and len(indexes(redis_client)) == 0)


@pytest.mark.gen_test(timeout=60)
async def test_a_node_that_was_stopped_and_revives_writes_its_presence_again(start_node, environ, redis_client, mint):
    """Longer than its lease: it is swept as lost, then it comes back, with clients that never noticed."""
    stopped, other = start_node(environ), start_node(environ)
    async with everyone(stopped, mint) as people, everyone_elsewhere(other, mint) as elsewhere:
        stopped.send(signal.SIGSTOP)
        await until(lambda: present(redis_client) == {"elsewhere": elsewhere.get_sid()})
        # Meanwhile one of them gives up and joins at the other node: what comes back must leave that alone.
        async with client(other, client="participant", lesson_id="1", access_token=mint("registered")) as moved:
            assert await join(moved) == SUCCESS
            joining = asyncio.ensure_future(join(people.joining))
            stopped.send(signal.SIGCONT)
            assert await joining == SUCCESS
            await until(lambda: set(present(redis_client)) == {"elsewhere", "registered", "teacher", "joining"})
            assert present(redis_client)["registered"] == moved.get_sid()
            assert present(redis_client)["teacher"] == people.teacher.get_sid()
            assert await answered(people.connected, people.seated, people.registered) == [SUCCESS] * 3
            # The old socket ends after the new join.
            await people.registered.disconnect()
            await until(lambda: redis_client.hlen("lesson_node_counts") == 2)
            assert present(redis_client)["registered"] == moved.get_sid()


# Deploy and storm


@pytest.mark.gen_test(timeout=60)
async def test_a_deploy_sends_everybody_away_and_leaves_nothing(start_node, fragile, redis_proxy, redis_client, mint):
    node = start_node(fragile, LESSON_SERVER_DRAIN="2")
    async with everyone(node, mint) as people:
        redis_proxy.hang()
        await people.joining.emit("join_lesson")
        await held_up(node)
        node.send(signal.SIGTERM)
        await until(lambda: not_ready_because_of(node, "the server"))
        with pytest.raises(socketio.exceptions.ConnectionError):
            await socketio.AsyncClient(reconnection=False).connect(node.url, auth={})
        await until(lambda: not any(sio.connected for sio in vars(people).values()))
        redis_proxy.restore()  # not before: the join that it holds up must not come to its end
        assert await asyncio.to_thread(node.wait) == 0
        assert present(redis_client) == {}
        assert has_no_trace_of(redis_client, "joining")
        assert sorted(redis_client.keys()) == ["lesson_seat_1", "registered"]
        assert "Traceback" not in node.log


@pytest.mark.gen_test(timeout=60)
async def test_a_deploy_while_redis_hangs_ends_in_time_and_another_node_removes_the_rest(
    start_node, environ, fragile, redis_proxy, redis_client, mint
):
    node = start_node(fragile, QUICK_NODES | {"server.PRESENCE_DEADLINE": 0.5}, LESSON_SERVER_DRAIN="0.5")
    other = start_node(environ)
    async with everyone(node, mint), everyone_elsewhere(other, mint) as elsewhere:
        redis_proxy.hang()
        node.send(signal.SIGTERM)
        assert await asyncio.to_thread(node.wait) == 0
        assert "Traceback" not in node.log
        await until(lambda: present(redis_client) == {"elsewhere": elsewhere.get_sid()})


@pytest.mark.gen_test(timeout=60)
async def test_a_second_sigterm_stops_at_once(start_node, environ, redis_client, mint):
    node = start_node(environ, LESSON_SERVER_DRAIN="600")
    async with everyone(node, mint):
        node.send(signal.SIGTERM)
        await until(lambda: not_ready_because_of(node, "the server"))
        node.send(signal.SIGTERM)
        assert await asyncio.to_thread(node.wait) == 0
        assert present(redis_client) == {}


@pytest.mark.gen_test
async def test_a_storm_of_connections_is_refused_politely_and_harms_nobody(environ, mint):
    async with serving(environ, LESSON_SERVER_CONNECT_RATE="3") as server, everyone(server, mint) as people:
        auth = {"client": "participant", "lesson_id": "1"}
        stormers = [socketio.AsyncClient(reconnection=False) for _ in range(12)]
        told = []
        for sio in stormers:
            sio.on("connect_error", told.append)
        await asyncio.gather(*(connect(sio, server, auth) for sio in stormers))
        assert told
        assert {told_one["message"] for told_one in told} == {BUSY}
        assert sum(sio.connected for sio in stormers) + len(told) == len(stormers)
        assert await answered(people.connected, people.seated, people.registered) == [SUCCESS] * 3
        for sio in stormers:
            await sio.disconnect()
            await sio.shutdown()
        # It passes by itself.
        async with client_when_admitted(server, auth) as newcomer:
            assert await join(newcomer) == SUCCESS


async def connect(sio, node, auth):
    with contextlib.suppress(socketio.exceptions.ConnectionError):
        await sio.connect(node.url, transports=["websocket"], auth=auth)


@contextlib.asynccontextmanager
async def client_when_admitted(node, auth):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            async with client(node, **auth) as sio:
                yield sio
                return
        except socketio.exceptions.ConnectionError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


@pytest.mark.gen_test
async def test_a_storm_of_joins_is_refused_politely_and_each_may_try_again(environ, redis_client, mint):
    async with serving(environ, LESSON_SERVER_JOIN_RATE="2") as server, contextlib.AsyncExitStack() as stack:
        people = [
            await stack.enter_async_context(
                client(server, client="participant", lesson_id="1", access_token=mint(f"p{number}"))
            )
            for number in range(8)
        ]
        answers = await answered(*people)
        refused = [sio for sio, answer in zip(people, answers, strict=True) if answer != SUCCESS]
        assert refused
        assert all(answer in (SUCCESS, {"status": "ERROR", "message": BUSY}) for answer in answers)
        for sio in refused:
            await until(partial(succeeds, sio))
        assert len(present(redis_client)) == len(people)


@pytest.mark.gen_test
async def test_a_full_server_says_so(environ):
    auth = {"client": "participant", "lesson_id": "1"}
    async with serving(environ, LESSON_SERVER_MAX_CONNECTIONS="1") as server:
        async with client(server, **auth):
            assert await refusal(server, auth) == BUSY
        async with client_when_admitted(server, auth) as newcomer:
            assert await join(newcomer) == SUCCESS


# docs/faults.md


def constants_of(module):
    """The numbers that a module's source gives to its constants, whatever a test has made of them."""
    tree = ast.parse(Path(module.__file__).read_text())
    return {
        ast.unparse(target): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
    }


MATRIX = (ROOT / "docs/faults.md").read_text()


def test_every_test_that_the_matrix_names_exists():
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", MATRIX))
    assert named
    assert named <= defined


def test_every_fault_of_the_matrix_has_its_proof():
    what_happens, proofs = MATRIX.split("## The proofs")
    faults = {
        section: re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[1:]
        for section, text in (("matrix", what_happens), ("proofs", proofs))
    }
    assert faults["matrix"] == faults["proofs"]


def test_every_time_of_the_matrix_is_what_its_constants_make_of_it():
    """As in ``9 s (`HEARTBEAT_INTERVAL` times `LOST_AFTER`)``: of the sources, and of the default settings."""
    sections = {name: getattr(Settings(), name) for name in ("redis", "rds", "seats", "server")}
    constants = {
        **constants_of(nodes),
        **{f"{module.__name__.rpartition('.')[2]}.{name}": value for module in (nodes, removals)
           for name, value in constants_of(module).items()},
        **{name: constants_of(module)[name] for module, name in (
            (join_lesson, "DEADLINE"), (removals, "REMOVAL_PATIENCE"), (store, "LATE_WRITE"),
            (availability, "PROBE_INTERVAL"), (availability, "PROBE_TIMEOUT"), (subscription, "CONFIRMATION_TIMEOUT"),
            (server_module, "PRESENCE_DEADLINE"), (server_module, "ANALYTICS_DEADLINE"),
            (seat_sweeper, "SWEEP_INTERVAL"), (receiver, "RECONNECT_INTERVAL"), (receiver, "RECEIVE_TIMEOUT"),
            (receiver, "PING_INTERVAL"))},
    }  # fmt: skip

    def value(name):
        section, _, setting = name.partition(".")
        return getattr(sections[section], setting) if section in sections else constants[name]

    times = re.findall(r"([\d.]+) s(?: at most)?\s+\(((?:`[\w.]+`(?: \+ | times )?)+)\)", MATRIX)
    assert len(times) > 10
    for told, formula in times:
        terms = [re.findall(r"`([\w.]+)`", term) for term in formula.split("+")]
        assert float(told) == sum(math.prod(map(value, factors)) for factors in terms), formula
