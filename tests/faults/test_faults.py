"""What happens in production, done to real stores and real nodes. docs/faults.md is the matrix of it.

Most tests hold one client in each state of the charts (:func:`everyone`) while the fault lasts, and look at them all.
"""

import ast
import asyncio
import contextlib
import math
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import socketio
from clients import SUCCESS, UNAVAILABLE, client, join, refusal
from cluster import PATIENCE, QUICK_NODES, ROOT, NodeProcess, Postgres, Proxy, Valkey
from tornado.httpclient import AsyncHTTPClient

from lesson_server import server as server_module
from lesson_server.events import join_lesson
from lesson_server.protocol import rooms
from lesson_server.server import LessonServer
from lesson_server.settings.schema import Settings
from lesson_server.settings.sources import load
from lesson_server.stores import availability
from lesson_server.stores.redis import nodes, presence

# The contract: seconds in which a join is answered, and in which a server is itself again once a store has returned.
ANSWERED = 5.0
RECOVERED = 5.0
BUSY = "the lesson service is busy, try again"


@pytest.fixture(autouse=True)
def quick_nodes(monkeypatch):
    """The nodes of this process live as fast as those of :class:`NodeProcess`."""
    for name, value in QUICK_NODES.items():
        monkeypatch.setattr(nodes, name.removeprefix("stores.redis.nodes."), value)


@pytest.fixture
def proxy_to():
    """Proxies to unix sockets."""
    proxies = []

    def proxy_to(path):
        proxies.append(Proxy(path))
        return proxies[-1]

    yield proxy_to
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def redis_proxy(proxy_to, stores):
    return proxy_to(stores.redis_url.removeprefix("unix://"))


@pytest.fixture
def rds_proxy(proxy_to, stores):
    return proxy_to(re.search(r"host=(\S+)", stores.dsn)[1] + "/.s.PGSQL.5432")


@pytest.fixture
def fragile(environ, redis_proxy, rds_proxy):
    """The environment of a node that reaches both stores through proxies."""
    dsn = f"host=127.0.0.1 port={rds_proxy.port} user=postgres dbname=lessons sslmode=disable gssencmode=disable"
    return {**environ, "LESSON_REDIS_URL": f"redis://127.0.0.1:{redis_proxy.port}", "LESSON_RDS_DSN": dsn}


@contextlib.asynccontextmanager
async def serving(environ, **more):
    """A node in this process."""
    server = LessonServer(load(environ={**environ, **more}))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
def server(io_loop, fragile, redis_proxy, rds_proxy):
    """A node in this process, whose stores can be hurt; they are well again when it stops."""
    server = LessonServer(load(environ=fragile))
    io_loop.run_sync(server.start)
    yield server
    redis_proxy.mend()
    rds_proxy.mend()
    io_loop.run_sync(server.stop)


@pytest.fixture
def start_node():
    """Starts nodes in processes of their own; several of them start at the same time."""
    started = []

    def start_node(environ, times=QUICK_NODES, **more):
        started.append(NodeProcess({**environ, **more}, times))
        return started[-1]

    yield start_node
    for node in started:
        node.close()


@pytest.fixture(scope="module")
def own_rds(tmp_path_factory):
    postgres = Postgres(tmp_path_factory.mktemp("rds"))
    yield postgres
    postgres.close()


@pytest.fixture
def own_redis(tmp_path, request):
    """A Valkey of the test's own; parametrized indirectly by whether it keeps its data over a restart."""
    valkey = Valkey(tmp_path, keeps_data=getattr(request, "param", True))
    yield valkey
    valkey.close()


# The clients


