"""Seats, while a client, a node, Redis or a subscription fails."""

import asyncio
import contextlib
import signal
import time

import pytest
from clients import SUCCESS, UNAVAILABLE, client, join
from cluster import Valkey
from everyone import RECOVERED, serving
from waiting import until

from lesson_server.stores.redis import receiver

pytestmark = pytest.mark.usefixtures("quick_nodes")

# Seconds of the grace in these tests: longer than any of them waits for something else.
GRACE = 1.0


def seat(number):
    return {"status": "SUCCESS", "data": {"seat": number}}


@contextlib.asynccontextmanager
async def joined(node, mint, name=None):
    """A client that has joined, and the changes that it has been told of; a guest without a name."""
    auth = {} if name is None else {"access_token": mint(name)}
    async with client(node, client="participant", lesson_id="1", **auth) as sio:
        sio.told = []
        sio.on("seat_changed", lambda change: sio.told.append((change["seat"], change["client_id"])))
        assert await join(sio) == SUCCESS
        yield sio


def taken(redis_client):
    return {int(number): who for number, who in redis_client.hgetall("lesson_seat_1").items() if who}


def subscribed_nodes(redis_client):
    return redis_client.execute_command("PUBSUB", "SHARDNUMSUB", "lesson_node_room:{lesson_seat_1}")[1]


@pytest.mark.gen_test(timeout=60)
async def test_a_seat_outlives_its_killed_node_by_the_grace_and_is_then_freed_by_another(
    start_node, environ, redis_client, mint
):
    dying, other = (start_node(environ, LESSON_SEATS_GRACE=str(GRACE)) for _ in range(2))
    async with joined(other, mint) as guest, joined(dying, mint, "anna") as anna:
        assert await anna.call("take_seat", {"seat": 5}) == seat(5)
        dying.send(signal.SIGKILL)
        await until(lambda: not redis_client.exists("lesson_student_1"))
        swept = time.monotonic()
        assert taken(redis_client) == {5: "anna"}
        await until(lambda: taken(redis_client) == {})
        assert time.monotonic() - swept > GRACE / 2
        await until(lambda: guest.told[-1:] == [(5, None)])


@pytest.mark.gen_test(timeout=60)
async def test_who_comes_back_to_another_node_in_the_grace_keeps_the_seat(start_node, environ, redis_client, mint):
    dying, other = (start_node(environ, LESSON_SEATS_GRACE=str(GRACE)) for _ in range(2))
    async with joined(dying, mint, "anna") as anna:
        assert await anna.call("take_seat", {"seat": 5}) == seat(5)
        dying.send(signal.SIGKILL)
    async with joined(other, mint, "anna") as anna:
        await until(lambda: not redis_client.exists("lesson_node_seat_deadlines"))
        assert await anna.call("take_seat") == seat(5)
        assert anna.told == []


@pytest.mark.gen_test(timeout=60)
async def test_a_node_that_starts_later_frees_the_seats_of_the_last_one(start_node, environ, redis_client, mint):
    last = start_node(environ, LESSON_SEATS_GRACE="0.1")
    async with joined(last, mint, "anna") as anna:
        assert await anna.call("take_seat", {"seat": 5}) == seat(5)
        last.send(signal.SIGKILL)
        last.wait()
        await asyncio.sleep(0.2)
        assert taken(redis_client) == {5: "anna"}
        async with serving(environ, LESSON_SEATS_GRACE="0.1"):
            await until(lambda: taken(redis_client) == {})


