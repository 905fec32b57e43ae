"""Fixtures of the tests in this folder."""

import pytest
from fakes import BreakableStore
from node_keys import RETENTION, House
from presences import new_presence

from lesson_server.stores.redis import removals
from lesson_server.stores.redis.client import RedisStore


@pytest.fixture
def store(io_loop, stores):
    store = RedisStore(stores.redis_url, "", 2.0, 4)
    yield store
    io_loop.run_sync(store.close)


@pytest.fixture
def open_presence(io_loop, stores, monkeypatch):
    """The presence of one node, with a connection to Redis of its own."""
    monkeypatch.setattr(removals, "RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(removals, "UNINDEX_INTERVAL", 0.01)
    opened = []

    def open_presence(retention=RETENTION, key_prefix="", options=""):
        store = BreakableStore(stores.redis_url + options, key_prefix, 2.0, 4)
        presence = new_presence(store, retention)
        opened.append((presence, store))
        return presence

    yield open_presence
    for presence, store in opened:
        io_loop.run_sync(presence.removals.close)
        io_loop.run_sync(store.close)


@pytest.fixture
def presence(open_presence):
    return open_presence()


@pytest.fixture
def elsewhere(open_presence):
    return open_presence()


@pytest.fixture
def open_house(io_loop, stores):
    houses = []

    def open_house(*retention):
        houses.append(House(stores.redis_url, *retention))
        io_loop.run_sync(houses[-1].beat)
        return houses[-1]

    yield open_house
    for house in houses:
        io_loop.run_sync(house.close)


@pytest.fixture
def a(open_house):
    return open_house()


@pytest.fixture
def b(open_house):
    return open_house()