@contextlib.asynccontextmanager
async def everyone(node, mint):
    """One client in each state that lasts; ``joining`` is one for the test to put into the middle of its join."""
    async with (
        client(node, client="participant", lesson_id="1", access_token=mint("connected")) as connected,
        client(node, client="participant", lesson_id="1", access_token=mint("joining")) as joining,
        client(node, client="participant", lesson_id="1") as seated,
        client(node, client="participant", lesson_id="1", access_token=mint("registered")) as registered,
        client(node, client="teacher", lesson_id="1", access_token=mint("teacher", "teacher")) as teacher,
    ):
        for sio in (seated, registered, teacher):
            assert await join(sio) == SUCCESS
        yield SimpleNamespace(
            connected=connected, joining=joining, seated=seated, registered=registered, teacher=teacher
        )


def sids(people):
    return {name: sio.get_sid() for name, sio in vars(people).items()}


def present(redis_client, lesson_id="1"):
    """Whom Redis tells to be in a lesson, and by which sid."""
    return {
        **redis_client.hgetall(f"lesson_teacher_{lesson_id}"),
        **redis_client.hgetall(f"lesson_student_{lesson_id}"),
    }


def is_whole(redis_client, people, *names):
    """Whether Redis tells the whole truth: exactly these are there, each by its sid, and the lesson has its seats."""
    return (
        present(redis_client) == {name: vars(people)[name].get_sid() for name in names}
        and redis_client.hlen("lesson_seat_1") == 30
    )


def indexes(redis_client):
    """The indexes of the nodes that hold somebody."""
    return [key for key in redis_client.keys("lesson_node_*") if "claims" not in key and key != "lesson_node_counts"]


def indexed(redis_client):
    """What stands in the indexes of the nodes."""
    return "".join(entry for key in indexes(redis_client) for entry in redis_client.hvals(key))


def has_no_trace_of(redis_client, who):
    """Whether nothing of a client that never got in stands in Redis."""
    claims = redis_client.keys(f"lesson_node_claims:{who}*") + redis_client.keys(f"lesson_node_claims*{{{who}}}")
    return not (redis_client.exists(who) or who in present(redis_client) or who in indexed(redis_client) or claims)


async def until(condition, seconds=PATIENCE):
    """Waits for what comes true by itself."""
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.02)


async def get(node, path):
    answer = await AsyncHTTPClient().fetch(node.url + path, raise_error=False, request_timeout=ANSWERED)
    return answer.code, answer.body.decode()


async def is_ready(node):
    return (await get(node, "/readyz"))[0] == 200


async def answered(*people):
    """Their joins' answers, each of which comes within the contract's time."""
    async with asyncio.timeout(ANSWERED):
        return await asyncio.gather(*map(join, people))


async def stays_away(sio):
    """Ends a client's connection without a word, as a closed laptop does once its network notices."""
    await sio.eio.http.close()


async def held_up(node, state="lesson_validated", count=1):
    """Waits until a join is held up by Redis in that state of the chart, where ``count`` participants are then."""

    async def reached():
        _, text = await get(node, "/metrics")
        return f'lesson_connections{{client="participant",event="join_lesson",state="{state}"}} {count}.0' in text

    await until(reached)


def changes_of_condition(caplog, store):
    """What the log says of a store, one line a change."""
    return [
        "down" if "is unavailable" in record.message else "up"
        for record in caplog.records
        if record.name == "lesson_server.stores.availability" and record.message.startswith(f"{store} is ")
    ]


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
        redis_proxy.mend()
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
        redis_proxy.mend()
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
        redis_proxy.mend()  # what it had sent before it died arrives nevertheless
        await until(lambda: not any(sio.connected for sio in vars(people).values()))
        await until(lambda: present(redis_client) == {"elsewhere": elsewhere.get_sid()})
        await until(lambda: redis_client.hlen("lesson_node_counts") == 1)
        assert len(indexes(redis_client)) == 1
        assert has_no_trace_of(redis_client, "joining")
        assert has_no_trace_of(redis_client, "connected")
        assert has_no_trace_of(redis_client, "teacher")
        # The record by which a reconnect is known outlives its connection by the contract's 24 h.
        assert redis_client.hget("registered", "sid")


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


