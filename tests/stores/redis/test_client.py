"""client.py: what a broken Redis looks like to the steps; whole servers on Redis Cluster and behind Sentinel."""

import asyncio
import contextlib
import itertools
import time

import psutil
import pytest
import redis
from clients import SUCCESS, client, join
from cluster import Valkey
from presences import new_presence
from redis.asyncio import SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.crc import key_slot
from tornado.httpclient import AsyncHTTPClient
from valkeys import Valkeys, eventually
from waiting import until

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.settings.schema import SettingsError
from lesson_server.status import Status
from lesson_server.stores import availability
from lesson_server.stores.availability import Availability
from lesson_server.stores.redis.client import RedisStore, connect
from lesson_server.stores.redis.nodes import LOST
from lesson_server.stores.redis.records import ClientRecord


@pytest.fixture
def open_store(io_loop):
    opened = []

    def open_store(url, timeout=2.0, pool_size=2):
        opened.append(RedisStore(url, "", timeout, pool_size))
        return opened[-1]

    yield open_store
    for store in opened:
        io_loop.run_sync(store.close)


@pytest.mark.gen_test
async def test_round_trips_beyond_the_pool_wait_for_their_turn(open_store, stores):
    store = open_store(stores.redis_url, pool_size=2)
    await asyncio.gather(*(store.ping() for _ in range(200)))


@pytest.mark.gen_test
async def test_connections_that_redis_has_closed_are_replaced_unnoticed(open_store, stores, redis_client):
    """As after a restart of Redis: each idle connection is dead, and only found so when it is used."""
    store = open_store(stores.redis_url)
    await asyncio.gather(store.ping(), store.ping())
    redis_client.client_kill_filter(_type="normal", skipme=True)
    await asyncio.gather(*(store.ping() for _ in range(10)))


@pytest.mark.gen_test
async def test_what_is_under_way_when_its_connection_breaks_is_sent_once_more(open_store, stores, redis_client):
    store = open_store(stores.redis_url)
    redis_client.client_pause(10_000, all=False)
    writing = asyncio.ensure_future(store.execute(("SET", "key", "value")))
    await until(lambda: any(asking["cmd"] == "set" for asking in redis_client.client_list()))
    redis_client.client_kill_filter(_type="normal", skipme=True)
    redis_client.client_unpause()
    assert await writing == [True]


@pytest.mark.gen_test
async def test_no_redis_is_unavailable(open_store, tmp_path):
    store = open_store(f"unix://{tmp_path}/none.sock")
    with pytest.raises(StoreUnavailable) as caught:
        await store.ping()
    assert "none.sock" in caught.value.cause
    assert store.failures == 1


@pytest.mark.parametrize(
    "url",
    [
        "redis://:ses/ame@127.0.0.1:1/0",
        "redis://127.0.0.1:sesame/0",
        "redis+sentinel://:sesame@127.0.0.1",
        "redis+sentinel://:sesame@127.0.0.1/lessons",
    ],
)
def test_a_malformed_url_is_named_and_not_quoted(open_store, url):
    with pytest.raises(SettingsError) as caught:
        open_store(url)
    assert str(caught.value) == "redis.url (LESSON_REDIS_URL): should be a URL of Redis"


@pytest.mark.parametrize(
    ("login", "user", "password"),
    [("", "", ""), (":pa%3Ass@", "", "pa:ss"), ("us%40er:pa%2Fss@", "us@er", "pa/ss")],
    ids=["nobody", "a password", "user and password"],
)
def test_a_url_of_sentinels_has_their_addresses_and_the_login_at_the_master(login, user, password):
    pool = connect(f"redis+sentinel://{login}one:1,two/3/lessons", 1.5, 4).connection_pool
    options = pool.connection_kwargs
    assert (pool.service_name, options["db"], pool.max_connections) == ("lessons", 3, 4)
    assert (options["username"], options["password"]) == (user, password)
    assert (options["socket_timeout"], options["decode_responses"]) == (1.5, True)
    sentinels = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(each["host"], each["port"]) for each in sentinels] == [("one", 1), ("two", 26379)]
    assert all((each["username"], each["password"], each["socket_timeout"]) == (None, None, 1.5) for each in sentinels)


