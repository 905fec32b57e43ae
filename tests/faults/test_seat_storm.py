"""Two hundred people on two nodes attempt to take, change and leave thirty seats, all at once.

``scripts/bench/seat_history.py`` says what a right history is. ``scripts/bench/seats.py`` checks the same storm with
ten thousand attempts, which take too long here, where the coverage is measured.
"""

import contextlib
from urllib.parse import urlsplit

import pytest
from cluster import KEY
from seat_load import SeatLoad
from seat_maps import CHANNEL, DEADLINES, FREED, INDEX, MAP, taken

SEATS = 30
PEOPLE = 200
ATTEMPTS = 16  # of each person; two cycles of the storm
FEW, FEW_ATTEMPTS = 6, 80


@pytest.fixture
def ports(start_node, environ):
    nodes = [start_node(environ) for _ in range(2)]
    return [urlsplit(node.url).port for node in nodes]


@contextlib.contextmanager
def joined(load, clients):
    """All clients have joined; at the end, their connections are closed."""
    load.prepare(0, clients)
    assert load.connect(0, clients)["failed"] == 0
    try:
        yield load
    finally:
        load.drop()


def finish(load, redis_client):
    """Tells all clients that no change will follow. Redis keeps the order of the messages of a channel."""
    end = '{"method":"emit","event":"end","namespace":"/","room":"1","data":[]}'
    assert redis_client.execute_command("SPUBLISH", CHANNEL, end) == 2
    load.finish()


def assert_redis_agrees(redis_client, holders):
    """The map is that of the changes, and the server's own keys beside the map say the same."""
    assert redis_client.hlen(MAP) == SEATS
    assert taken(redis_client) == holders
    index = redis_client.hgetall(INDEX)
    mark = int(index.pop("").split()[0])
    assert {int(value.split()[0]): person for person, value in index.items() if not value.startswith("0 ")} == holders
    freed = redis_client.zrange(FREED, 0, -1)
    assert [int(seat) for seat in freed] == [seat for seat in range(1, mark + 1) if seat not in holders]
    listed = redis_client.zrange(DEADLINES, 0, -1)
    assert {f'["1","{person}"]' for person in holders.values()} <= set(listed)


def test_a_storm_of_attempts_on_two_nodes_is_one_order_of_right_answers(ports, redis_client):
    """Nobody sees two holders of a seat, or two seats of a person; each answer was true when it was given."""
    with joined(SeatLoad(ports, KEY, "1", SEATS), PEOPLE) as load:
        load.storm(ATTEMPTS)
        # With few attempts at once, few changes come between the start and the end of each: no false refusal escapes.
        load.storm(FEW_ATTEMPTS, clients=FEW, seed=2)
        finish(load, redis_client)
        history = load.check()
        assert_redis_agrees(redis_client, history["seats"])
        # The storm was one. Usually there are 800 changes, 50 moves, 700 refusals because the lesson is full.
        assert history["changes"] > 100
        assert history["moves"] > 5
        assert min(history["wanted"].values()) > 200
        assert min(history["refused"].values()) > 50


def test_a_person_with_several_clients_on_two_nodes_has_one_seat(ports, redis_client):
    with joined(SeatLoad(ports, KEY, "1", SEATS, people=5), 40) as load:
        load.storm(ATTEMPTS)
        finish(load, redis_client)
        history = load.check()
        assert_redis_agrees(redis_client, history["seats"])
        assert history["changes"] > 40
