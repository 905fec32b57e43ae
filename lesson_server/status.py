"""How an external service is doing, as the console shows it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Status:
    """The status of an external service.

    Attributes:
        status: ``off`` if the service is not configured.
        failed_at: when a request to it failed last, in seconds since 1970; None: not since the start.
        cause: why that request failed, without secrets.
    """

    status: Literal["up", "down", "off"]
    failed_at: float | None = None
    cause: str | None = None