# Redis is empty, restarted, down, hung, slow


@pytest.mark.gen_test
async def test_after_flushall_the_node_writes_everything_again(server, redis_client, mint):
    reconnects = server._metrics.reconnects._value.get
    async with everyone(server, mint) as people:
        redis_client.flushall()
        await until(lambda: is_whole(redis_client, people, "registered", "teacher"))
        assert redis_client.hgetall("registered") == {
            "sid": people.registered.get_sid(),
            "client_id": "registered",
            "role": "student",
        }
        assert redis_client.hgetall("teacher") == {"lesson_id": "1"}
        assert 0 < redis_client.ttl("registered") <= presence.DAY
        assert reconnects() == 0
        # It is as it was: a join, a rejoin and a leave work on it.
        assert await answered(people.connected, people.joining, people.seated) == [SUCCESS] * 3
        await people.registered.disconnect()
        await until(lambda: is_whole(redis_client, people, "connected", "joining", "teacher"))


async def joins_through(fault, people, server, redis_proxy, redis_client):
    """One joins; while Redis has not answered, something happens; and then the join is whole."""
    redis_proxy.hang()
    joining = asyncio.ensure_future(join(people.joining))
    await held_up(server)
    fault()
    redis_proxy.mend()
    assert await joining == SUCCESS
    await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))


@pytest.mark.gen_test
async def test_a_join_in_the_middle_of_flushall_is_whole(server, redis_proxy, redis_client, mint):
    async with everyone(server, mint) as people:
        await joins_through(redis_client.flushall, people, server, redis_proxy, redis_client)


@pytest.mark.parametrize("own_redis", [True, False], indirect=True, ids=["with its data", "empty"])
def test_a_restart_of_redis_is_survived(io_loop, start_server, own_redis, mint, caplog):
    server = start_server(LESSON_REDIS_URL=own_redis.url)

    async def story():
        async with everyone(server, mint) as people:
            before = sids(people)
            own_redis.kill()
            assert await answered(people.joining) == [UNAVAILABLE]
            async with client(server, client="participant", lesson_id="1") as newcomer:
                assert await answered(newcomer) == [UNAVAILABLE]
            own_redis.start()
            await until(lambda: succeeds(people.joining), RECOVERED)
            await until(lambda: is_ready(server), RECOVERED)
            await until(lambda: is_whole(own_redis.client, people, "joining", "registered", "teacher"))
            assert sids(people) == before
            assert await answered(people.connected, people.seated, people.registered) == [SUCCESS] * 3
            assert server._metrics.reconnects._value.get() == 0

    io_loop.run_sync(story, PATIENCE * 2)
    assert changes_of_condition(caplog, "Redis") == ["down", "up"]


async def succeeds(sio):
    return await join(sio) == SUCCESS


