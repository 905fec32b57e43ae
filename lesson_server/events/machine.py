"""How a statechart runs: the ``transitions`` library, mended where it would lose steps or cancellations.

One machine serves all connections of a kind. A connection is not added to it as a model: any object with a ``state``
will do, which costs a microsecond and no memory.

Source: transitions 0.9.3, ``transitions/extensions/asyncio.py``; each override says what it takes away.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from transitions import MachineError
from transitions.extensions.asyncio import AsyncMachine, AsyncTransition

from lesson_server.errors import InvalidTransition

# It logs an error for each exception that passes, and a refused join is one; the gateway says what there is to say.
logging.getLogger("transitions").setLevel(logging.CRITICAL)


class Chart(Protocol):
    """A module of ``statecharts``."""

    STATES: dict[str, str]
    INITIAL: str
    JOIN: tuple[str, ...]
    SEATED: tuple[str, ...]
    PRESENT: tuple[str, ...]
    TRANSITIONS: list[dict[str, object]]


class HasState(Protocol):
    """What a machine moves."""

    state: str
    story: tuple[str, ...]


class Row(AsyncTransition):
    """A row of a chart: its conditions, its steps, then the new state, one after the other.

    The library gathers conditions, cancels a transition of the model that is under way (ours wait for each other at the
    connection's lock), and has nine places for callbacks that no chart uses: 36 of the 60 µs of a join and its end.
    """

    async def execute(self, event_data: Any) -> bool:  # type: ignore[override]
        condition: Any  # typed as those of the synchronous library
        for condition in self.conditions:
            if not await condition.check(event_data):
                return False
        await event_data.machine.callbacks(self.before, event_data)
        event_data.model.state = self.dest
        return True


class LessonMachine(AsyncMachine):
    """Runs a chart: the steps of a transition one after the other, cancellation and errors intact.

    Args:
        chart: a module of ``statecharts``.
        observe_step: called with a step's name and its duration in seconds, whether it succeeded or raised.
    """

    transition_cls = Row

    def __init__(self, chart: Chart, observe_step: Callable[[str, float], None]) -> None:
        super().__init__(
            model=None,
            states=list(chart.STATES),
            transitions=[dict(row) for row in chart.TRANSITIONS],
            initial=chart.INITIAL,
            auto_transitions=False,
        )
        self._observe_step = observe_step
        source_of = {row["trigger"]: str(row["source"]) for row in chart.TRANSITIONS if row["trigger"] in chart.JOIN}
        self._rest_of_join = {source_of[trigger]: chart.JOIN[done:] for done, trigger in enumerate(chart.JOIN)}

    def rest_of_join(self, state: str) -> tuple[str, ...]:
        """The triggers that a join still has to fire from ``state``; none once it is over."""
        return self._rest_of_join.get(state, ())

    async def fire(self, model: HasState, trigger: str) -> bool:
        """Moves ``model`` along the row of ``trigger`` that fits its state.

        Returns:
            False when the chart's conditions kept it where it is.

        Raises:
            InvalidTransition: the chart has no such row; nothing has changed.
            Exception: what a step raised; the state is as it was.
        """
        try:
            return bool(await self.events[trigger].trigger(model))
        except MachineError:
            raise InvalidTransition(trigger, model.state, model.story) from None

    # The library gathers the callbacks of a list: siblings would go on after one raised.

    async def callbacks(self, funcs: Iterable[Any], event_data: Any) -> None:  # type: ignore[override]
        for step in funcs:
            started = time.perf_counter()
            try:
                result = getattr(event_data.model, step)()
                if result is not None:  # a step returns nothing, or what it waits for
                    await result
            finally:
                self._observe_step(step, time.perf_counter() - started)

    # The library turns CancelledError into False, and timeouts and shutdown with it.

    async def process_context(self, func: Callable[[], Any], model: object) -> Any:
        return await func()
