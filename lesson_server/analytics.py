"""Reports reconnects to Mixpanel off the event loop; a report never raises and never delays (contract, section 7).

The event loop puts an event on a bounded queue. One thread takes the queued events and posts them in batches. An event
has one of three outcomes, which are counted: *sent*; *failed*, if Mixpanel refused its batch or could not be reached
in several attempts; *dropped*, if the queue was full or the server stopped first.
"""

import random
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from threading import Condition, Thread
from typing import Literal, Protocol

from lesson_server.log import EventLogger
from lesson_server.settings.schema import MixpanelSettings
from lesson_server.status import Status

logger = EventLogger(__name__)

QUEUE_SIZE = 10_000  # events of about 400 bytes, 4 MB: the reconnects of a whole school while Mixpanel is unreachable
BATCH_SIZE = 50  # events in one request: the mixpanel library's own limit
REQUEST_TIMEOUT = 5.0  # seconds to connect, and seconds between two reads
ATTEMPTS = 5  # for each batch
FIRST_PAUSE = 1.0  # seconds before the second attempt; each further pause is twice as long

Outcome = Literal["sent", "failed", "dropped"]
Observe = Callable[[Outcome, int], None]


class Analytics(Protocol):
    """The interface of analytics for the rest of the server."""

    def reconnect(self, client_id: str, sid: str, lesson_id: str, role: str) -> None:
        """Report that a participant has reconnected ("mixpanel reconnect" in the participant's diagram).

        Args:
            client_id: the participant.
            sid: the new connection; ``client_id`` and ``sid`` identify the reconnect.
            lesson_id: the lesson that was joined.
            role: the role of the token.
        """

    @property
    def status(self) -> Status:
        """How Mixpanel is doing."""

    def start(self) -> None:
        """Start to send; call this in the process that serves, because a thread does not survive a fork."""

    def close(self, deadline: float) -> None:
        """Accept no more events and send the queued ones; this blocks, so call it in a thread.

        Args:
            deadline: seconds to wait at most; events that are unsent then are dropped.
        """


class NoAnalytics:
    """Sends nothing, because there is no token, and does not load the mixpanel library, 180 ms of imports."""

    def reconnect(self, client_id: str, sid: str, lesson_id: str, role: str) -> None:
        pass

    @property
    def status(self) -> Status:
        return Status("off")

    def start(self) -> None:
        pass

    def close(self, deadline: float) -> None:
        pass


class MixpanelAnalytics:
    """Builds events with the mixpanel library and sends them by a :class:`QueueingConsumer`.

    Args:
        token: the token of the Mixpanel project.
        api_url: the URL that ``/track`` is appended to.
        observe: called with an outcome and a number of events, from any thread.
    """

    def __init__(self, token: str, api_url: str, observe: Observe) -> None:
        from mixpanel import Consumer, Mixpanel

        # No retries by the library: it would sleep between them, and close() could not end the sleep.
        consumer = Consumer(events_url=f"{api_url}/track", request_timeout=REQUEST_TIMEOUT, retry_limit=0)
        self._queue = QueueingConsumer(lambda batch: consumer.send("events", batch), observe)
        self._mixpanel = Mixpanel(token, consumer=self._queue)

    def reconnect(self, client_id: str, sid: str, lesson_id: str, role: str) -> None:
        # Mixpanel recognizes a repeated event by its insert_id.
        insert_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lesson-server:reconnect:{client_id}:{sid}"))
        self._mixpanel.track(client_id, "reconnect", {"lesson_id": lesson_id, "role": role, "$insert_id": insert_id})

    @property
    def status(self) -> Status:
        return self._queue.status

    def start(self) -> None:
        self._queue.start()

    def close(self, deadline: float) -> None:
        self._queue.close(deadline)


