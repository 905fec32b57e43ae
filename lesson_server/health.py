"""Whether a store answers, told to the log once a change and not once a request."""

import logging

logger = logging.getLogger(__name__)


class Condition:
    """The condition of one store, as the requests that use it find it.

    Args:
        name: what operators call the store, e.g. ``RDS``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._cause: str | None = None

    def failed(self, cause: str) -> None:
        """A request failed because of the store. ``cause`` goes to the log when this is news; it holds no secret."""
        if self._cause is None:
            logger.error("%s is unavailable: %s", self.name, cause)
        self._cause = cause

    def answered(self) -> None:
        """A request was served."""
        if self._cause is not None:
            logger.warning("%s is available again", self.name)
            self._cause = None
