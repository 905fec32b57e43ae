"""rooms.py: two nodes on one Redis."""

import asyncio
from functools import partial

import pytest
from clients import SUCCESS, client, join
from fakes import settle
from redis.exceptions import ConnectionError as RedisConnectionError
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.protocol import rooms as rooms_module


@pytest.fixture
def nodes(start_server, monkeypatch):
    monkeypatch.setattr(rooms_module, "RESUBSCRIBE_INTERVAL", 0.02)
    return start_server(), start_server()


def news_of(*clients):
    """What reaches each of the clients."""
    received = [[] for _ in clients]
    for sio, box in zip(clients, received, strict=True):
        sio.on("news", box.append)
    return received


@pytest.mark.gen_test
async def test_what_is_emitted_on_one_node_reaches_the_room_on_both(nodes):
    here, there = nodes
    async with (
        client(here, client="participant", lesson_id="1") as first,
        client(there, client="participant", lesson_id="1") as second,
        client(there, client="participant", lesson_id="1") as outside,
    ):
        received = news_of(first, second, outside)
        assert await join(first) == await join(second) == SUCCESS
        await asyncio.gather(here._rooms.ping(), there._rooms.ping())
        await here._protocol.sio.emit("news", {"from": "here"}, room="1")
        await there._protocol.sio.emit("news", {"from": "there"}, room="1")
        await until(lambda: all(len(box) == 2 for box in received[:2]))
        assert received[2] == []
        for box in received[:2]:
            assert sorted(news["from"] for news in box) == ["here", "there"]


@pytest.mark.gen_test
async def test_a_ping_proves_that_the_node_receives_messages(server, redis_client):
    async with asyncio.timeout(5):
        await server._rooms.ping()
    server._rooms.thread.cancel()  # deaf, though Redis answers
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await server._rooms.ping()
    answer = await AsyncHTTPClient().fetch(server.url + "/readyz", raise_error=False)
    assert (answer.code, answer.body) == (503, b"rooms down\n")
    assert server._rooms._echoes == {}


@pytest.mark.gen_test
async def test_a_ping_is_sent_when_there_is_a_subscription(server, monkeypatch):
    sent = []

    async def send(text):
        sent.append(text)

    await server._rooms.close()
    server._rooms._subscribed.clear()
    monkeypatch.setattr(server._rooms, "_send", send)
    ping = asyncio.create_task(server._rooms.ping())
    await settle()
    assert sent == []
    server._rooms._subscribed.set()
    await settle()
    assert len(sent) == 1
    assert server._rooms._take_echo(sent[0])
    assert server._rooms._take_echo(sent[0])  # once more does no harm
    await ping


@pytest.mark.gen_test
async def test_a_server_that_has_just_started_is_ready_at_once(server):
    assert (await AsyncHTTPClient().fetch(server.url + "/readyz")).body == b"ready\n"


@pytest.mark.gen_test
async def test_a_killed_subscription_is_renewed_and_receives_again(nodes, redis_client):
    here, there = nodes
    async with client(there, client="participant", lesson_id="1") as sio:
        (received,) = news_of(sio)
        await join(sio)
        for expected in ([{}], [{}, {}]):
            await asyncio.gather(here._rooms.ping(), there._rooms.ping())
            assert redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 2
            await until(lambda: redis_client.pubsub_numsub("lesson_node_rooms") == [("lesson_node_rooms", 2)])
            await here._protocol.sio.emit("news", {}, room="1")
            await until(partial(received.__eq__, expected))


async def lose_subscription(server, redis_client, monkeypatch):
    """redis-py connects again by itself; then the node finds that it has heard nothing for too long.

    Returns:
        the subscriptions from now on.
    """
    await server._rooms.ping()
    subscriptions = []
    server._rooms.on_subscribed = lambda: subscriptions.append("one")
    monkeypatch.setattr(rooms_module, "SUBSCRIPTION_TIMEOUT", -1.0)
    assert redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
    return subscriptions


@pytest.mark.gen_test
async def test_a_redis_that_is_away_is_no_error_of_the_subscription(server, redis_client, monkeypatch, caplog):
    """The library would log a traceback, and try again at once and without end."""
    errors = [RedisConnectionError("refused"), StoreUnavailable("Redis", "away")]
    pubsub = server._rooms._store.client.pubsub

    def away():
        if errors:
            raise errors.pop()
        monkeypatch.setattr(rooms_module, "SUBSCRIPTION_TIMEOUT", 12.0)
        return pubsub()

    monkeypatch.setattr(server._rooms._store.client, "pubsub", away)
    monkeypatch.setattr(rooms_module, "RESUBSCRIBE_INTERVAL", 0.01)
    await lose_subscription(server, redis_client, monkeypatch)
    await until(lambda: not errors)
    await until_echoed(server)
    assert "Unexpected" not in caplog.text


