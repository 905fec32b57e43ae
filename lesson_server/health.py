"""Whether a store answers: found out by the requests that use it, logged once a change, and not asked for in vain.

A request that fails makes the store *suspected*: further requests still go out, and a probe is sent at once. When the
probe fails too, the store is *unavailable*: requests are refused without being sent, and one probe at a time finds out
when the store is back. So a hanging store costs the first requests their timeout, and later ones nothing.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from lesson_server.errors import StoreUnavailable

logger = logging.getLogger(__name__)

# Seconds after its last line in which a store that fails again is not news: one that is slow fails now and then.
FLAPPING = 10.0
# Seconds for a probe. A join that arrives while the first probe is under way waits no longer than this.
PROBE_TIMEOUT = 0.4
# Seconds between a failed probe and the next one.
PROBE_INTERVAL = 0.5


class Availability:
    """The availability of one store.

    Args:
        name: what operators call the store, e.g. ``RDS``.
        probe: asks the store for nothing but an answer; whatever it raises means that there was none.
        on_unavailable: called when requests are refused from now on; those that wait for the store can be failed then.

    Attributes:
        failures: how many requests have failed because of the store.
    """

    def __init__(
        self, name: str, probe: Callable[[], Awaitable[object]], on_unavailable: Callable[[], object] = lambda: None
    ) -> None:
        self.name = name
        self.failures = 0
        self._probe = probe
        self._on_unavailable = on_unavailable
        self._cause = ""  # of the last failure
        self._unavailable = False
        self._probing: asyncio.Task[None] | None = None
        self._logged_down = False
        self._logged_at = float("-inf")

    def require(self) -> None:
        """Refuses a request to a store that is known not to answer.

        Raises:
            StoreUnavailable: it is.
        """
        if self._unavailable:
            raise self.refusal()

    def refusal(self) -> StoreUnavailable:
        """What a request is told that the store did not answer."""
        return StoreUnavailable(self.name, self._cause)

    def failed(self, cause: str) -> None:
        """A request failed because of the store.

        Args:
            cause: one line for the log, without a secret.
        """
        self.failures += 1
        self._cause = cause
        if not self._logged_down and time.monotonic() - self._logged_at > FLAPPING:
            self._log(logging.ERROR, "%s is unavailable: %s", self.name, cause)
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_it_answers())

    def answered(self) -> None:
        """A request was served."""
        self._unavailable = False
        if self._logged_down:
            self._log(logging.WARNING, "%s is available again", self.name)

    def close(self) -> None:
        """Stops probing."""
        if self._probing is not None:
            self._probing.cancel()

    async def _probe_until_it_answers(self) -> None:
        while not await self._answers():
            if not self._unavailable:
                self._unavailable = True
                self._on_unavailable()
            await asyncio.sleep(PROBE_INTERVAL)
        self._probing = None
        if self._unavailable:  # else only a request failed, and the next one that is served tells the log
            self.answered()

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._probe()
        except Exception:
            return False
        return True

    def _log(self, level: int, message: str, *args: object) -> None:
        logger.log(level, message, *args)
        self._logged_down = level == logging.ERROR
        self._logged_at = time.monotonic()


class Condition(Availability):
    """Until both stores use probes."""

    def __init__(self, name: str) -> None:
        async def answers() -> None:
            pass

        super().__init__(name, answers)