def make_analytics(settings: MixpanelSettings, observe: Observe) -> Analytics:
    """Return the analytics that the settings ask for.

    Args:
        settings: without a token nothing is sent.
        observe: called with an outcome and a number of events, from any thread.
    """
    if settings.token is None:
        return NoAnalytics()
    return MixpanelAnalytics(settings.token.get_secret_value(), settings.api_url, observe)


class QueueingConsumer:
    """A consumer of the mixpanel library that queues events, and one thread that posts them.

    Args:
        post: sends one JSON list of events; any exception means that the batch was not accepted.
        observe: called with an outcome and a number of events.
    """

    def __init__(self, post: Callable[[str], object], observe: Observe) -> None:
        self._post = post
        self._observe = observe
        self._worker = Thread(target=self._run, name="mixpanel", daemon=True)
        # Guards _waiting, _in_flight and _closing.
        self._changed = Condition()
        self._waiting: deque[str] = deque()
        self._in_flight = 0  # events of the batch that the worker thread is sending
        self._closing = False
        self.status = Status("up")
        # Used only by the worker thread.
        self._reachable = True

    # On the event loop.

    def send(self, endpoint: str, json_message: str) -> None:
        """Queue an event; the mixpanel library calls this, as its consumer, only with the endpoint ``events``."""
        with self._changed:
            accepted = not self._closing and len(self._waiting) < QUEUE_SIZE
            if accepted:
                self._waiting.append(json_message)
                self._changed.notify_all()
        if not accepted:
            self._observe("dropped", 1)

    def start(self) -> None:
        """Start the thread."""
        self._worker.start()

    def close(self, deadline: float) -> None:
        """Wait at most ``deadline`` seconds until all events are sent; drop the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._worker.is_alive():
            self._worker.join(deadline)
        with self._changed:
            # A batch in flight is dropped, too: its thread ends with the process, and _settle won't count it again.
            left = self._in_flight + len(self._waiting)
            self._in_flight = 0
            self._waiting.clear()
        if left:
            logger.warning(
                "mixpanel_events_lost",
                "{count} events were not sent to Mixpanel in the {seconds:g} s allowed, and are lost",
                count=left,
                seconds=deadline,
            )
            self._observe("dropped", left)

    # In the worker thread.

    def _run(self) -> None:
        while batch := self._next_batch():
            self._settle(self._deliver(batch))

    def _next_batch(self) -> list[str]:
        """Wait for events and return a batch of them; an empty batch means that there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            batch = [self._waiting.popleft() for _ in range(min(BATCH_SIZE, len(self._waiting)))]
            self._in_flight = len(batch)
            return batch

    def _deliver(self, batch: list[str]) -> Outcome:
        message = f"[{','.join(batch)}]"
        for attempt in range(ATTEMPTS):
            if attempt:
                self._pause(FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                self._post(message)
            except Exception as error:  # the library raises KeyError and TypeError for malformed answers
                self._now_failing(error)
            else:
                self._now_reachable()
                return "sent"
            if self._closing:
                break  # while closing, each batch gets one attempt
        return "failed"

    def _settle(self, outcome: Outcome) -> None:
        with self._changed:
            count, self._in_flight = self._in_flight, 0
        if count:
            self._observe(outcome, count)

    def _pause(self, seconds: float) -> None:
        """Wait for 50 to 100 % of the time, at random, so that servers don't retry all at once; not while closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds * random.uniform(0.5, 1))  # noqa: S311

    def _now_failing(self, error: Exception) -> None:
        # Only the type of the error: its text may quote the answer, and the answer may quote the token.
        kind = "its answer is an error" if error.__cause__ is None else type(error.__cause__).__name__
        self.status = Status("down", time.time(), kind)
        if self._reachable:
            self._reachable = False
            logger.warning("mixpanel_unavailable", "events can't be sent to Mixpanel: {cause}", cause=kind)

    def _now_reachable(self) -> None:
        self.status = replace(self.status, status="up")
        if not self._reachable:
            self._reachable = True
            logger.warning("mixpanel_available", "events are sent to Mixpanel again")