FAULTS = {
    "down": lambda proxy: proxy.refuse(),
    "hung": lambda proxy: proxy.hang(),
    "slow": lambda proxy: proxy.slow_down(ANSWERED),  # slower than redis.timeout and rds.timeout may be set
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("store", ["Redis", "RDS"])
def test_an_outage_is_said_survived_and_forgotten(
    io_loop, server, redis_proxy, rds_proxy, redis_client, mint, caplog, store, fault
):
    proxy = {"Redis": redis_proxy, "RDS": rds_proxy}[store]

    async def story():
        async with everyone(server, mint) as people:
            before = sids(people)
            FAULTS[fault](proxy)
            # Every client gets its answer, and keeps its socket.
            answers = asyncio.ensure_future(answered(people.connected, people.joining))
            assert (await get(server, "/healthz"))[0] == 200
            code, named = await get(server, "/readyz")
            assert (code, store in named) == (503, True)
            assert await answers == [UNAVAILABLE] * 2
            await until(lambda: changes_of_condition(caplog, store) == ["down"])
            assert await answered(people.seated, people.registered, people.teacher) == [SUCCESS] * 3
            assert sids(people) == before
            assert set(server.gateway.connections) == set(before.values())
            assert not any(
                sid in dict(server._rooms.get_participants("/", "1"))
                for sid in (people.connected.get_sid(), people.joining.get_sid())
            )
            await until(lambda: changes_of_condition(caplog, store) == ["down"])
            # Who goes now is not forgotten.
            await asyncio.gather(people.registered.disconnect(), people.teacher.disconnect())
            await until(lambda: not {before["registered"], before["teacher"]} & set(server.gateway.connections))
            proxy.mend()
            await until(lambda: succeeds(people.joining), RECOVERED)
            await until(lambda: is_ready(server), RECOVERED)
            await until(lambda: is_whole(redis_client, people, "joining"), RECOVERED)
            await until(lambda: has_no_trace_of(redis_client, "teacher"))
            assert has_no_trace_of(redis_client, "connected")

    io_loop.run_sync(story, PATIENCE * 2)
    assert changes_of_condition(caplog, store) == ["down", "up"]


@pytest.mark.parametrize("store", ["Redis", "RDS"])
def test_a_store_that_hangs_costs_only_the_first_joins_their_timeout(
    io_loop, server, redis_proxy, rds_proxy, redis_client, mint, caplog, store
):
    proxy = {"Redis": redis_proxy, "RDS": rds_proxy}[store]
    timeout = {"Redis": server._settings.redis.timeout, "RDS": server._settings.rds.timeout}[store]

    async def story():
        async with everyone(server, mint) as people:
            proxy.hang()
            assert await answered(people.connected) == [UNAVAILABLE]
            await until(lambda: changes_of_condition(caplog, store) == ["down"])
            async with asyncio.timeout(timeout / 2):
                for _ in range(5):
                    assert await join(people.joining) == UNAVAILABLE
            proxy.mend()
            await until(lambda: succeeds(people.joining), RECOVERED)
            await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))

    io_loop.run_sync(story, PATIENCE)


@pytest.mark.gen_test
async def test_a_redis_that_is_slow_within_its_timeout_is_only_slow(server, redis_proxy, redis_client, mint):
    async with everyone(server, mint) as people:
        redis_proxy.slow_down(0.3)
        assert await answered(people.connected, people.joining) == [SUCCESS] * 2
        redis_proxy.mend()
        await until(lambda: is_whole(redis_client, people, "connected", "joining", "registered", "teacher"))


@pytest.mark.gen_test(timeout=60)
async def test_a_stopped_redis_process_is_survived(environ, own_redis, mint):
    """SIGSTOP: what was sent to it waits in its sockets, and is carried out when it goes on, given up or not."""
    async with serving(environ, LESSON_REDIS_URL=own_redis.url) as server, everyone(server, mint) as people:
        own_redis.hang()
        try:
            answers = asyncio.ensure_future(answered(people.connected, people.joining))
            assert (await get(server, "/healthz"))[0] == 200
            assert (await get(server, "/readyz"))[0] == 503
            assert await answers == [UNAVAILABLE] * 2
            await asyncio.gather(people.registered.disconnect(), people.teacher.disconnect())
        finally:
            own_redis.mend()
        await until(lambda: succeeds(people.joining), RECOVERED)
        await until(lambda: is_ready(server), RECOVERED)
        await until(lambda: is_whole(own_redis.client, people, "joining"))
        await until(lambda: has_no_trace_of(own_redis.client, "teacher"))
        assert has_no_trace_of(own_redis.client, "connected")


