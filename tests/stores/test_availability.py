"""availability.py: what the requests and the probes of a store make of it."""

import asyncio
import logging

import pytest
from clock import Clock
from fakes import run, settle

from lesson_server.errors import StoreUnavailable
from lesson_server.status import Status
from lesson_server.stores import availability
from lesson_server.stores.availability import Availability


class Store:
    """A store that answers probes when it is told to, and counts them."""

    def __init__(self):
        self.answers = True
        self.hangs = False
        self.delay = 0.0
        self.probes = 0
        self.under_way = 0
        self.refused = 0
        self.availability = Availability("Redis", self.probe, self.refuse)

    async def probe(self):
        self.probes += 1
        self.under_way += 1
        assert self.under_way == 1, "one probe at a time"
        try:
            if self.hangs:
                await asyncio.Event().wait()
            await asyncio.sleep(self.delay)
            if not self.answers:
                raise ConnectionError
        finally:
            self.under_way -= 1

    def refuse(self):
        self.refused += 1

    @property
    def is_refused(self):
        try:
            self.availability.require()
        except StoreUnavailable:
            return True
        return False


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(availability, "FIRST_PROBE_TIMEOUT", 0.02)
    monkeypatch.setattr(availability, "PROBE_TIMEOUT", 0.02)
    monkeypatch.setattr(availability, "PROBE_INTERVAL", 0.001)


def test_a_request_that_fails_alone_refuses_no_other():
    async def scenario():
        store = Store()
        store.availability.failed("timeout")
        assert not store.is_refused  # the probe is under way
        await settle()
        assert (store.probes, store.refused) == (1, 0)
        assert not store.is_refused
        store.availability.failed("timeout")
        await settle()
        assert store.probes == 2

    run(scenario())


@pytest.mark.parametrize("hangs", [False, True])
def test_a_store_that_answers_no_probe_is_refused_until_it_answers_one(hangs):
    async def scenario():
        store = Store()
        store.answers, store.hangs = False, hangs
        store.availability.failed("timeout")
        store.availability.failed("timeout")
        while not store.is_refused:
            await asyncio.sleep(0.001)
        while store.probes < 3:
            await asyncio.sleep(0.001)
        assert store.refused == 1
        store.answers, store.hangs = True, False
        while store.is_refused:
            await asyncio.sleep(0.001)
        probes = store.probes
        await asyncio.sleep(0.01)
        assert store.probes == probes

    run(scenario())


def test_who_is_refused_is_told_what_failed():
    async def scenario():
        store = Store()
        store.answers = False
        store.availability.failed("timeout")
        while not store.is_refused:
            await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable) as caught:
            store.availability.require()
        assert caught.value.cause == store.availability.refusal().cause == "Redis: timeout"
        await store.availability.close()

    run(scenario())


def test_a_store_that_is_slow_as_a_whole_comes_back(monkeypatch):
    """It misses the first probe, for which joins wait, but not the later ones, for which nobody does."""
    monkeypatch.setattr(availability, "PROBE_TIMEOUT", 10.0)

    async def scenario():
        store = Store()
        store.delay = 0.04
        store.availability.failed("timeout")
        while not store.is_refused:
            await asyncio.sleep(0)
        while store.is_refused:
            await asyncio.sleep(0.001)
        assert store.probes == 2

    run(scenario())


def test_when_it_is_closed_its_probe_has_ended():
    async def scenario():
        store = Store()
        store.hangs = True
        store.availability.failed("timeout")
        await settle()
        assert store.under_way == 1
        await store.availability.close()
        assert store.under_way == 0
        await store.availability.close()

    run(scenario())


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(availability, "time", clock)
    return clock


# The status


def test_the_status_says_whether_it_is_available_and_what_failed_last(clock):
    async def scenario():
        store = Store()
        assert store.availability.status == Status("up")
        store.answers = False
        store.availability.failed("timeout")
        assert store.availability.status == Status("up", 1_000.0, "timeout")  # suspected: it still gets requests
        while not store.is_refused:
            await asyncio.sleep(0)
        assert store.availability.status == Status("down", 1_000.0, "timeout")
        clock.now += 5
        store.availability.failed("connection refused")
        assert store.availability.status == Status("down", 1_005.0, "connection refused")
        clock.now += 5
        store.answers = True
        while store.is_refused:
            await asyncio.sleep(0.001)
        assert store.availability.status == Status("up", 1_005.0, "connection refused")
        await store.availability.close()

    run(scenario())


