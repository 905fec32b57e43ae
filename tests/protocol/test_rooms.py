"""rooms.py: two nodes on one Redis."""

import asyncio
from functools import partial

import pytest
import socketio
from clients import SUCCESS, client, join
from subscriptions import until_echoed
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import receiver as receiver_module
from lesson_server.stores.redis.receiver import Receiver

ROOM = "lesson_node_room:{lesson_seat_1}"


@pytest.fixture
def nodes(start_server, monkeypatch):
    monkeypatch.setattr(receiver_module, "RECONNECT_INTERVAL", 0.02)
    return start_server(), start_server()


@pytest.fixture
def elsewhere(start_server):
    """A node that has nobody in lesson 1."""
    return start_server()


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
        await asyncio.gather(here._subscription.ping(), there._subscription.ping())
        await here._protocol.sio.emit("news", {"from": "here"}, room="1")
        await there._protocol.sio.emit("news", {"from": "there"}, room="1")
        await until(lambda: all(len(box) == 2 for box in received[:2]))
        assert received[2] == []
        for box in received[:2]:
            assert sorted(news["from"] for news in box) == ["here", "there"]


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
            await asyncio.gather(here._subscription.ping(), there._subscription.ping())
            assert redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 2
            await until(lambda: redis_client.pubsub_numsub("lesson_node_rooms") == [("lesson_node_rooms", 2)])
            await here._protocol.sio.emit("news", {}, room="1")
            await until(partial(received.__eq__, expected))


@pytest.mark.gen_test
async def test_a_join_is_answered_when_the_node_hears_the_lesson(server, mint, monkeypatch):
    """The first to join a lesson on a node sees every change from then on, the own seat too."""
    change = Receiver._change
    slowed = []

    async def change_slowly(receiver, channel):
        if channel == ROOM:
            slowed.append(channel)
            await asyncio.sleep(0.1)
        await change(receiver, channel)

    await server._subscription.ping()
    monkeypatch.setattr(Receiver, "_change", change_slowly)
    async with client(server, client="participant", lesson_id="1", access_token=mint("p1")) as sio:
        received = []
        sio.on("seat_changed", received.append)
        assert await join(sio) == SUCCESS
        assert slowed
        assert await sio.call("take_seat") == {"status": "SUCCESS", "data": {"seat": 1}}
        await until(lambda: received == [{"seat": 1, "client_id": "p1"}])


def hearers(redis_client, lesson_id):
    """How many nodes are subscribed to the channel of a lesson."""
    channel = f"lesson_node_room:{{lesson_seat_{lesson_id}}}"
    return redis_client.execute_command("PUBSUB", "SHARDNUMSUB", channel)[1]


@pytest.mark.gen_test
async def test_a_node_hears_a_lesson_while_it_has_somebody_there(nodes, redis_client):
    here, there = nodes
    assert hearers(redis_client, "1") == 0
    async with client(here, client="participant", lesson_id="1") as first:
        assert await join(first) == SUCCESS
        await until(lambda: hearers(redis_client, "1") == 1)
        async with (
            client(there, client="participant", lesson_id="1") as second,
            client(there, client="participant", lesson_id="1") as third,
        ):
            assert await join(second) == await join(third) == SUCCESS
            await until(lambda: hearers(redis_client, "1") == 2)
            await third.disconnect()
            await until(lambda: there._rooms.get_rooms(third.get_sid(), "/") == [])
            assert hearers(redis_client, "1") == 2
        await until(lambda: hearers(redis_client, "1") == 1)
    await until(lambda: hearers(redis_client, "1") == 0)


@pytest.mark.gen_test
async def test_an_emit_to_a_lesson_is_read_by_the_nodes_that_have_somebody_there_only(nodes, elsewhere, redis_client):
    here, there = nodes
    read = {node: [] for node in (here, there, elsewhere)}
    for node, box in read.items():
        receive = node._rooms._receive

        async def note(text, box=box, receive=receive):
            box.append(text)
            await receive(text)

        node._rooms._receive = note
    async with (
        client(here, client="participant", lesson_id="1") as first,
        client(there, client="participant", lesson_id="1") as second,
        client(elsewhere, client="participant", lesson_id="2") as outside,
    ):
        received = news_of(first, second, outside)
        for sio in (first, second):
            assert await join(sio) == SUCCESS
        await until(lambda: hearers(redis_client, "1") == 2)
        await here._protocol.sio.emit("news", {}, room="1")
        await until(lambda: len(read[there]) == len(read[here]) == 1)
        await elsewhere._subscription.ping()
        assert [len(box) for box in read.values()] == [1, 1, 0]
        await until(lambda: received == [[{}], [{}], []])


@pytest.mark.gen_test
async def test_another_program_emits_with_the_librarys_own_manager(nodes, stores):
    here, there = nodes
    async with (
        client(here, client="participant", lesson_id="1") as first,
        client(there, client="participant", lesson_id="1") as second,
    ):
        received = news_of(first, second)
        assert await join(first) == await join(second) == SUCCESS
        await asyncio.gather(here._subscription.ping(), there._subscription.ping())
        program = socketio.AsyncRedisManager(stores.redis_url, channel="lesson_node_rooms", write_only=True)
        await program.emit("news", {"from": "a program"}, room="1")
        await until(lambda: received == [[{"from": "a program"}], [{"from": "a program"}]])
        await program.redis.aclose()


@pytest.mark.gen_test
async def test_rooms_are_entered_and_left_on_this_node_only(server, redis_client):
    """The library would ask the other nodes for a sid that it does not know any more."""
    with redis_client.pubsub() as onlooker:
        onlooker.subscribe("lesson_node_rooms")
        assert onlooker.get_message(timeout=5)["type"] == "subscribe"
        await server._rooms.leave_room("nobody", "/", "1")
        with pytest.raises(ValueError, match="sid is not connected"):
            await server._rooms.enter_room("nobody", "/", "1")
        await server._subscription.ping()
        assert onlooker.get_message(timeout=0.1) is None


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
    monkeypatch.setattr(receiver_module, "RECONNECT_INTERVAL", 0.01)

    async def story():
        await server._subscription.ping()
        assert redis_client.publish("lesson_node_rooms", message) == 1
        await until_echoed(server)
        async with client(server, client="participant", lesson_id="1") as sio:
            assert await join(sio) == SUCCESS
        assert "Unexpected" not in caplog.text  # as the library logs what ends the subscription

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_without_redis_the_clients_of_this_node_are_served(server, monkeypatch):
    async def outage(channel, text, *, sharded):
        raise StoreUnavailable("Redis", "outage")

    async with client(server, client="participant", lesson_id="1") as sio:
        (received,) = news_of(sio)
        await join(sio)
        monkeypatch.setattr(server._subscription, "publish", outage)
        await server._protocol.sio.emit("news", {}, room="1")
        await until(lambda: received)
