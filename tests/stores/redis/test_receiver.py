"""receiver.py against a real Valkey, with and without sharded pub/sub."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeys import Valkeys
from waiting import until

from lesson_server.stores.redis import receiver as receiver_module
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.receiver import Receiver
from lesson_server.stores.redis.subscription import Subscription


@pytest.fixture
def times(monkeypatch):
    """Short times between two attempts."""
    monkeypatch.setattr(receiver_module, "RECONNECT_INTERVAL", 0.01)
    monkeypatch.setattr(receiver_module, "PING_INTERVAL", 0.02)


@pytest.fixture
def hearing(io_loop, stores):
    """A receiver and what it has told: messages, confirmed subscriptions and losses."""
    told = SimpleNamespace(messages=[], subscribed=[], losses=[], moved=[])

    def connect():
        return aioredis.Redis.from_url(stores.redis_url, decode_responses=True, retry=Retry(NoBackoff(), 0))

    async def hear(channel, text):
        told.messages.append((channel, text))

    async def lose(receiver):
        told.losses.append(receiver)

    async def start():
        told.receiver = Receiver("Redis", lambda: told.connect(), hear, told.subscribed.append, lose, told.moved.extend)

    told.connect = connect
    io_loop.run_sync(start)
    yield told
    io_loop.run_sync(told.receiver.close)


def pubsub_clients(redis_client):
    return {each["id"] for each in redis_client.client_list(_type="pubsub")}


@pytest.mark.gen_test
async def test_without_channels_there_is_no_connection(hearing, redis_client):
    await asyncio.sleep(0.05)
    assert pubsub_clients(redis_client) == set()
    hearing.receiver.add("news", sharded=False)
    await until(lambda: hearing.subscribed == ["news"])
    assert redis_client.publish("news", "one") == 1
    await until(lambda: hearing.messages == [("news", "one")])
    assert len(pubsub_clients(redis_client)) == 1


@pytest.mark.gen_test
async def test_a_killed_connection_is_replaced_at_once_and_has_all_channels(hearing, redis_client):
    for channel, sharded in (("news", False), ("room 1", True), ("room 2", True)):
        hearing.receiver.add(channel, sharded=sharded)
    await until(lambda: len(hearing.subscribed) == 3)
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await until(lambda: len(hearing.subscribed) == 6)  # within RECONNECT_INTERVAL, else the default of `until` is short
    assert hearing.losses == [hearing.receiver]
    assert redis_client.publish("news", "one") == 1
    assert redis_client.execute_command("SPUBLISH", "room 2", "two") == 1
    await until(lambda: sorted(hearing.messages) == [("news", "one"), ("room 2", "two")])


@pytest.mark.gen_test
async def test_a_redis_that_is_away_is_no_error_and_is_tried_again_after_a_pause(hearing, times, caplog):
    errors = [RedisConnectionError("refused")] * 3
    connect = hearing.connect

    def away():
        if errors:
            raise errors.pop()
        return connect()

    hearing.connect = away
    hearing.receiver.add("news", sharded=False)
    await until(lambda: hearing.subscribed)
    assert len(hearing.losses) == 3
    assert not caplog.records


@pytest.mark.gen_test
async def test_after_a_failed_attempt_there_is_a_pause(hearing):
    tries = []

    def away():
        tries.append("one")
        raise RedisConnectionError("refused")

    hearing.connect = away
    hearing.receiver.add("news", sharded=False)
    await until(lambda: hearing.losses)
    await asyncio.sleep(0.05)  # less than RECONNECT_INTERVAL
    assert len(tries) == 1


@pytest.mark.gen_test
async def test_a_silent_connection_proves_itself_by_pings_and_stays(hearing, times, redis_client):
    hearing.receiver.add("news", sharded=False)
    await until(lambda: hearing.subscribed)
    before = redis_client.info("commandstats").get("cmdstat_ping", {}).get("calls", 0)
    await until(lambda: redis_client.info("commandstats").get("cmdstat_ping", {}).get("calls", 0) >= before + 3)
    assert hearing.losses == []


@pytest.mark.gen_test
async def test_a_connection_that_hears_nothing_is_replaced(hearing, times, redis_client, monkeypatch):
    """As when a firewall has forgotten the connection: both ends believe in it."""
    hearing.receiver.add("news", sharded=False)
    await until(lambda: hearing.subscribed)
    (before,) = pubsub_clients(redis_client)
    monkeypatch.setattr(receiver_module, "RECEIVE_TIMEOUT", 0.05)
    pings = []
    hearing.receiver._pubsub.ping = lambda: pings.append("lost") or asyncio.sleep(0)
    await until(lambda: len(hearing.subscribed) == 2)
    assert pings
    assert before not in pubsub_clients(redis_client)


@pytest.mark.gen_test
async def test_a_defect_is_logged_and_the_messages_go_on(hearing, times, redis_client, caplog):
    hearing.receiver.add("news", sharded=False)
    await until(lambda: hearing.subscribed)
    hear, hearing.receiver._on_message = hearing.receiver._on_message, None
    redis_client.publish("news", "one")
    await until(lambda: len(hearing.subscribed) == 2)
    assert "a subscription to Redis failed" in caplog.text
    hearing.receiver._on_message = hear
    redis_client.publish("news", "two")
    await until(lambda: hearing.messages == [("news", "two")])


@pytest.mark.gen_test
async def test_channels_that_come_and_go_while_requests_are_sent_end_as_they_should(hearing, redis_client):
    for turn in range(20):
        for channel in ("room 1", "room 2", "room 3"):
            hearing.receiver.add(channel, sharded=True)
        await asyncio.sleep(0)
        hearing.receiver.remove("room 1")
        await asyncio.sleep(0)
        if turn % 2:
            hearing.receiver.add("room 1", sharded=True)
            hearing.receiver.remove("room 3")
    hearing.receiver.add("news", sharded=False)
    await until(lambda: "news" in hearing.subscribed)
    await until(
        lambda: redis_client.execute_command("PUBSUB", "SHARDNUMSUB", "room 1", "room 2", "room 3")[1::2] == [1, 1, 0]
    )
    assert hearing.losses == []


@pytest.mark.gen_test
async def test_a_busy_event_loop_delays_a_hundred_channels_no_more_than_one(hearing, stores):
    """In a class start the joins of a lesson wait for its channel, and a turn of the event loop takes milliseconds."""
    hearing.connect = lambda: aioredis.Redis.from_url(stores.redis_url, decode_responses=True, socket_timeout=5)
    hearing.receiver.add("news", sharded=True)
    await until(lambda: hearing.subscribed == ["news"])
    for number in range(100):
        hearing.receiver.add(f"room {number}", sharded=True)
    turns = 0
    while len(hearing.subscribed) <= 100:
        time.sleep(0.002)
        await asyncio.sleep(0)
        turns += 1
    assert turns < 100  # a dozen; if each channel waited for the one before it, they would be more than 200


@pytest.fixture
def old_redis(tmp_path):
    """As a Redis before 7: without sharded pub/sub."""
    valkeys = Valkeys(tmp_path)
    yield valkeys.start('rename-command SPUBLISH ""', 'rename-command SSUBSCRIBE ""')
    valkeys.kill_all()


def test_a_redis_without_sharded_pubsub_serves_all_channels_alike(io_loop, old_redis):
    received = []

    async def hear(text):
        received.append(text)

    async def story():
        store = RedisStore(f"redis://127.0.0.1:{old_redis}", "", 2.0, 2)
        subscription = Subscription(store)
        subscription.on("news", hear)
        subscription.on("room 1", hear, sharded=True)
        subscription.start()
        await subscription.ping()

        async def published():
            await subscription.publish("room 1", "to the room", sharded=True)
            return received

        await until(published)
        assert set(received) == {"to the room"}
        subscription.off("room 1")
        await subscription.publish("news", "to all")
        await until(lambda: received[-1] == "to all")
        await subscription.close()
        await store.close()

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_a_connection_that_is_closed_in_the_middle_of_a_request_is_no_defect(hearing, redis_client, caplog):
    """redis-py has no writer any more then."""
    hearing.receiver.add("news", sharded=False)
    await until(lambda: hearing.subscribed)
    failed = []

    async def fail(channel):
        failed.append(channel)
        raise AttributeError("'NoneType' object has no attribute 'writelines'")

    hearing.receiver._pubsub.ssubscribe = fail
    hearing.receiver.add("room", sharded=True)
    await until(lambda: failed)
    redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await until(lambda: hearing.subscribed == ["news", "news", "room"])
    assert not caplog.records
