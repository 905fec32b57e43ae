"""lookups.py: each join that waits for a lesson gets the outcome of its lookup, once."""

import asyncio

import pytest
from fakes import settle

from lesson_server.errors import LessonNotFound
from lesson_server.stores.rds.lesson import Lesson
from lesson_server.stores.rds.lookups import Lookups

LESSON = Lesson("1", 30)


@pytest.mark.parametrize("outcome", [LESSON, None])
@pytest.mark.gen_test
async def test_all_joins_that_wait_get_the_outcome(outcome):
    lookups = Lookups()
    lookup = lookups.begin("1")
    joins = [asyncio.create_task(lookup.answer()) for _ in range(3)]
    await settle()
    assert lookups.get("1") is lookup
    lookups.settle(lookup, outcome)
    assert lookups.get("1") is None
    assert await asyncio.gather(*joins) == [outcome] * 3
    assert lookup.outcome.result() == outcome
    assert lookup.joins == []


@pytest.mark.gen_test
async def test_an_error_is_the_outcome_for_all_who_wait_and_only_the_first_outcome_counts():
    lookups = Lookups()
    lookup = lookups.begin("1")
    join = asyncio.create_task(lookup.answer())
    await settle()
    lookups.settle(lookup, LessonNotFound("1"))
    lookups.settle(lookup, LESSON)
    with pytest.raises(LessonNotFound):
        await join
    assert isinstance(lookup.outcome.result(), LessonNotFound)


@pytest.mark.gen_test
async def test_a_join_that_is_cancelled_waits_no_more_and_fails_no_other():
    lookups = Lookups()
    lookup = lookups.begin("1")
    cancelled, join = (asyncio.create_task(lookup.answer()) for _ in range(2))
    await settle()
    cancelled.cancel()
    await settle()
    assert len(lookup.joins) == 1
    lookups.settle(lookup, LESSON)
    assert await join == LESSON


@pytest.mark.gen_test
async def test_lookups_that_nobody_waits_for_are_dropped_and_the_settled_ones_are_not_wanted():
    lookups = Lookups()
    unwanted, settled, wanted = (lookups.begin(lesson_id) for lesson_id in "123")
    join = asyncio.create_task(wanted.answer())
    await settle()
    lookups.settle(settled, LESSON)
    newer = lookups.begin("2")
    assert lookups.drop_unwanted([unwanted, settled, wanted]) == [wanted]
    assert unwanted.outcome.cancelled()
    assert settled.outcome.result() == LESSON
    assert (lookups.get("1"), lookups.get("2"), lookups.get("3")) == (None, newer, wanted)
    assert lookups.drop_unwanted([unwanted]) == []  # a second time does no harm
    lookups.fail_all(OSError("down"))
    with pytest.raises(OSError, match="down"):
        await join
    assert lookups.get("3") is None
