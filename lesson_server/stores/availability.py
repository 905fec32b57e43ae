"""Whether a store answers: found out by the requests that use it, logged once a change, and not asked for in vain.

A request that fails makes the store *suspected*: further requests still go out, and a probe is sent at once. When the
probe fails too, the store is *unavailable*: requests are refused without being sent, and one probe at a time finds out
when the store is back. So a hanging store costs the first requests their timeout, and later ones nothing. A request
that fails though the store answers the probe is a fault of that request: it is logged, and refuses no other.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from lesson_server.errors import StoreUnavailable
from lesson_server.tasks import end

logger = logging.getLogger(__name__)

# Seconds after a line of the log in which another one like it is not news: a slow store fails now and then.
FLAPPING = 10.0
# Seconds for the probe of a suspected store. A join that arrives meanwhile waits no longer than this.
FIRST_PROBE_TIMEOUT = 0.4
# Seconds for each probe of an unavailable store: as for readiness (pages.py). A store that is only slow comes back.
PROBE_TIMEOUT = 1.0
# Seconds between a failed probe and the next one. With the timeout, it bounds how late a return is noticed.
PROBE_INTERVAL = 0.5


class Availability:
    """The availability of one store.

    Args:
        name: what operators call the store, e.g. ``RDS``.
        probe: asks the store for nothing but an answer; whatever it raises means that there was none.
        on_unavailable: called when requests are refused from now on; those that wait for the store can be failed then.
    """

    def __init__(
        self, name: str, probe: Callable[[], Awaitable[object]], on_unavailable: Callable[[], object] = lambda: None
    ) -> None:
        self.name = name
        self._probe = probe
        self._on_unavailable = on_unavailable
        self._cause = ""  # of the last failure
        self._unavailable = False
        self._probing: asyncio.Task[None] | None = None
        self._outage_logged = False
        self._return_logged_at = float("-inf")
        self._failure_logged_at = float("-inf")

    def require(self) -> None:
        """Refuse a request to a store that is known not to answer.

        Raises:
            StoreUnavailable: it is.
        """
        if self._unavailable:
            raise self.refusal()

    def refusal(self) -> StoreUnavailable:
        """Return what a request is told that the store did not answer."""
        return StoreUnavailable(self.name, self._cause)

    def failed(self, cause: str) -> None:
        """Note that a request failed, it seems because of the store.

        Args:
            cause: one line for the log, without a secret.
        """
        self._cause = cause
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_it_answers())

    async def close(self) -> None:
        """Stop probing. When this returns, the probe that was under way has ended."""
        await end(self._probing)

    async def _probe_until_it_answers(self) -> None:
        try:
            if await self._answers(FIRST_PROBE_TIMEOUT):
                self._log_failure()
                return
            self._unavailable = True
            self._on_unavailable()
            while self._unavailable:
                self._log_outage()
                await asyncio.sleep(PROBE_INTERVAL)
                self._unavailable = not await self._answers(PROBE_TIMEOUT)
            self._log_return()
        finally:
            self._probing = None

    async def _answers(self, patience: float) -> bool:
        try:
            async with asyncio.timeout(patience):
                await self._probe()
        except Exception:
            return False
        return True

    def _log_failure(self) -> None:
        if time.monotonic() - self._failure_logged_at > FLAPPING:
            logger.error("%s answers, but a request failed: %s", self.name, self._cause)
            self._failure_logged_at = time.monotonic()

    def _log_outage(self) -> None:
        if not self._outage_logged and time.monotonic() - self._return_logged_at > FLAPPING:
            logger.error("%s is unavailable: %s", self.name, self._cause)
            self._outage_logged = True

    def _log_return(self) -> None:
        if self._outage_logged:
            logger.warning("%s is available again", self.name)
            self._outage_logged = False
            self._return_logged_at = time.monotonic()