@pytest.mark.gen_test
async def test_a_failed_join_that_redis_carries_out_after_all_leaves_no_ghost(server, redis_client, mint, monkeypatch):
    """The write that was given up arrives after its removal. The client stays connected, and does not try again."""
    async with everyone(server, mint) as people:
        run, late = server._redis.run, []

        async def is_late(*commands, bookkeeping=()):
            if commands[0][0] == "EVAL" and bookkeeping:
                late.append((commands, bookkeeping))
                raise presence.StoreUnavailable("Redis", "timeout")
            return await run(*commands, bookkeeping=bookkeeping)

        with monkeypatch.context() as patch:
            patch.setattr(server._redis, "run", is_late)
            assert await join(people.joining) == UNAVAILABLE
        [(commands, bookkeeping)] = late
        await run(*commands, bookkeeping=bookkeeping)
        assert present(redis_client)["joining"] == people.joining.get_sid()
        await until(lambda: is_whole(redis_client, people, "registered", "teacher"), 5)


# RDS


@pytest.mark.gen_test
async def test_a_join_that_rds_has_answered_needs_it_no_more(server, redis_proxy, rds_proxy, redis_client, mint):
    async with everyone(server, mint) as people:
        await joins_through(rds_proxy.refuse, people, server, redis_proxy, redis_client)


@pytest.mark.gen_test(timeout=60)
async def test_a_stopped_rds_process_is_survived(environ, own_rds, redis_client, mint):
    async with serving(environ, LESSON_RDS_DSN=own_rds.dsn) as server, everyone(server, mint) as people:
        own_rds.hang()
        try:
            answers = asyncio.ensure_future(answered(people.connected, people.joining))
            assert (await get(server, "/healthz"))[0] == 200
            code, named = await get(server, "/readyz")
            assert (code, named) == (503, "RDS down\n")
            assert await answers == [UNAVAILABLE] * 2
            assert (await get(server, "/healthz"))[0] == 200
        finally:
            own_rds.mend()
        await until(lambda: succeeds(people.joining), RECOVERED)
        await until(lambda: is_ready(server), RECOVERED)
        await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))


@pytest.mark.gen_test(timeout=60)
async def test_a_restart_of_rds_is_survived(environ, own_rds, redis_client, mint):
    async with serving(environ, LESSON_RDS_DSN=own_rds.dsn) as server, everyone(server, mint) as people:
        await asyncio.to_thread(own_rds.restart)
        await until(lambda: succeeds(people.joining), RECOVERED)
        await until(lambda: is_ready(server), RECOVERED)
        await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))
        assert await answered(people.connected, people.seated, people.registered) == [SUCCESS] * 3


# Many nodes


@pytest.fixture
def two_nodes(start_server):
    return start_server(), start_server()


@pytest.mark.gen_test
async def test_a_room_reaches_across_nodes(two_nodes, mint):
    received = []
    here, there = two_nodes
    async with (
        client(here, client="participant", lesson_id="1") as near,
        client(there, client="participant", lesson_id="1", access_token=mint()) as far,
        client(there, client="participant", lesson_id="1") as waiting,
    ):
        for name, sio in (("near", near), ("far", far), ("waiting", waiting)):
            sio.on("news", lambda data, name=name: received.append(name))
        assert await answered(near, far) == [SUCCESS] * 2
        await until(lambda: is_ready(there))  # its subscription hears
        await here._protocol.sio.emit("news", {}, room="1")
        await until(lambda: sorted(received) == ["far", "near"])
        assert await join(waiting) == SUCCESS  # a round trip later, it has heard nothing
        assert sorted(received) == ["far", "near"]


@pytest.mark.gen_test
async def test_a_subscription_that_was_cut_is_made_again(two_nodes, redis_client):
    received = []
    here, there = two_nodes
    async with client(there, client="participant", lesson_id="1") as far:
        far.on("news", received.append)
        assert await join(far) == SUCCESS
        await until(lambda: is_ready(there))
        redis_client.client_kill_filter(_type="pubsub")
        await until(lambda: redis_client.pubsub_numsub("lesson_node_rooms") == [("lesson_node_rooms", 2)], RECOVERED)
        await here._protocol.sio.emit("news", "again", room="1")
        await until(lambda: received == ["again"])


