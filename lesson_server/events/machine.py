"""Run a statechart: the ``transitions`` library, patched where it would lose steps or cancellations.

One machine per chart serves all connections. A model is not registered with the machine: any object with a ``state``
works, at the cost of a microsecond and no memory.

Source: transitions 0.9.3, ``transitions/extensions/asyncio.py``. Each override names what it replaces.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from transitions import MachineError
from transitions.extensions.asyncio import AsyncMachine, AsyncTransition

from lesson_server.errors import InvalidTransition

# The library logs each exception of a step as an error. A refusal is no error, and the gateway logs other exceptions.
logging.getLogger("transitions").setLevel(logging.CRITICAL)


class Chart(Protocol):
    """A chart of ``statecharts``; the docstring of ``statecharts`` explains the constants."""

    EVENT: str
    CLIENT: str
    STATES: dict[str, str]
    INITIAL: str
    FINAL: tuple[str, ...]
    PATH: tuple[str, ...]
    SEATED: tuple[str, ...]
    PRESENT: tuple[str, ...]
    RESTING: tuple[str, ...]
    GUEST: tuple[str, ...]
    TRANSITIONS: list[dict[str, object]]


class Model(Protocol):
    """The object that a machine moves, with its own state and a method for each step and condition of the chart."""

    state: str
    history: tuple[str, ...]


# Called with the name of a step, its duration in seconds, and what it raised.
StepObserver = Callable[[str, float, BaseException | None], None]


class Row(AsyncTransition):
    """A row of a chart: runs the conditions, then the steps, one after the other, then sets the new state.

    The library runs conditions concurrently, cancels a running transition of the same model (here, transitions wait for
    the lock of the connection), and has nine callback hooks that no chart uses: 36 of the 60 µs of a join and its end.
    """

    async def execute(self, event_data: Any) -> bool:  # type: ignore[override]
        condition: Any  # the library types it as synchronous
        for condition in self.conditions:
            if not await condition.check(event_data):
                return False
        await event_data.machine.callbacks(self.before, event_data)
        event_data.model.state = self.dest
        return True


class ChartMachine(AsyncMachine):
    """Runs one chart: the steps of a transition one after the other, with cancellations and errors intact.

    Args:
        chart: a module of ``statecharts``.
        observe_step: called after each step.
    """

    transition_cls = Row

    def __init__(self, chart: Chart, observe_step: StepObserver) -> None:
        super().__init__(
            model=None,
            states=list(chart.STATES),
            transitions=[dict(row) for row in chart.TRANSITIONS],
            initial=chart.INITIAL,
            auto_transitions=False,
        )
        self.chart = chart
        self.counts = Counter[str]()  # state → the models in this state, except in final states
        self.observe_step = observe_step
        # In a state with rows for several triggers of the path, the first trigger is fired.
        self._rest_of_path = {
            row["source"]: chart.PATH[done:]
            for done, trigger in reversed(list(enumerate(chart.PATH)))
            for row in chart.TRANSITIONS
            if row["trigger"] == trigger
        }

    def rest_of_path(self, state: str) -> tuple[str, ...]:
        """Return the triggers of the event that remain to be fired in ``state``; empty once the event is done."""
        return self._rest_of_path.get(state, ())

    def is_resting(self, state: str) -> bool:
        """Return whether a connection may stay in ``state`` as long as it likes."""
        return state in self.chart.RESTING

    def count(self, former: str | None, state: str) -> None:
        """Count a model that has moved from the state ``former`` (None: a new model) to ``state``."""
        if former is not None:
            self.counts[former] -= 1
        if state not in self.chart.FINAL:
            self.counts[state] += 1

    async def fire(self, model: Model, trigger: str) -> bool:
        """Run the row of the chart for ``trigger`` in the state of ``model``.

        Returns:
            False when a condition of the row does not hold; the state is unchanged.

        Raises:
            InvalidTransition: the chart has no such row; nothing has changed.
            Exception: what a step raised; the state is unchanged.
        """
        if trigger in self.events:  # for a trigger in no row, the library would raise KeyError
            with contextlib.suppress(MachineError):
                return bool(await self.events[trigger].trigger(model))
        raise InvalidTransition(trigger, model.state, model.history)

    # The library runs the callbacks of a list concurrently: after a callback raised, the rest would continue.

    async def callbacks(self, funcs: Iterable[Any], event_data: Any) -> None:  # type: ignore[override]
        for step in funcs:
            started = time.perf_counter()
            try:
                result = getattr(event_data.model, step)()
                if result is not None:  # the step is a coroutine
                    await result
            except BaseException as error:
                self.observe_step(step, time.perf_counter() - started, error)
                raise
            self.observe_step(step, time.perf_counter() - started, None)

    # The library turns CancelledError into False, which would break timeouts and shutdown.

    async def process_context(self, func: Callable[[], Any], model: object) -> Any:
        return await func()
