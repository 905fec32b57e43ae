"""The log, with a bound on what anybody can make it say.

A client may cause the same line as often as it likes, by handshakes that never come or by requests that a library warns
of. So a few lines of each kind are written in a while, and then one that tells how many were left out.

The kind of a line is the statement that logs it, whether it is ours or a library's. A statement that tells of several
kinds of events names each by ``extra={"kind": ...}``, from a fixed set. So no client can make new kinds.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

# Lines of one kind that are written in so many seconds.
LINES = 5
INTERVAL = 10.0

Kind = tuple[str, int, object]


@dataclass(slots=True)
class _Window:
    """What has become of the lines of one kind in the :data:`INTERVAL` that began with the first of them."""

    end: float
    written: int = 0
    left_out: int = 0
    sample: logging.LogRecord | None = None  # the first that was left out


class LimitedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, at most :data:`LINES` lines of one kind in :data:`INTERVAL` seconds.

    How many were left out is written at the end of that time where an event loop runs; else with the next line of that
    kind, or when the handler is closed.

    Args:
        clock: seconds, by which the time is measured.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[Kind, _Window] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line or count it. Called with the handler's lock held, as by all of ``logging``."""
        kind = (record.pathname, record.lineno, getattr(record, "kind", None))
        now = self._clock()
        window = self._windows.get(kind)
        if window is not None and now >= window.end:
            self._close_window(kind)
            window = None
        if window is None:
            window = self._windows[kind] = _Window(now + INTERVAL)
        if window.written < LINES:
            window.written += 1
            super().emit(record)
            return
        window.left_out += 1
        if window.sample is None:
            try:
                window.sample = _without_traceback(record)
            except Exception:
                self.handleError(record)
                return
            with contextlib.suppress(RuntimeError):  # no loop runs in this thread
                asyncio.get_running_loop().call_later(window.end - now, self._expire, kind, window)

    def close(self) -> None:
        self.acquire()
        try:
            for kind in list(self._windows):
                self._close_window(kind)
        finally:
            self.release()
        super().close()

    def _expire(self, kind: Kind, window: _Window) -> None:
        self.acquire()
        try:
            if self._windows.get(kind) is window:
                self._close_window(kind)
        finally:
            self.release()

    def _close_window(self, kind: Kind) -> None:
        window = self._windows.pop(kind)
        if window.sample is not None:
            window.sample.msg += f" (and {window.left_out} more like this in {INTERVAL:g} s)"
            super().emit(window.sample)


def _without_traceback(record: logging.LogRecord) -> logging.LogRecord:
    """Return a line with the same text, which holds none of the objects that the text was made from."""
    return logging.LogRecord(
        record.name, record.levelno, record.pathname, record.lineno, record.getMessage(), None, None
    )
