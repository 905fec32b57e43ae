"""``--workers N``: processes that share a port. Their parent only starts them, and starts anew those that die."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Seconds before a worker that died is started again; doubled each time it dies within STEADY seconds.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
STEADY = 60.0
# Seconds between two looks at whether the workers are ready.
START_INTERVAL = 0.05

SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}


@dataclass
class _Slot:
    """The place of one worker: its process now, or when the next one is due."""

    number: int
    pid: int | None = None
    started: float = 0.0
    due: float | None = None
    pause: float = 0.0
    status: int | None = None  # of the last process that has ended


class Supervisor:
    """Runs workers until SIGTERM or SIGINT, which it passes on, a second one too.

    Args:
        count: how many.
        serve: runs one worker, in a new process. Called with the number of the worker, a function that it calls once it
            serves, and a descriptor that can be read, to its end, once the parent is gone. Returns the exit status of
            the process. SIGNALS are blocked when it is called: one that arrives while the worker starts waits until it
            unblocks them.
        buried: called with the pid of each worker that has ended.
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

        The first goes ahead: what keeps it from starting would keep them all, and need be said only once.

        Args:
            ready: called when all of them serve for the first time.

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
        """Start workers for the first time; one that fails takes the others down, as it would go down alone."""
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
                    return max(slot.status, 1)  # below 0: killed by a signal
        return 0

    def _start(self, slot: _Slot) -> None:
        slot.started = time.monotonic()
        slot.due = None
        try:
            slot.pid = os.fork()
        except OSError as error:  # too many processes, or too little memory, for now
            self._start_later(slot, f"a worker could not be started: {error}")
            return
        if slot.pid == 0:
            status = 1
            try:
                os.setpgid(0, 0)  # a Ctrl-C is for the parent, which passes it on; two would stop us at once
                os.close(self._ready_end)
                os.close(self._parent_lives)
                status = self._serve(slot.number, self._tell_ready, self._parent_gone)
            except Exception:
                logger.exception("a worker failed")
            finally:
                logging.shutdown()
                os._exit(status)  # what the parent holds, the embedded stores too, is not ours to end

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
            self._buried(slot.pid)
            if not self._stopping:
                self._start_later(slot, f"worker {slot.pid} has died")
            slot.pid = None

    @staticmethod
    def _start_later(slot: _Slot, why: str) -> None:
        now = time.monotonic()
        steady = now - slot.started > STEADY
        slot.pause = FIRST_PAUSE if steady else min(slot.pause * 2 or FIRST_PAUSE, LONGEST_PAUSE)
        slot.due = now + slot.pause
        logger.error("%s; the next one starts in %.2f s", why, slot.pause)

    def _seconds_to_next_start(self) -> float:
        due = [slot.due for slot in self._slots if slot.due is not None and not self._stopping]
        return max(min(due, default=time.monotonic() + 60.0) - time.monotonic(), 0.0)
