"""A rate limit for log lines.

A client can cause the same line as often as it likes, by handshakes that never arrive or by requests that a library
warns about. So at most LINES lines of each kind are written in INTERVAL seconds, and then the number of lines left out.

The kind of a line is the statement that logs it, in our code or in a library, and the field ``reason``, which is one of
a fixed set; see :mod:`lesson_server.log`. So no client can create new kinds.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lesson_server.log import Value

# At most LINES lines of one kind are written in INTERVAL seconds.
LINES = 5
INTERVAL = 10.0

Kind = tuple[str, int, object]


@dataclass(slots=True)
class _Window:
    """The counts of one kind's lines, in the :data:`INTERVAL` seconds that begin with the first line."""

    end: float
    written: int = 0
    left_out: int = 0
    sample: logging.LogRecord | None = None  # the first line that was left out


class LimitedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, at most :data:`LINES` lines of one kind in :data:`INTERVAL` seconds.

    The number of lines left out is written at the end of that time if an event loop runs; otherwise before the next
    line of that kind, or when the handler is closed.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[Kind, _Window] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it as left out; ``logging`` calls this with the handler's lock held."""
        kind = (record.pathname, record.lineno, _fields(record).get("reason"))
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
            vars(window.sample)["fields"] = {**_fields(window.sample), "left_out": window.left_out}
            super().emit(window.sample)


def _fields(record: logging.LogRecord) -> Mapping[str, Value]:
    """Return the fields of a record; a library's has none."""
    fields: Mapping[str, Value] = getattr(record, "fields", {})
    return fields


def _without_traceback(record: logging.LogRecord) -> logging.LogRecord:
    """Return a record with the same event, fields and text, without references to the arguments of the text."""
    copy = logging.LogRecord(
        record.name, record.levelno, record.pathname, record.lineno, record.getMessage(), None, None
    )
    vars(copy).update({name: value for name, value in vars(record).items() if name in ("event", "fields")})
    return copy
