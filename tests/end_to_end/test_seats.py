"""Seats, as clients on two nodes see them."""

import contextlib
from functools import partial

import pytest
from clients import SUCCESS, client, error, join
from roster_api import TOKEN, ask
from waiting import until


def seat(number):
    return {"status": "SUCCESS", "data": {"seat": number}}


def changed(number, client_id):
    return {"seat": number, "client_id": client_id}


@contextlib.asynccontextmanager
async def joined(node, token=None, kind="participant", lesson_id="1"):
    """A client that has joined, with what it is told of seats from then on."""
    auth = {"client": kind, "lesson_id": lesson_id} | ({"access_token": token} if token else {})
    async with client(node, **auth) as sio:
        sio.told = []
        sio.on("seat_changed", sio.told.append)
        assert await join(sio) == SUCCESS
        yield sio


def taken(redis_client):
    return {int(seat): who for seat, who in redis_client.hgetall("lesson_seat_1").items() if who}


def hears(redis_client):
    return redis_client.execute_command("PUBSUB", "SHARDNUMSUB", "lesson_node_room:{lesson_seat_1}")[1]


def is_swept(redis_client):
    """Whether the deadlines of all seats have passed, and a node has looked."""
    return not redis_client.exists("lesson_node_seat_deadlines")


@pytest.fixture
def nodes(start_server):
    return [start_server(LESSON_SEATS_GRACE="0.5", LESSON_ADMIN_TOKEN=TOKEN) for _ in range(2)]


@pytest.mark.gen_test
async def test_everybody_in_the_lesson_is_told_of_each_change_once_and_in_order(nodes, redis_client, sql, mint):
    here, there = nodes
    sql.execute("INSERT INTO lessons (id) VALUES ('2')")
    async with (
        joined(here, mint("anna")) as anna,
        joined(there, mint("ben")) as ben,
        joined(here) as guest,
        joined(there, mint("hill", "teacher"), "teacher") as teacher,
        joined(there, mint("cem"), lesson_id="2") as outside,
    ):
        await until(lambda: hears(redis_client) == 2)
        assert await anna.call("take_seat") == seat(1)
        assert await ben.call("take_seat", {"seat": 1}) == error("seat 1 is taken")
        assert await ben.call("take_seat", {"seat": 31}) == error("seat 31 does not exist")
        assert await ben.call("take_seat", {"seat": 5}) == seat(5)
        assert await anna.call("take_seat", {"seat": 2}) == seat(2)
        assert await ben.call("leave_seat") == SUCCESS
        assert await guest.call("take_seat") == error("access token is required")
        assert await teacher.call("take_seat") == error("only a participant takes a seat")
        expected = [changed(1, "anna"), changed(5, "ben"), changed(1, None), changed(2, "anna"), changed(5, None)]
        for sio in (anna, ben, guest, teacher):
            await until(partial(sio.told.__eq__, expected))
        assert outside.told == []
        assert taken(redis_client) == {2: "anna"}


@pytest.mark.gen_test
async def test_a_reconnect_on_another_node_finds_the_seat_and_who_stays_away_loses_it(nodes, redis_client, mint):
    here, there = nodes
    async with joined(there) as guest:
        async with joined(here, mint("anna")) as anna:
            assert await anna.call("take_seat", {"seat": 7}) == seat(7)
        async with joined(there, mint("anna")) as anna:
            await until(lambda: is_swept(redis_client))
            assert await anna.call("take_seat") == seat(7)
        await until(lambda: taken(redis_client) == {})
        await until(lambda: guest.told[-1] == changed(7, None))
        assert [change for change in guest.told if change["client_id"] is None] == [changed(7, None)]


@pytest.mark.gen_test
async def test_of_two_tabs_the_seat_goes_with_the_last(nodes, redis_client, mint):
    here, there = nodes
    async with joined(here, mint("anna")) as first:
        assert await first.call("take_seat") == seat(1)
        async with joined(there, mint("anna")) as second:
            await first.disconnect()
            await until(lambda: is_swept(redis_client))
            assert await second.call("take_seat") == seat(1)
    await until(lambda: taken(redis_client) == {})


@pytest.mark.gen_test
async def test_after_redis_has_come_back_empty_the_seats_of_live_connections_are_written_again(
    nodes, redis_client, mint
):
    here, there = nodes
    async with joined(here, mint("anna")) as anna, joined(there, mint("ben")) as ben:
        assert await anna.call("take_seat", {"seat": 3}) == seat(3)
        assert await ben.call("take_seat", {"seat": 4}) == seat(4)
        await ben.disconnect()
        async with joined(here, mint("ben")):  # has not asked for its seat
            redis_client.flushall()
            await until(lambda: taken(redis_client) == {3: "anna", 4: "ben"})


@pytest.mark.gen_test
async def test_a_person_who_is_removed_loses_the_seat_at_once_and_everybody_is_told(nodes, redis_client, mint):
    here, there = nodes
    async with joined(here, mint("anna")) as anna, joined(there) as guest:
        assert await anna.call("take_seat") == seat(1)
        assert (await ask(there, "/api/lessons/1/participants/anna", "DELETE")).code == 204
        assert taken(redis_client) == {}
        await until(lambda: guest.told == [changed(1, "anna"), changed(1, None)])


@pytest.mark.gen_test
async def test_the_changes_and_the_refusals_are_counted(nodes, mint):
    here, _ = nodes
    async with joined(here, mint("anna")) as anna, joined(here, mint("ben")) as ben:
        await anna.call("take_seat")
        await anna.call("take_seat", {"seat": 2})
        await ben.call("take_seat", {"seat": 2})
        await anna.call("leave_seat")
        lines = here._metrics_text().decode().splitlines()
        for line in (
            'lesson_seats_changed_total{change="taken"} 2.0',
            'lesson_seats_changed_total{change="left"} 1.0',
            'lesson_events_total{client="participant",event="take_seat",outcome="seat_is_taken"} 1.0',
            'lesson_events_total{client="participant",event="leave_seat",outcome="success"} 1.0',
        ):
            assert line in lines
