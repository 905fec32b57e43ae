"""Fixtures of the tests in this folder."""

import pytest
from lesson_queries import HeldQueries

from lesson_server.stores.rds.connections import Rds


@pytest.fixture
def lessons(open_lessons):
    return open_lessons()


@pytest.fixture
def held(monkeypatch):
    held = HeldQueries()
    monkeypatch.setattr(Rds, "fetch", lambda self, *statement: held.fetch(*statement))
    return held