def test_a_request_that_fails_alone_leaves_the_status_up(clock):
    async def scenario():
        store = Store()
        store.availability.failed("timeout")
        await settle()
        assert store.availability.status == Status("up", 1_000.0, "timeout")

    run(scenario())


def test_a_failure_without_a_cause_has_none():
    async def scenario():
        store = Store()
        store.availability.failed("")
        assert store.availability.status.cause is None
        await store.availability.close()

    run(scenario())


# The log


def logged(caplog):
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_a_request_that_fails_alone_is_logged_as_that_and_not_each_time(caplog, monkeypatch):
    async def scenario():
        store = Store()
        for _ in range(3):
            store.availability.failed("timeout")
            await settle()
        assert logged(caplog) == ["Redis answers, but a request failed: timeout"]
        monkeypatch.setattr(availability, "LOG_INTERVAL", 0.0)
        store.availability.failed("timeout")
        await settle()
        assert logged(caplog) == ["Redis answers, but a request failed: timeout"]

    run(scenario())


async def goes_and_comes_back(store):
    store.answers = False
    store.availability.failed("timeout")
    while not store.is_refused:
        await asyncio.sleep(0)
    store.availability.failed("timeout")
    store.answers = True
    while store.is_refused:
        await asyncio.sleep(0)


def test_an_outage_is_logged_once_and_so_is_its_end(caplog):
    async def scenario():
        store = Store()
        await goes_and_comes_back(store)
        assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
        assert logged(caplog) == ["Redis is unavailable: timeout", "Redis is available again"]

    run(scenario())


def test_a_store_that_flaps_is_not_logged_each_time_and_one_that_stays_away_is(caplog, monkeypatch):
    async def scenario():
        store = Store()
        await goes_and_comes_back(store)
        logged(caplog)
        for _ in range(3):
            await goes_and_comes_back(store)
        assert logged(caplog) == []
        store.answers = False
        store.availability.failed("timeout")
        while not store.is_refused:
            await asyncio.sleep(0)
        monkeypatch.setattr(availability, "LOG_INTERVAL", 0.0)  # time passes
        probes = store.probes
        while store.probes < probes + 2:
            await asyncio.sleep(0)
        assert logged(caplog) == ["Redis is unavailable: timeout"]
        await store.availability.close()

    run(scenario())


def test_an_outage_is_logged_once_however_long_it_lasts(caplog, clock):
    async def scenario():
        store = Store()
        store.answers = False
        store.availability.failed("timeout")
        for probes in range(2, 5):
            while store.probes < probes:
                await asyncio.sleep(0)
            clock.now += availability.LOG_INTERVAL + 1
        assert logged(caplog) == ["Redis is unavailable: timeout"]
        await store.availability.close()

    run(scenario())


def test_an_outage_soon_after_the_end_of_a_long_one_is_no_news(caplog, clock):
    async def scenario():
        store = Store()
        store.answers = False
        store.availability.failed("timeout")
        while not store.is_refused:
            await asyncio.sleep(0)
        clock.now += availability.LOG_INTERVAL * 6
        await goes_and_comes_back(store)
        assert logged(caplog) == ["Redis is unavailable: timeout", "Redis is available again"]
        clock.now += availability.LOG_INTERVAL - 1
        await goes_and_comes_back(store)
        assert logged(caplog) == []
        clock.now += 2
        await goes_and_comes_back(store)
        assert logged(caplog) == ["Redis is unavailable: timeout", "Redis is available again"]

    run(scenario())


def test_a_failure_before_an_outage_does_not_keep_the_outage_from_the_log(caplog):
    async def scenario():
        store = Store()
        store.availability.failed("timeout")
        await settle()
        await goes_and_comes_back(store)
        assert logged(caplog) == [
            "Redis answers, but a request failed: timeout",
            "Redis is unavailable: timeout",
            "Redis is available again",
        ]

    run(scenario())
