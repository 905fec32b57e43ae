"""Server-sent events."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import orjson
from tornado.iostream import StreamClosedError

from lesson_server.http.api import ApiError
from lesson_server.http.page import PageHandler

# Streams that one process serves at the same time: half of EXTRA_SOCKETS in protocol/server.py, because a stream keeps
# its place, and probes need places too.
MAX_STREAMS = 32
# Milliseconds after which a browser connects again.
RETRY = 1_000
# Milliseconds after which a connection is closed whose client acknowledges nothing: a computer that was switched off.
# Otherwise the kernel would try for a quarter of an hour, and the nodes would publish for nobody.
USER_TIMEOUT = 10_000


class StreamHandler(PageHandler):
    """Answers with a stream of events, until the browser goes away or :meth:`events` ends."""

    streams: set["StreamHandler"] = set()  # noqa: RUF012 (shared by design: the limit is for the process)

    _task: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        await self.access.require(self)

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("X-Accel-Buffering", "no")  # nginx must not wait for more

    async def serve(self, events: AsyncIterator[tuple[str, Any] | None], *, only_changes: bool = False) -> None:
        """Send events, each as its name and data; None is a sign of life.

        Args:
            events: the events; the stream ends with them.
            only_changes: whether an event that is equal to the last one of its name is left out.
        """
        if len(self.streams) >= MAX_STREAMS:
            raise ApiError(503, "too many pages are open, try again")
        self.streams.add(self)
        self._task = asyncio.current_task()
        sent: dict[str, bytes] = {}
        stream = self.request.connection.stream  # type: ignore[union-attr]
        stream.place.keep()  # otherwise a new connection could evict the stream
        if hasattr(socket, "TCP_USER_TIMEOUT") and not stream.closed():  # Linux
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
        try:
            self.write(f"retry: {RETRY}\n\n")
            async for event in events:
                if event is None:
                    self.write(":\n\n")
                else:
                    name, data = event
                    text = orjson.dumps(data)
                    if not only_changes or sent.get(name) != text:
                        self.write(b"event: %b\ndata: %b\n\n" % (name.encode(), text))
                        sent[name] = text
                await self.flush()
        except (StreamClosedError, asyncio.CancelledError):
            pass
        finally:
            self.streams.discard(self)
            self._task = None
            await events.aclose()  # type: ignore[attr-defined]

    def on_connection_close(self) -> None:
        if self._task is not None:
            self._task.cancel()
