"""What tests ask of the explorer: that it finds nothing, or finds it again. See explorer.py."""

from typing import Any

import redis
from explorer import Counterexample, Report, explore, replay
from explorer_scenarios import Scenario

# More than any of the scenarios of `make test` has: a test that is cut has not seen every order.
LIMIT = 2_000


def all_of(client: redis.Redis, scenario: Scenario, **options: Any) -> Report:
    """Explores all of a scenario, in which nothing may be wrong."""
    report = explore(client, scenario, LIMIT, **options)
    assert report.counterexample is None, str(report.counterexample)
    assert not report.cut
    assert not report.missing, f"never injected: {report.missing}"
    return report


def found_and_replayed(client: redis.Redis, planted: Scenario, limit: int = LIMIT) -> Counterexample:
    """Finds a planted defect, and finds it again by its schedule."""
    found = explore(client, planted, limit).counterexample
    assert found is not None
    again = replay(client, planted, found.schedule)
    assert isinstance(again, Counterexample)
    assert again.violations == found.violations
    return again