def test_a_password_of_a_cluster_may_be_anything():
    assert connect("redis+cluster://:a+cluster@one:1", 1.5, 4).connection_kwargs["password"] == "a+cluster"


def test_the_masters_of_a_cluster_are_asked_by_tls_when_the_cluster_is(open_store):
    store = open_store("rediss+cluster://127.0.0.1:1")
    (node,) = store.client.nodes_manager.startup_nodes.values()
    assert store._shard(node).client.connection_pool.connection_class is SSLConnection


@pytest.mark.gen_test
async def test_after_each_failure_of_a_cluster_its_masters_are_looked_up_again(open_store):
    store = open_store("redis+cluster://127.0.0.1:1")
    lookups = set()
    for count in (1, 2):
        with pytest.raises(StoreUnavailable):
            await store.ping()
        assert store.failures == count
        lookups.add(store._refresh)
        await store._refresh
    assert len(lookups) == 2


@pytest.mark.gen_test
async def test_a_store_that_is_closed_asks_the_cluster_for_nothing_any_more(open_store, monkeypatch):
    store = open_store("redis+cluster://127.0.0.1:1")
    monkeypatch.setattr(type(store.client.nodes_manager), "initialize", lambda _: asyncio.Event().wait())
    store._fail_in_cluster()
    await asyncio.sleep(0)
    await store.close()
    assert store._refresh.done()


@pytest.mark.gen_test
async def test_a_redis_that_does_not_answer_is_unavailable_and_is_not_asked_twice(open_store):
    asked = []

    async def silent(reader, writer):
        with contextlib.suppress(ConnectionError):
            while command := await reader.read(4096):
                asked.append(command)
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    store = open_store(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout=0.2)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    server.close()
    assert len(asked) == 1


@pytest.mark.gen_test
async def test_foreign_bytes_in_one_of_our_keys_leave_nobody_waiting(open_store, stores, redis_client):
    redis_client.hset("key", "field", b"\xff")
    with pytest.raises(StoreUnavailable):
        await open_store(stores.redis_url).execute(("HGET", "key", "field"))


@pytest.mark.gen_test
async def test_a_step_without_commands_has_no_answers(open_store, stores):
    assert await open_store(stores.redis_url).execute() == []


@pytest.mark.gen_test
async def test_what_may_fail_fails_nobody_and_is_told_in_its_place(open_store, stores, redis_client):
    store = open_store(stores.redis_url)
    redis_client.set("text", "of another type")
    refused, answer = await store.execute(("PING",), bookkeeping=(("HGET", "text", "field"),))
    assert (type(refused), answer) == (StoreRefused, True)
    with pytest.raises(StoreRefused):
        await store.execute(("HGET", "text", "field"), bookkeeping=(("PING",),))


@pytest.mark.gen_test
async def test_a_defect_reaches_who_asked(open_store, stores):
    with pytest.raises(TypeError):
        await open_store(stores.redis_url).execute(None)


@pytest.mark.gen_test
async def test_who_waits_when_the_store_is_closed_is_told(open_store, stores, redis_client):
    store = open_store(stores.redis_url)
    redis_client.client_pause(500)
    waiting = asyncio.ensure_future(store.ping())
    await asyncio.sleep(0.05)
    await store.close()
    with pytest.raises(StoreUnavailable):
        await waiting
    redis_client.client_unpause()


@pytest.mark.gen_test
async def test_the_log_tells_of_a_change_and_never_of_the_password(open_store, caplog):
    store = open_store("redis://:sesame@127.0.0.1:1")
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await store.ping()
    assert len(caplog.records) == 1
    assert "Redis is unavailable" in caplog.text
    assert "sesame" not in caplog.text