@pytest.mark.gen_test
async def test_a_lost_subscription_is_made_again_after_a_pause_and_counts_as_none_till_then(
    server, redis_client, monkeypatch
):
    monkeypatch.setattr(rooms_module, "RESUBSCRIBE_INTERVAL", 60.0)
    subscriptions = await lose_subscription(server, redis_client, monkeypatch)
    pubsub, tries = server._rooms._store.client.pubsub, []
    monkeypatch.setattr(server._rooms._store.client, "pubsub", lambda: tries.append("one") or pubsub())
    await until(lambda: subscriptions and not server._rooms._subscribed.is_set())
    for _ in range(50):  # longer than a subscription takes
        await server._rooms._store.ping()
    assert len(subscriptions) == 1  # that of redis-py
    assert not tries


@pytest.mark.gen_test
async def test_a_silent_subscription_proves_itself_by_echoes_and_stays(server, redis_client, monkeypatch):
    """The server is made before the times are short: its subscription is renewed once."""
    monkeypatch.setattr(rooms_module, "RESUBSCRIBE_INTERVAL", 0.01)
    monkeypatch.setattr(rooms_module, "ECHO_INTERVAL", 0.05)
    monkeypatch.setattr(rooms_module, "SUBSCRIPTION_TIMEOUT", 5.0)
    subscriptions = []
    await server._rooms.ping()
    server._rooms.on_subscribed = lambda: subscriptions.append("renewed")
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await until(lambda: subscriptions)
    with redis_client.pubsub(ignore_subscribe_messages=True) as onlooker:
        onlooker.subscribe("lesson_node_rooms")
        echoes = []
        await until(lambda: echoes.append(onlooker.get_message()) or sum(map(bool, echoes)) == 3)
    assert subscriptions == ["renewed"]


@pytest.mark.gen_test
async def test_a_subscription_that_hears_nothing_is_replaced(server, redis_client, monkeypatch):
    """As when a firewall has forgotten the connection: both ends believe in it."""
    monkeypatch.setattr(rooms_module, "RESUBSCRIBE_INTERVAL", 0.01)
    monkeypatch.setattr(rooms_module, "ECHO_INTERVAL", 0.01)
    monkeypatch.setattr(rooms_module, "SUBSCRIPTION_TIMEOUT", 0.05)
    await server._rooms.ping()
    before = redis_client.client_list(_type="pubsub")
    with monkeypatch.context() as patch:
        patch.setattr(rooms_module, "ECHO", "lost:")  # what it sends itself now is not heard
        patch.setattr(server._rooms, "_send", lambda text: asyncio.sleep(0))
        await until(lambda: {c["id"] for c in redis_client.client_list(_type="pubsub")} - {c["id"] for c in before})
    async with asyncio.timeout(5):
        await server._rooms.ping()


@pytest.mark.gen_test
async def test_rooms_are_entered_and_left_on_this_node_only(server, redis_client):
    """The library would ask the other nodes for a sid that it does not know any more."""
    with redis_client.pubsub() as onlooker:
        onlooker.subscribe("lesson_node_rooms")
        assert onlooker.get_message(timeout=5)["type"] == "subscribe"
        await server._rooms.leave_room("nobody", "/", "1")
        with pytest.raises(ValueError, match="sid is not connected"):
            await server._rooms.enter_room("nobody", "/", "1")
        await server._rooms.ping()
        heard = onlooker.get_message(timeout=5)
    assert heard["data"].startswith(rooms_module.ECHO)


@pytest.mark.gen_test
async def test_a_client_that_leaves_a_room_is_not_in_it_any_more(server):
    sid = await server._rooms.pre_connect("eio-1", "/")
    await server._rooms.enter_room(sid, "/", "1")
    await server._rooms.leave_room(sid, "/", "1")
    assert server._rooms.get_rooms(sid, "/") == []


@pytest.mark.parametrize(
    "message",
    [b"", b"nonsense", b"\xff\xfe", b"[]", b"7", b'"method"', b'{"method": 7}', b'{"method": "emit"}', b"echo:unknown"],
    ids=repr,
)
def test_a_foreign_message_does_no_harm(io_loop, server, redis_client, monkeypatch, caplog, message):
    monkeypatch.setattr(rooms_module, "RESUBSCRIBE_INTERVAL", 0.01)

    async def story():
        await server._rooms.ping()
        assert redis_client.publish("lesson_node_rooms", message) == 1
        await until_echoed(server)
        async with client(server, client="participant", lesson_id="1") as sio:
            assert await join(sio) == SUCCESS
        assert "Unexpected" not in caplog.text  # as the library logs what ends the subscription

    io_loop.run_sync(story)


async def until_echoed(server):
    """An echo that is sent between two subscriptions is lost; the next one is not."""
    async with asyncio.timeout(10):
        while True:
            try:
                async with asyncio.timeout(0.2):
                    return await server._rooms.ping()
            except TimeoutError:
                pass


@pytest.mark.gen_test
async def test_without_redis_the_clients_of_this_node_are_served(server, monkeypatch):
    async def outage(text):
        raise StoreUnavailable("Redis", "outage")

    async with client(server, client="participant", lesson_id="1") as sio:
        (received,) = news_of(sio)
        await join(sio)
        monkeypatch.setattr(server._rooms, "_send", outage)
        await server._protocol.sio.emit("news", {}, room="1")
        await until(lambda: received)
