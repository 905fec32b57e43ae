"""``--workers N``: worker processes share a port; their parent only starts them, and restarts each one that dies."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from lesson_server.log import EventLogger

logger = EventLogger(__name__)

# Seconds before a dead worker is restarted; doubled each time that the worker dies within STEADY_AFTER seconds.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
STEADY_AFTER = 60.0
# Seconds between two checks whether the workers are ready.
START_INTERVAL = 0.05

SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}


@dataclass
class _Slot:
    """One worker's number, and its current process or the time of its next start."""

    number: int
    pid: int | None = None
    started: float = 0.0
    due: float | None = None
    pause: float = 0.0
    status: int | None = None  # exit status of the last process that has ended


class Supervisor:
    """Runs workers until SIGTERM or SIGINT; sends SIGTERM to the workers for each such signal, a second one too.

    Args:
        count: the number of workers.
        serve: runs one worker in a new process, and returns the exit status of the process. Its arguments are the
            worker's number, a function to call once the worker serves, and a file descriptor that reads end-of-file
            once the parent has ended. SIGNALS are blocked at the call: a signal that arrives while the worker starts
            is delivered when ``serve`` unblocks SIGNALS.
        buried: called with the number of each worker that has ended.
    """

    def __init__(
        self, count: int, serve: Callable[[int, Callable[[], object], int], int], buried: Callable[[int], None]
    ) -> None:
        self._buried = buried
        self._slots = [_Slot(number) for number in range(count)]
        self._serve = serve
        self._stopping = False

    def run(self, ready: Callable[[], None]) -> int:
        """Start the workers and stay until all have ended.

        The first worker starts alone, so that a fault that would prevent every start is reported only once.

        Args:
            ready: called when all workers serve for the first time.

        Returns:
            0, or the exit status of the worker that could not start.
        """
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._ready_end, self._write_end = os.pipe()
        os.set_blocking(self._ready_end, False)
        self._parent_gone, self._parent_lives = os.pipe()
        try:
            status = self._start_and_wait(self._slots[:1]) or self._start_and_wait(self._slots[1:])
            if status == 0 and not self._stopping:
                ready()
            while not self._stopping or any(slot.pid for slot in self._slots):
                self._next_event(self._seconds_to_next_start())
            return status
        finally:
            for descriptor in (self._ready_end, self._write_end, self._parent_gone, self._parent_lives):
                os.close(descriptor)
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _start_and_wait(self, slots: list[_Slot]) -> int:
        """Start workers for the first time; if one can't start, stop all, as a server in one process would stop."""
        if self._stopping:
            return 0
        for slot in slots:
            self._start(slot)
        waiting = len(slots)
        while waiting and not self._stopping:
            self._next_event(START_INTERVAL)
            with contextlib.suppress(BlockingIOError):
                waiting -= len(os.read(self._ready_end, waiting))
            for slot in slots:
                if slot.status is not None and not self._stopping:
                    self._stop()
                    return max(slot.status, 1)  # a status below 0: killed by a signal
        return 0

    def _start(self, slot: _Slot) -> None:
        slot.started = time.monotonic()
        slot.due = None
        try:
            slot.pid = os.fork()
        except OSError as error:  # too many processes, or too little memory, for now
            self._start_later(slot)
            logger.error(
                "worker_not_started",
                "a worker could not be started: {cause}; the next one starts in {pause:.2f} s",
                cause=str(error),
                pause=slot.pause,
            )
            return
        if slot.pid == 0:
            status = 1
            try:
                os.setpgid(0, 0)  # Ctrl-C reaches only the parent, which passes it on: two signals stop us at once
                os.close(self._ready_end)
                os.close(self._parent_lives)
                status = self._serve(slot.number, self._tell_ready, self._parent_gone)
            except Exception:
                logger.exception("worker_failed", "a worker failed")
            finally:
                logging.shutdown()
                os._exit(status)  # without the parent's clean-up, which would also stop the embedded stores

    def _tell_ready(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone
            os.write(self._write_end, b".")

    def _next_event(self, timeout: float) -> None:
        event = signal.sigtimedwait(SIGNALS, timeout)
        if event is not None and event.si_signo != signal.SIGCHLD:
            self._stop()
        self._reap()
        now = time.monotonic()
        for slot in self._slots:
            if slot.due is not None and slot.due <= now and not self._stopping:
                self._start(slot)

    def _stop(self) -> None:
        self._stopping = True
        for slot in self._slots:
            if slot.pid:
                os.kill(slot.pid, signal.SIGTERM)

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.pid is None:
                continue
            ended, status = os.waitpid(slot.pid, os.WNOHANG)
            if not ended:
                continue
            slot.status = os.waitstatus_to_exitcode(status)
            self._buried(slot.number)
            if not self._stopping:
                self._start_later(slot)
                logger.error(
                    "worker_died",
                    "worker {worker_pid} has died; the next one starts in {pause:.2f} s",
                    worker_pid=slot.pid,
                    status=slot.status,
                    pause=slot.pause,
                )
            slot.pid = None

    @staticmethod
    def _start_later(slot: _Slot) -> None:
        now = time.monotonic()
        is_steady = now - slot.started > STEADY_AFTER
        slot.pause = FIRST_PAUSE if is_steady else min(slot.pause * 2 or FIRST_PAUSE, LONGEST_PAUSE)
        slot.due = now + slot.pause

    def _seconds_to_next_start(self) -> float:
        due = [slot.due for slot in self._slots if slot.due is not None and not self._stopping]
        return max(min(due, default=time.monotonic() + 60.0) - time.monotonic(), 0.0)
