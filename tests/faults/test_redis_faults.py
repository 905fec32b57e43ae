"""Redis is empty, restarted, down, hung, slow."""

import asyncio

import orjson
import pytest
from clients import SUCCESS, UNAVAILABLE, client, join
from cluster import PATIENCE, Valkey
from everyone import (
    ANSWERED,
    RECOVERED,
    answered,
    everyone,
    get,
    has_no_trace_of,
    is_ready,
    is_whole,
    joins_through,
    present,
    serving,
    succeeds,
)
from roster_api import TOKEN, ask, failure
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import records
from lesson_server.stores.redis.presence_scripts import WRITE

pytestmark = pytest.mark.usefixtures("quick_nodes")


@pytest.fixture
def own_redis(tmp_path, request):
    """A Valkey of the test's own; parametrized indirectly by whether it keeps its data over a restart."""
    valkey = Valkey(tmp_path, keeps_data=getattr(request, "param", True))
    yield valkey
    valkey.close()


def sids(people):
    return {name: sio.get_sid() for name, sio in vars(people).items()}


def changes_of_condition(caplog, store):
    """What the log says of a store, one line a change."""
    return [
        "down" if "is unavailable" in record.message else "up"
        for record in caplog.records
        if record.name == "lesson_server.stores.availability" and record.message.startswith(f"{store} is ")
    ]


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
        assert 0 < redis_client.ttl("registered") <= records.DAY
        assert reconnects() == 0
        # It is as it was: a join, a rejoin and a leave work on it.
        assert await answered(people.connected, people.joining, people.seated) == [SUCCESS] * 3
        await people.registered.disconnect()
        await until(lambda: is_whole(redis_client, people, "connected", "joining", "teacher"))


@pytest.mark.gen_test
async def test_a_join_in_the_middle_of_flushall_is_whole(server, redis_proxy, redis_client, mint):
    async with everyone(server, mint) as people:
        await joins_through(redis_client.flushall, people, server, redis_proxy, redis_client)


@pytest.mark.parametrize("own_redis", [True, False], indirect=True, ids=["with its data", "empty"])
def test_a_restart_of_redis_is_survived(io_loop, own_redis, start_server, mint, caplog):
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
            proxy.restore()
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
            proxy.restore()
            await until(lambda: succeeds(people.joining), RECOVERED)
            await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))

    io_loop.run_sync(story, PATIENCE)


@pytest.mark.gen_test
async def test_a_redis_that_is_slow_within_its_timeout_is_only_slow(server, redis_proxy, redis_client, mint):
    async with everyone(server, mint) as people:
        redis_proxy.slow_down(0.3)
        assert await answered(people.connected, people.joining) == [SUCCESS] * 2
        redis_proxy.restore()
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
            own_redis.restore()
        await until(lambda: succeeds(people.joining), RECOVERED)
        await until(lambda: is_ready(server), RECOVERED)
        await until(lambda: is_whole(own_redis.client, people, "joining"))
        await until(lambda: has_no_trace_of(own_redis.client, "teacher"))
        assert has_no_trace_of(own_redis.client, "connected")


@pytest.mark.gen_test
async def test_a_failed_join_that_redis_carries_out_after_all_leaves_no_ghost(server, redis_client, mint, monkeypatch):
    """The write that was given up arrives after its removal. The client stays connected, and does not try again."""
    async with everyone(server, mint) as people:
        execute, late = server._redis.execute, []

        async def is_late(*commands, bookkeeping=()):
            if commands[0][:2] == ("EVAL", WRITE):
                late.append((commands, bookkeeping))
                raise StoreUnavailable("Redis", "timeout")
            return await execute(*commands, bookkeeping=bookkeeping)

        with monkeypatch.context() as patch:
            patch.setattr(server._redis, "execute", is_late)
            assert await join(people.joining) == UNAVAILABLE
        [(commands, bookkeeping)] = late
        await execute(*commands, bookkeeping=bookkeeping)
        assert present(redis_client)["joining"] == people.joining.get_sid()
        await until(lambda: is_whole(redis_client, people, "registered", "teacher"), 5)


# The roster


@pytest.fixture
def admin_server(fragile, start_server):
    return start_server(**fragile, LESSON_ADMIN_TOKEN=TOKEN, LESSON_REDIS_TIMEOUT="0.5")


@pytest.mark.parametrize("fault", ["down", "hung"])
@pytest.mark.gen_test
async def test_while_redis_does_not_answer_the_roster_says_so(admin_server, redis_proxy, redis_client, mint, fault):
    async with client(admin_server, client="participant", lesson_id="1", access_token=mint()) as sio:
        assert await join(sio) == SUCCESS
        FAULTS[fault](redis_proxy)
        unavailable = (503, "Redis is unavailable, try again")
        for method, path in (
            *(("GET", f"/api/{path}") for path in ("overview", "lessons", "lessons/1")),
            ("DELETE", "/api/lessons/1/participants/p1"),
        ):
            assert await failure(admin_server, path, method) == unavailable
        redis_proxy.restore()
        await until(lambda: is_listed(admin_server))
        assert redis_client.hget("lesson_student_1", "p1") == sio.get_sid()


async def is_listed(server):
    answer = await ask(server, "/api/lessons")
    return answer.code == 200 and orjson.loads(answer.body)["lessons"]
