"""subscription.py: a subscription that receives nothing is replaced, and readiness tells."""

import asyncio

import pytest
from fakes import settle
from redis.exceptions import ConnectionError as RedisConnectionError
from subscriptions import until_echoed
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import subscription as subscription_module


@pytest.mark.gen_test
async def test_a_ping_proves_that_the_node_receives_messages(server, redis_client):
    async with asyncio.timeout(5):
        await server._subscription.ping()
    server._subscription._task.cancel()  # deaf, though Redis answers
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


async def lose_subscription(server, redis_client, monkeypatch):
    """redis-py connects again by itself; then the node finds that it has heard nothing for too long.

    Returns:
        the subscriptions from now on.
    """
    await server._subscription.ping()
    subscriptions = []
    server._subscription.on_subscribed = lambda: subscriptions.append("one")
    monkeypatch.setattr(subscription_module, "SUBSCRIPTION_TIMEOUT", -1.0)
    assert redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
    return subscriptions


@pytest.mark.gen_test
async def test_a_redis_that_is_away_is_no_error_of_the_subscription(server, redis_client, monkeypatch, caplog):
    """The library would log a traceback, and try again at once and without end."""
    errors = [RedisConnectionError("refused"), StoreUnavailable("Redis", "away")]
    pubsub = server._subscription._store.client.pubsub

    def away():
        if errors:
            raise errors.pop()
        monkeypatch.setattr(subscription_module, "SUBSCRIPTION_TIMEOUT", 12.0)
        return pubsub()

    monkeypatch.setattr(server._subscription._store.client, "pubsub", away)
    monkeypatch.setattr(subscription_module, "RESUBSCRIBE_INTERVAL", 0.01)
    await lose_subscription(server, redis_client, monkeypatch)
    await until(lambda: not errors)
    await until_echoed(server)
    assert "Unexpected" not in caplog.text


@pytest.mark.gen_test
async def test_a_lost_subscription_is_made_again_after_a_pause_and_counts_as_none_till_then(
    server, redis_client, monkeypatch
):
    monkeypatch.setattr(subscription_module, "RESUBSCRIBE_INTERVAL", 60.0)
    subscriptions = await lose_subscription(server, redis_client, monkeypatch)
    pubsub, tries = server._subscription._store.client.pubsub, []
    monkeypatch.setattr(server._subscription._store.client, "pubsub", lambda: tries.append("one") or pubsub())
    await until(lambda: subscriptions and not server._subscription._subscribed.is_set())
    for _ in range(50):  # longer than a subscription takes
        await server._subscription._store.ping()
    assert len(subscriptions) == 1  # that of redis-py
    assert not tries


@pytest.mark.gen_test
async def test_a_silent_subscription_proves_itself_by_echoes_and_stays(server, redis_client, monkeypatch):
    """The server is made before the times are short: its subscription is renewed once."""
    monkeypatch.setattr(subscription_module, "RESUBSCRIBE_INTERVAL", 0.01)
    monkeypatch.setattr(subscription_module, "ECHO_INTERVAL", 0.05)
    monkeypatch.setattr(subscription_module, "SUBSCRIPTION_TIMEOUT", 5.0)
    subscriptions = []
    await server._subscription.ping()
    server._subscription.on_subscribed = lambda: subscriptions.append("renewed")
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await until(lambda: subscriptions)
    with redis_client.pubsub(ignore_subscribe_messages=True) as onlooker:
        onlooker.subscribe(server._subscription._echo_channel)
        echoes = []
        await until(lambda: echoes.append(onlooker.get_message()) or sum(map(bool, echoes)) == 3)
    assert subscriptions == ["renewed"]


@pytest.mark.gen_test
async def test_a_subscription_that_hears_nothing_is_replaced(server, redis_client, monkeypatch):
    """As when a firewall has forgotten the connection: both ends believe in it."""
    monkeypatch.setattr(subscription_module, "RESUBSCRIBE_INTERVAL", 0.01)
    monkeypatch.setattr(subscription_module, "ECHO_INTERVAL", 0.01)
    monkeypatch.setattr(subscription_module, "SUBSCRIPTION_TIMEOUT", 0.05)
    await server._subscription.ping()
    before = redis_client.client_list(_type="pubsub")
    with monkeypatch.context() as patch:
        patch.setattr(server._subscription, "_echo", lambda text: asyncio.sleep(0))  # nothing arrives
        await until(lambda: {c["id"] for c in redis_client.client_list(_type="pubsub")} - {c["id"] for c in before})
    async with asyncio.timeout(5):
        await server._subscription.ping()


@pytest.mark.gen_test
async def test_a_handler_that_raises_is_logged_and_later_messages_are_handled(server, redis_client, caplog):
    received = []

    async def handle(text):
        if text == "defect":
            raise RuntimeError("a defect")
        received.append(text)

    await server._subscription.close()
    server._subscription.on("lesson_node_news", handle)
    server._subscription.start()
    await until_echoed(server)
    for text in ("defect", "news"):
        assert redis_client.publish("lesson_node_news", text) == 1
    await until(lambda: received)
    assert received == ["news"]
    assert "a message on lesson_node_news could not be handled" in caplog.text
