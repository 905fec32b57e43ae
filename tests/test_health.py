"""health.py: what the requests and the probes of a store make of it."""

import asyncio
import logging

import pytest
from fakes import run, settle

from lesson_server import health
from lesson_server.errors import StoreUnavailable
from lesson_server.health import Availability


class Store:
    """A store that answers probes when it is told to, and counts them."""

    def __init__(self):
        self.answers = True
        self.hangs = False
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
            await asyncio.sleep(0)
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
    monkeypatch.setattr(health, "PROBE_TIMEOUT", 0.02)
    monkeypatch.setattr(health, "PROBE_INTERVAL", 0.001)


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
        assert (store.probes, store.availability.failures) == (2, 2)

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


def test_a_request_that_is_served_after_all_ends_the_refusals():
    async def scenario():
        store = Store()
        store.answers = False
        store.availability.failed("timeout")
        while not store.is_refused:
            await asyncio.sleep(0)
        store.availability.answered()
        assert not store.is_refused
        store.availability.close()

    run(scenario())


def test_the_log_tells_of_a_change_and_not_of_a_store_that_flaps(caplog):
    async def scenario():
        store = Store()
        for _ in range(3):
            store.availability.failed("timeout")
        await settle()
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        for _ in range(3):
            store.availability.answered()
            store.availability.failed("timeout")
        await settle()
        assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]

    run(scenario())


def test_an_outage_that_only_a_probe_sees_the_end_of_is_logged_as_ended(caplog):
    async def scenario():
        store = Store()
        store.answers = False
        store.availability.failed("timeout")
        while not store.is_refused:
            await asyncio.sleep(0)
        store.answers = True
        while store.is_refused:
            await asyncio.sleep(0)
        assert [record.getMessage() for record in caplog.records] == [
            "Redis is unavailable: timeout",
            "Redis is available again",
        ]

    run(scenario())