def test_after_a_restart_of_an_empty_redis_the_seats_are_those_of_the_live_connections(
    io_loop, start_server, tmp_path, mint
):
    valkey = Valkey(tmp_path, keeps_data=False)
    server = start_server(LESSON_REDIS_URL=valkey.url)

    async def story():
        async with joined(server, mint, "anna") as anna, joined(server, mint) as guest:
            async with joined(server, mint, "ben") as ben:
                assert await anna.call("take_seat", {"seat": 5}) == seat(5)
                assert await ben.call("take_seat", {"seat": 6}) == seat(6)
            await until(lambda: guest.told == [(5, "anna"), (6, "ben")])
            valkey.kill()
            assert await anna.call("take_seat", {"seat": 7}) == UNAVAILABLE
            valkey.start()
            await until(lambda: taken(valkey.client) == {5: "anna"}, RECOVERED)
            assert valkey.client.hlen("lesson_seat_1") == 30
            await until(lambda: succeeds(anna, 7), RECOVERED)

    try:
        io_loop.run_sync(story, 30)
    finally:
        valkey.close()


@pytest.mark.gen_test
async def test_a_seat_that_was_left_is_not_written_again_after_flushall(server, redis_client, mint):
    async with joined(server, mint, "anna") as anna, joined(server, mint, "ben") as ben:
        assert await anna.call("take_seat", {"seat": 5}) == seat(5)
        assert await ben.call("take_seat", {"seat": 6}) == seat(6)
        assert await anna.call("leave_seat") == SUCCESS
        redis_client.flushall()
        await until(lambda: redis_client.hlen("lesson_student_1") == 2 and taken(redis_client))
        await asyncio.sleep(0.1)  # a seat is restored just after the presence
        assert taken(redis_client) == {6: "ben"}


async def succeeds(sio, number):
    return await sio.call("take_seat", {"seat": number}) == seat(number)


@pytest.mark.parametrize("fault", ["down", "hung"])
@pytest.mark.gen_test(timeout=30)
async def test_while_redis_does_not_answer_a_seat_is_refused_in_time_and_a_retry_helps(
    fragile, redis_proxy, redis_client, mint, fault
):
    async with serving(fragile, LESSON_REDIS_TIMEOUT="0.5") as server, joined(server, mint, "anna") as anna:
        assert await anna.call("take_seat", {"seat": 5}) == seat(5)
        {"down": redis_proxy.refuse, "hung": redis_proxy.hang}[fault]()
        async with asyncio.timeout(5):  # the contract
            assert await anna.call("take_seat", {"seat": 6}) == UNAVAILABLE
            assert await anna.call("leave_seat") == UNAVAILABLE
        redis_proxy.restore()
        await until(lambda: succeeds(anna, 6), RECOVERED)
        assert taken(redis_client) == {6: "anna"}  # whatever Redis has carried out of it, one person has one seat


@pytest.mark.gen_test(timeout=30)
async def test_a_change_while_the_subscription_is_lost_is_missed_and_the_next_ones_are_not(
    fragile, environ, redis_proxy, redis_client, mint, monkeypatch
):
    """The server does not notice that its subscription receives nothing, until the answers to its pings are missing."""
    monkeypatch.setattr(receiver, "PING_INTERVAL", 0.2)
    monkeypatch.setattr(receiver, "RECEIVE_TIMEOUT", 0.5)
    async with (
        serving(environ) as other,
        joined(other, mint, "anna") as anna,
        serving(fragile) as deaf,
        joined(deaf, mint) as guest,
    ):
        await until(lambda: subscribed_nodes(redis_client) == 2)
        assert await anna.call("take_seat", {"seat": 5}) == seat(5)
        await until(lambda: guest.told == [(5, "anna")])
        redis_proxy.deafen()
        assert await anna.call("take_seat", {"seat": 6}) == seat(6)
        await until(lambda: anna.told[1:] == [(5, None), (6, "anna")])
        number = 6
        while guest.told == [(5, "anna")]:  # until the node has subscribed again
            number = 13 - number
            assert await anna.call("take_seat", {"seat": number}) == seat(number)
            await asyncio.sleep(0.05)
        missed = len(anna.told) - len(guest.told)
        assert missed >= 2
        assert guest.connected
        await until(lambda: guest.told[1:] == anna.told[-len(guest.told) + 1 :])