# The status


@pytest.fixture
def own_redis(tmp_path):
    valkey = Valkey(tmp_path, keeps_data=False)
    yield valkey
    valkey.close()


@pytest.mark.gen_test
async def test_the_status_says_whether_redis_answers_and_what_failed_last(own_redis, open_store, quick_probes):
    own_redis.client.config_set("requirepass", "sesame")
    store = open_store(f"{own_redis.url}?password=sesame", timeout=0.5)
    await store.ping()
    assert store.status == Status("up")
    before = time.time()
    own_redis.kill()
    with pytest.raises(StoreUnavailable):
        await store.ping()
    await until(lambda: store.status.status == "down")
    status = store.status
    assert before <= status.failed_at <= time.time()
    assert status.cause
    assert "sesame" not in status.cause
    own_redis.start()  # without a password yet
    with contextlib.suppress(StoreUnavailable):
        await store.ping()
    assert "sesame" not in store.status.cause
    own_redis.client.config_set("requirepass", "sesame")
    await until(lambda: store.status.status == "up")
    await store.ping()
    assert store.status.status == "up"
    assert store.status.failed_at >= status.failed_at
    assert store.status.cause


@pytest.fixture
def quick_probes(monkeypatch):
    monkeypatch.setattr(availability, "PROBE_INTERVAL", 0.01)


@pytest.mark.gen_test
async def test_a_wrong_password_is_not_quoted(own_redis, open_store, quick_probes):
    own_redis.client.config_set("requirepass", "another")
    store = open_store(f"{own_redis.url}?password=sesame", timeout=0.5)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    await until(lambda: store.status.status == "down")
    assert store.status.cause
    assert "sesame" not in store.status.cause


@pytest.mark.gen_test
async def test_of_the_masters_of_a_cluster_the_one_that_is_down_is_the_status(open_store, monkeypatch):
    store = open_store("redis+cluster://127.0.0.1:1")
    assert store.status == Status("up")
    statuses = []
    monkeypatch.setattr(Availability, "status", property(lambda self: statuses[int(self.name.rpartition(":")[2]) - 1]))
    for port in (1, 2, 3):
        store._shard(ClusterNode("127.0.0.1", port))
    never, earlier, later = Status("up"), Status("up", 1.0, "earlier"), Status("up", 2.0, "later")
    down, long_down = Status("down", 1.5, "down"), Status("down", 0.5, "long down")
    for expected, *others in (
        (earlier, never, never),
        (later, earlier, never),
        (down, later, never),
        (long_down, later, earlier),
        (down, long_down, later),
    ):
        for statuses[:] in itertools.permutations((expected, *others)):
            assert store.status == expected


# Redis Cluster and Sentinel, each made of Valkeys of its own


@pytest.fixture
def valkeys(tmp_path):
    valkeys = Valkeys(tmp_path)
    yield valkeys
    valkeys.kill_all()


