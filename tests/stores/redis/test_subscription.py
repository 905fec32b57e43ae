"""subscription.py: the subscription of a node proves that it receives, and readiness tells."""

import asyncio
from functools import partial

import pytest
from fakes import settle
from subscriptions import until_echoed
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server.stores.redis import subscription as subscription_module
from lesson_server.stores.redis.receiver import Receiver
from lesson_server.stores.redis.subscription import CONFIRMATION_TIMEOUT


@pytest.mark.gen_test
async def test_a_ping_proves_that_the_node_receives_messages(server):
    async with asyncio.timeout(5):
        await server._subscription.ping()
    for receiver in server._subscription._receivers.values():
        await receiver.close()  # deaf, though Redis answers
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await server._subscription.ping()
    answer = await AsyncHTTPClient().fetch(server.url + "/readyz", raise_error=False)
    assert (answer.code, answer.body) == (503, b"rooms down\n")
    assert server._subscription._echoes == {}


@pytest.mark.gen_test
async def test_a_ping_is_sent_when_there_is_a_subscription(server, monkeypatch):
    sent = []

    async def echo(text):
        sent.append(text)

    await server._sampler.close()  # it sends pings, too
    await server._subscription.close()
    server._subscription._subscribed.clear()
    monkeypatch.setattr(server._subscription, "_echo", echo)
    ping = asyncio.create_task(server._subscription.ping())
    await settle()
    assert sent == []
    server._subscription._subscribed.set()
    await settle()
    assert len(sent) == 1
    await server._subscription._receive_echo(sent[0])
    await server._subscription._receive_echo(sent[0])  # once more does no harm
    await ping


@pytest.mark.gen_test
async def test_a_lost_subscription_counts_as_none_until_it_is_renewed_and_the_node_is_told(server, redis_client):
    subscriptions = []
    await server._subscription.ping()
    server._subscription.on_subscribed = lambda: subscriptions.append(server._subscription._subscribed.is_set())
    lost = []
    clear = server._subscription._subscribed.clear
    server._subscription._subscribed.clear = lambda: lost.append("lost") or clear()
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await until(lambda: subscriptions)
    assert (lost, subscriptions) == (["lost"], [True])


@pytest.mark.gen_test
async def test_a_lost_subscription_is_renewed_by_one_new_connection(server, redis_client):
    """Of another connection, which redis-py would make and close, nobody would get what Redis publishes to it."""

    def subscriptions():
        return redis_client.info("commandstats")["cmdstat_subscribe"]["calls"]

    await server._subscription.ping()
    before = subscriptions()
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await until_echoed(server)
    assert subscriptions() == before + 3  # the channels of the rooms, of the messages, and of the echoes


@pytest.mark.gen_test
async def test_a_handler_that_raises_is_logged_and_later_messages_are_handled(server, redis_client, caplog):
    received = []

    async def handle(text):
        if text == "defect":
            raise RuntimeError("a defect")
        received.append(text)

    server._subscription.on("lesson_node_news", handle)
    await until(lambda: redis_client.publish("lesson_node_news", "defect") == 1)
    await until_echoed(server)
    assert redis_client.publish("lesson_node_news", "news") == 1
    await until(lambda: received)
    assert received == ["news"]
    assert "a message on lesson_node_news could not be handled" in caplog.text


@pytest.mark.gen_test
async def test_a_channel_that_is_left_is_not_heard_any_more_and_may_be_entered_again(server, redis_client):
    received = []

    async def handle(text):
        received.append(text)

    def publish(text, listeners):
        return redis_client.execute_command("SPUBLISH", "news", text) == listeners

    for turn in ("1", "2", "3"):
        server._subscription.on("news", handle, sharded=True)
        await until(partial(publish, turn, 1))
        await until(partial(received.__contains__, turn))
        server._subscription.off("news")
        await until(partial(publish, "not heard", 0))
    assert received == ["1", "2", "3"]
    assert len(redis_client.client_list(_type="pubsub")) == 1  # the same connection as for everything else


@pytest.mark.gen_test
async def test_a_message_after_the_end_of_a_subscription_is_ignored(server, caplog):
    await server._subscription._handle("lesson_node_room:{lesson_seat_1}", "late")
    assert not caplog.records


@pytest.mark.gen_test
async def test_what_is_published_on_a_sharded_channel_arrives(server):
    received = []

    async def handle(text):
        received.append(text)

    server._subscription.on("news", handle, sharded=True)
    await until_echoed(server)
    await server._subscription.publish("news", "sharded", sharded=True)
    await until(lambda: received == ["sharded"])


@pytest.mark.gen_test
async def test_a_confirmed_channel_misses_no_message_however_often_it_was_left_before(
    server, redis_client, monkeypatch
):
    monkeypatch.setattr(subscription_module, "CONFIRMATION_TIMEOUT", 60)
    received = []

    async def handle(text):
        received.append(text)

    for turn in range(50):
        server._subscription.on("news", handle, sharded=True)
        if turn % 3:
            await asyncio.sleep(0)  # in some turns, the request has been sent before the channel is left
            server._subscription.off("news")
            await asyncio.sleep(0)
            server._subscription.on("news", handle, sharded=True)
        await server._subscription.confirmed("news")
        assert redis_client.execute_command("SPUBLISH", "news", str(turn)) == 1
        await until(partial(received.__contains__, str(turn)))
        server._subscription.off("news")
    assert received == [str(turn) for turn in range(50)]


@pytest.mark.gen_test
async def test_a_redis_that_hangs_or_is_away_does_not_hold_up_who_waits_for_a_confirmation(server, monkeypatch):
    async def request(receiver):
        await asyncio.sleep(60)

    async def handle(text):
        pass

    clock = asyncio.get_running_loop().time
    await server._subscription.ping()
    monkeypatch.setattr(Receiver, "_request", request)
    server._subscription.on("hanging", handle, sharded=True)
    start = clock()
    await server._subscription.confirmed("hanging")
    assert clock() - start >= CONFIRMATION_TIMEOUT * 0.9
    (receiver,) = server._subscription._receivers.values()
    receiver.is_lost = True
    server._subscription.on("lost", handle, sharded=True)
    assert server._subscription._unconfirmed == {}
    await server._subscription.confirmed("lost")