@pytest.mark.gen_test
async def test_a_subscription_that_hears_nothing_is_not_ready_and_is_replaced(
    server, redis_proxy, redis_client, monkeypatch
):
    """A firewall forgot it: its socket is open, and deaf; all others work."""
    monkeypatch.setattr(rooms, "ECHO_INTERVAL", 0.5)
    monkeypatch.setattr(rooms, "DEAF_AFTER", 1.2)
    redis_client.client_kill_filter(_type="pubsub")  # the next one knows the shorter times
    await until(lambda: is_ready(server))
    redis_proxy.deafen()
    await until(lambda: not_ready_because_of(server, "rooms"))
    await until(lambda: is_ready(server))


async def not_ready_because_of(node, what):
    code, named = await get(node, "/readyz")
    return code == 503 and what in named


@pytest.mark.parametrize("at_another_node", [False, True], ids=["at one node", "at two nodes"])
@pytest.mark.parametrize(("kind", "role"), [("participant", "student"), ("teacher", "teacher")])
def test_of_two_tabs_the_later_join_counts_and_the_old_sockets_end_does_not_matter(
    io_loop, two_nodes, redis_client, mint, at_another_node, kind, role
):
    async def story():
        here, there = two_nodes
        token = mint("anna", role)
        async with client(here, client=kind, lesson_id="1", access_token=token) as old:
            assert await join(old) == SUCCESS
            async with client(
                there if at_another_node else here, client=kind, lesson_id="1", access_token=token
            ) as new:
                assert await join(new) == SUCCESS
                assert present(redis_client) == {"anna": new.get_sid()}
                old_sid = old.get_sid()
                await old.disconnect()
                await until(lambda: old_sid not in indexed(redis_client))
                assert present(redis_client) == {"anna": new.get_sid()}
                assert redis_client.exists("anna")
            await until(lambda: not present(redis_client))

    io_loop.run_sync(story)


@pytest.mark.parametrize("at_another_node", [False, True], ids=["at one node", "at two nodes"])
@pytest.mark.parametrize(("kind", "role"), [("participant", "student"), ("teacher", "teacher")])
def test_when_the_newest_of_several_tabs_ends_the_one_before_it_stands(
    io_loop, two_nodes, redis_client, mint, at_another_node, kind, role
):
    async def story():
        here, there = two_nodes
        auth = {"client": kind, "lesson_id": "1", "access_token": mint("anna", role)}
        async with client(here, **auth) as first, client(here, **auth) as second:
            assert await answered(first, second) == [SUCCESS] * 2
            async with client(there if at_another_node else here, **auth) as third:
                assert await join(third) == SUCCESS
                assert present(redis_client) == {"anna": third.get_sid()}
            await until(lambda: present(redis_client) == {"anna": second.get_sid()}, 2)
            await second.disconnect()
            await until(lambda: present(redis_client) == {"anna": first.get_sid()}, 2)
            person = {"lesson_id": "1"} if kind == "teacher" else {"sid": first.get_sid()}
            assert person.items() <= redis_client.hgetall("anna").items()
        await until(lambda: not present(redis_client), 2)

    io_loop.run_sync(story)


@pytest.mark.gen_test(timeout=60)
async def test_when_the_node_of_the_newest_tab_dies_the_one_before_it_stands(start_node, environ, redis_client, mint):
    here, there = start_node(environ), start_node(environ)
    auth = {"client": "participant", "lesson_id": "1", "access_token": mint("anna")}
    async with client(here, **auth) as first, client(there, **auth) as second:
        assert await join(first) == await join(second) == SUCCESS
        there.send(signal.SIGKILL)
        await until(lambda: present(redis_client) == {"anna": first.get_sid()})
        assert redis_client.hget("anna", "sid") == first.get_sid()