@pytest.fixture
def cluster_of_one(valkeys):
    """Its port. It has all slots, and still refuses what a larger cluster would refuse."""
    port = valkeys.start("cluster-enabled yes")
    valkeys.ask(port, "CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
    return port


def wait_for_slots(valkeys, port):
    """A node of a cluster serves no keys in its first two seconds."""
    eventually(lambda: "cluster_state:ok" in valkeys.ask(port, "CLUSTER", "INFO"))


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_a_store_that_is_closed_leaves_no_connection(io_loop, open_store, valkeys, cluster_of_one, scheme):
    store = open_store(f"{scheme}://127.0.0.1:{cluster_of_one}")

    def others():
        return len(valkeys.ask(cluster_of_one, "CLIENT", "LIST").splitlines()) - 1

    async def story():
        await store.ping()
        assert others() > 0
        await store.close()
        await until(lambda: others() == 0)

    io_loop.run_sync(story, timeout=15)


def test_a_cluster_of_which_no_master_answers_is_unavailable_and_its_masters_are_named(
    io_loop, open_store, valkeys, cluster_of_one
):
    store = open_store(f"redis+cluster://127.0.0.1:{cluster_of_one}", timeout=0.5)

    async def story():
        await store.ping()
        (shard,) = store._shards.values()
        valkeys.kill(cluster_of_one)
        for _ in range(2):
            with pytest.raises(StoreUnavailable) as caught:
                await store.ping()
            assert caught.value.cause.startswith(f"Redis 127.0.0.1:{cluster_of_one}: ")
            await until(lambda: shard.availability._unavailable)

    io_loop.run_sync(story, timeout=20)


def test_a_key_that_moves_to_another_master_is_found_there_and_the_master_is_remembered(
    io_loop, open_store, valkeys, cluster_of_one
):
    other = valkeys.start("cluster-enabled yes")
    valkeys.ask(cluster_of_one, "CLUSTER", "MEET", "127.0.0.1", other)
    for port in (cluster_of_one, other):
        wait_for_slots(valkeys, port)
    store = open_store(f"redis+cluster://127.0.0.1:{cluster_of_one}")

    async def story():
        assert await store.execute(("GET", "key")) == [None]
        for port in (other, cluster_of_one):
            valkeys.ask(port, "CLUSTER", "SETSLOT", key_slot(b"key"), "NODE", valkeys.ask(other, "CLUSTER", "MYID"))
        assert await store.execute(("SET", "key", "value"), ("GET", "key")) == [True, "value"]
        assert store.failures == 0
        assert store.client.get_node_from_key("key").port == other

    io_loop.run_sync(story, timeout=20)


def test_after_a_failure_what_is_no_master_of_the_cluster_any_more_is_left(io_loop, open_store, cluster_of_one, caplog):
    store = open_store(f"redis+cluster://127.0.0.1:{cluster_of_one}")

    async def story():
        await store.ping()
        former = store._shard(ClusterNode("127.0.0.1", 1))
        store.client.nodes_manager.slots_cache.clear()
        store._fail_in_cluster()
        await store._refresh
        assert list(store._shards) == [f"127.0.0.1:{cluster_of_one}"]
        assert former._closed
        assert store.client.get_node_from_key("key").port == cluster_of_one

    io_loop.run_sync(story, timeout=20)
    assert caplog.messages == ["Redis 127.0.0.1:1 is no master of the cluster any more"]


def test_a_whole_server_works_on_a_redis_cluster(io_loop, valkeys, cluster_of_one, start_server, mint):
    port = cluster_of_one
    wait_for_slots(valkeys, port)
    server = start_server(LESSON_REDIS_URL=f"redis+cluster://127.0.0.1:{port}")
    other = start_server(LESSON_REDIS_URL=f"redis+cluster://127.0.0.1:{port}")

    async def story(look):
        def snapshot():
            return {key: look.hgetall(key) for key in look.keys("*") if "lesson_node" not in key}

        async with (
            client(server, client="teacher", lesson_id="1", access_token=mint("t1", "teacher")) as teacher,
            client(other, client="participant", lesson_id="1", access_token=mint()) as participant,
        ):
            received = []
            participant.on("news", received.append)
            assert await join(teacher) == await join(participant) == SUCCESS
            assert (await AsyncHTTPClient().fetch(other.url + "/readyz")).body == b"ready\n"
            await server._protocol.sio.emit("news", {}, room="1")
            await until(lambda: received)
            before = snapshot()
            assert sorted(before) == ["lesson_seat_1", "lesson_student_1", "lesson_teacher_1", "p1", "t1"]
            look.flushall()
            await asyncio.gather(server._node.beat(), other._node.beat())
            await asyncio.gather(server._node.check_records(), other._node.check_records())
            assert snapshot() == before
            lost = new_presence(server._redis, 60)
            await lost.write(ClientRecord("sid-g", "1", "ghost", "student"))
            look.hset("lesson_node_counts", lost.claims.incarnation.node_id, LOST)
            await server._node.beat()
            await until(lambda: lost.claims.incarnation.node_id not in look.hkeys("lesson_node_counts"))
            assert {key: fields for key, fields in snapshot().items() if key != "ghost"} == before
        await until(lambda: sorted(snapshot()) == ["ghost", "lesson_seat_1", "p1"])

    with contextlib.closing(redis.Redis(port=port, decode_responses=True)) as look:
        io_loop.run_sync(lambda: story(look), timeout=30)


def test_a_server_behind_sentinel_follows_the_master(io_loop, start_server, mint, valkeys):
    master = valkeys.start("repl-diskless-sync-delay 0")
    replica = valkeys.start(f"replicaof 127.0.0.1 {master}")
    eventually(lambda: valkeys.ask(replica, "INFO")["master_link_status"] == "up")
    sentinel = valkeys.start(
        f"sentinel monitor lessons 127.0.0.1 {master} 1",
        "sentinel down-after-milliseconds lessons 500",
        sentinel=True,
    )
    eventually(lambda: len(valkeys.ask(sentinel, "SENTINEL", "REPLICAS", "lessons")) == 1)
    server = start_server(LESSON_REDIS_URL=f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel}/0/lessons")

    async def story():
        async with client(server, client="participant", lesson_id="1", access_token=mint()) as sio:
            assert await join(sio) == SUCCESS
            eventually(lambda: valkeys.ask(replica, "HGETALL", "lesson_student_1"))
            valkeys.kill(master)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, eventually, lambda: valkeys.ask(replica, "INFO")["role"] == "master")
            async with client(server, client="participant", lesson_id="1", access_token=mint("p2")) as second:
                while await join(second) != SUCCESS:
                    await asyncio.sleep(0.05)
                assert valkeys.ask(replica, "HGETALL", "lesson_student_1")["p2"] == second.get_sid()
        assert connected_to(sentinel)
        await server.stop()
        assert not connected_to(sentinel)

    def connected_to(port):
        connections = psutil.Process().net_connections("tcp4")
        return [one for one in connections if one.raddr and one.raddr.port == port and one.status == "ESTABLISHED"]

    io_loop.run_sync(story, timeout=30)


