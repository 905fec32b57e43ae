"""tasks.py: a task that is to end does."""

import asyncio
import contextlib

import pytest

from lesson_server import tasks
from lesson_server.stores.availability import Availability
from lesson_server.tasks import end


async def deaf(times: int) -> None:
    """Runs until it has been cancelled that often."""
    for _ in range(times):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    raise asyncio.CancelledError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CANCEL_INTERVAL", 0.01)


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.gen_test
async def test_a_task_is_cancelled_until_it_has_ended(times: int) -> None:
    task = asyncio.create_task(deaf(times))
    await asyncio.sleep(0)
    await end(task)
    assert task.cancelled()


@pytest.mark.gen_test
async def test_what_has_ended_or_is_no_task_is_left_alone() -> None:
    task = asyncio.create_task(asyncio.sleep(0, "result"))
    await task
    await end(task)
    await end(None)
    assert task.result() == "result"


@pytest.mark.gen_test
async def test_probes_end_although_a_cancellation_gets_lost() -> None:
    probes = 0

    async def probe() -> None:
        nonlocal probes
        probes += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if probes == 1:
                raise ConnectionError from None
            raise

    availability = Availability("Redis", probe)
    availability.failed("a request failed")
    await asyncio.sleep(0)
    await availability.close()
    assert probes == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}