@pytest.mark.parametrize(("kind", "role"), [("participant", "student"), ("teacher", "teacher")])
def test_who_moves_between_lessons_is_in_the_new_one_only(io_loop, two_nodes, redis_client, sql, mint, kind, role):
    """The new lesson's join comes before the old socket's end, at another node."""
    sql.execute("INSERT INTO lessons (id) VALUES ('2')")

    async def story():
        here, there = two_nodes
        async with client(there, client=kind, lesson_id="2", access_token=mint("anna", role)) as new:
            async with client(here, client=kind, lesson_id="1", access_token=mint("anna", role)) as old:
                assert await join(old) == SUCCESS
                assert await join(new) == SUCCESS
                assert present(redis_client, "2") == {"anna": new.get_sid()}
            await until(lambda: not present(redis_client, "1"))
            assert present(redis_client, "2") == {"anna": new.get_sid()}
            expected = {"lesson_id": "2"} if kind == "teacher" else {"sid": new.get_sid()}
            assert expected.items() <= redis_client.hgetall("anna").items()

    io_loop.run_sync(story)


# Deploy and storm


@pytest.mark.gen_test(timeout=60)
async def test_a_deploy_sends_everybody_away_and_leaves_nothing(start_node, fragile, redis_proxy, redis_client, mint):
    node = start_node(fragile, LESSON_SERVER_DRAIN="2")
    async with everyone(node, mint) as people:
        redis_proxy.hang()
        await people.joining.emit("join_lesson")
        await held_up(node)
        node.send(signal.SIGTERM)
        await until(lambda: not_ready_because_of(node, "the server is going"))
        with pytest.raises(socketio.exceptions.ConnectionError):
            await socketio.AsyncClient(reconnection=False).connect(node.url, auth={})
        await until(lambda: not any(sio.connected for sio in vars(people).values()))
        redis_proxy.mend()  # not before: the join that it holds up must not come to its end
        assert await asyncio.to_thread(node.wait) == 0
        assert present(redis_client) == {}
        assert has_no_trace_of(redis_client, "joining")
        assert sorted(redis_client.keys()) == ["lesson_seat_1", "registered"]
        assert "Traceback" not in node.log


@pytest.mark.gen_test(timeout=60)
async def test_a_deploy_while_redis_hangs_ends_in_time_and_another_node_removes_the_rest(
    start_node, environ, fragile, redis_proxy, redis_client, mint
):
    node, other = start_node(fragile, LESSON_SERVER_DRAIN="0.5"), start_node(environ)
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
        await until(lambda: not_ready_because_of(node, "the server is going"))
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
            await until(lambda sio=sio: succeeds(sio))
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
        target.id: ast.literal_eval(node.value)
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
    sections = {name: getattr(Settings(), name) for name in ("redis", "rds", "server")}
    constants = {
        **constants_of(nodes),
        **{f"{module.__name__.rpartition('.')[2]}.{name}": value for module in (nodes, presence)
           for name, value in constants_of(module).items()},
        **{name: constants_of(module)[name] for module, name in (
            (join_lesson, "DEADLINE"), (presence, "REMOVAL_PATIENCE"), (presence, "LATE_WRITE"),
            (availability, "PROBE_INTERVAL"), (availability, "PROBE_TIMEOUT"),
            (server_module, "PRESENCE_DEADLINE"), (server_module, "ANALYTICS_DEADLINE"))},
    }  # fmt: skip

    def value(name):
        section, _, setting = name.partition(".")
        return getattr(sections[section], setting) if section in sections else constants[name]

    times = re.findall(r"([\d.]+) s(?: at most)?\s+\(((?:`[\w.]+`(?: \+ | times )?)+)\)", MATRIX)
    assert len(times) > 10
    for told, formula in times:
        terms = [re.findall(r"`([\w.]+)`", term) for term in formula.split("+")]
        assert float(told) == sum(math.prod(map(value, factors)) for factors in terms), formula
