"""The availability of a store: learned from its requests, and logged once per change.

A failed request makes the store *suspected*: further requests are still sent, and a probe is sent at once. If the probe
fails too, the store is *unavailable*: requests are refused without being sent, and one probe at a time finds out when
the store answers again. So a hanging store costs only the first requests their timeout; later requests fail at once. If
the store answers the probe, the fault is in the failed request: it is logged, and no other request is refused.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from lesson_server.errors import StoreUnavailable
from lesson_server.log import EventLogger
from lesson_server.status import Status
from lesson_server.tasks import end

logger = EventLogger(__name__)

# Seconds for which a similar log line is suppressed: a slow store fails now and then.
LOG_INTERVAL = 10.0
# Seconds for the probe of a suspected store. A join that arrives during the probe waits no longer than this.
FIRST_PROBE_TIMEOUT = 0.4
# Seconds for each probe of an unavailable store, as for readiness (pages.py): enough for a store that is only slow.
PROBE_TIMEOUT = 1.0
# Seconds between a failed probe and the next probe. A recovery is noticed within PROBE_INTERVAL + PROBE_TIMEOUT.
PROBE_INTERVAL = 0.5


class Availability:
    """The availability of one store.

    Args:
        name: the operators' name for the store, e.g. ``RDS``.
        probe: sends the store a minimal request; any exception means that the store did not answer.
        on_unavailable: called when the store becomes unavailable, to fail the requests that wait for it.
    """

    def __init__(
        self, name: str, probe: Callable[[], Awaitable[object]], on_unavailable: Callable[[], object] = lambda: None
    ) -> None:
        self.name = name
        self._probe = probe
        self._on_unavailable = on_unavailable
        self._cause = ""  # of the last failure
        self._failed_at: float | None = None  # seconds since 1970
        self._unavailable = False
        self._probing: asyncio.Task[None] | None = None
        self._outage_logged = False
        self._return_logged_at = float("-inf")
        self._failure_logged_at = float("-inf")

    def require(self) -> None:
        """Refuse a request if the store is unavailable.

        Raises:
            StoreUnavailable: the store is unavailable.
        """
        if self._unavailable:
            raise self.refusal()

    def refusal(self) -> StoreUnavailable:
        """Return the error for a request that the store did not answer."""
        return StoreUnavailable(self.name, self._cause)

    @property
    def status(self) -> Status:
        """Whether the store is available, and when a request failed last."""
        return Status("down" if self._unavailable else "up", self._failed_at, self._cause or None)

    def failed(self, cause: str) -> None:
        """Note that a request failed, apparently because of the store.

        Args:
            cause: one line for the log, without secrets.
        """
        self._cause = cause
        self._failed_at = time.time()
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_it_answers())

    async def close(self) -> None:
        """Stop probing, and wait until the probe in progress has ended."""
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
        if time.monotonic() - self._failure_logged_at > LOG_INTERVAL:
            logger.error(
                "store_request_failed",
                "{store} answers, but a request failed: {cause}",
                store=self.name,
                cause=self._cause,
            )
            self._failure_logged_at = time.monotonic()

    def _log_outage(self) -> None:
        if not self._outage_logged and time.monotonic() - self._return_logged_at > LOG_INTERVAL:
            logger.error("store_unavailable", "{store} is unavailable: {cause}", store=self.name, cause=self._cause)
            self._outage_logged = True

    def _log_return(self) -> None:
        if self._outage_logged:
            logger.warning("store_available", "{store} is available again", store=self.name)
            self._outage_logged = False
            self._return_logged_at = time.monotonic()