# Scripts

ADD = "return redis.call('INCRBY', KEYS[1], ARGV[1])"


@pytest.mark.gen_test
async def test_a_script_is_sent_once_and_then_named_by_its_digest(open_store, stores, redis_client):
    store = open_store(stores.redis_url)
    redis_client.config_resetstat()
    for count in (1, 2, 3):
        assert await store.execute(("EVAL", ADD, 1, "k", 1)) == [count]
    calls = redis_client.info("commandstats")
    assert (calls["cmdstat_eval"]["calls"], calls["cmdstat_evalsha"]["calls"]) == (1, 2)


@pytest.mark.gen_test
async def test_a_script_that_the_server_does_not_know_any_more_is_sent_again_once_for_each_command(
    open_store, stores, redis_client
):
    """After a restart, or when another master has taken over. All else of the step has been carried out already."""
    store = open_store(stores.redis_url)
    await store.execute(("EVAL", ADD, 1, "k", 1))
    redis_client.script_flush()
    answers = await store.execute(
        ("SET", "before", "x"), ("EVAL", ADD, 1, "k", 10), ("INCR", "n"), ("EVAL", ADD, 1, "k", 100)
    )
    assert answers == [True, 11, 1, 111]
    redis_client.config_resetstat()
    assert await store.execute(("EVAL", ADD, 1, "k", 1)) == [112]
    assert "cmdstat_eval" not in redis_client.info("commandstats")


@pytest.mark.gen_test
async def test_an_error_of_a_script_is_told_likewise_by_its_digest(open_store, stores, redis_client):
    store = open_store(stores.redis_url)
    redis_client.hset("h", "f", "v")
    for _ in range(2):
        with pytest.raises(StoreRefused):
            await store.execute(("EVAL", ADD, 1, "h", 1))
