"""Whether a store answers, told to the log once a change and not once a request."""

import logging
import time

logger = logging.getLogger(__name__)

# Seconds after its last line in which a store that fails again is not news: one that is slow fails now and then.
FLAPPING = 10.0


class Condition:
    """The condition of one store, as the requests that use it find it.

    Args:
        name: what operators call the store, e.g. ``RDS``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._down = False  # as the log says
        self._said_at = float("-inf")

    def failed(self, cause: str) -> None:
        """A request failed because of the store. ``cause`` goes to the log when this is news; it holds no secret."""
        if not self._down and time.monotonic() - self._said_at > FLAPPING:
            logger.error("%s is unavailable: %s", self.name, cause)
            self._down = True
            self._said_at = time.monotonic()

    def answered(self) -> None:
        """A request was served."""
        if self._down:
            logger.warning("%s is available again", self.name)
            self._down = False
            self._said_at = time.monotonic()
