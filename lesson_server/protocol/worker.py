"""One of several workers, and how workers pass connections to each other.

With ``--workers N``, any worker may accept a request of any Engine.IO socket. The id of the socket begins with the
number of its worker. A worker that accepts a request for another worker passes the connection on, with nothing read.

Each worker has an inbox, a pair of unix sockets that is made before the fork. So when a worker dies, its inbox keeps
the passed connections for the replacement. An inbox has room for a few hundred connections; further connections wait
in the worker that accepted them.
"""

import asyncio
import re
import socket
from collections.abc import Callable
from functools import partial

from lesson_server.log import EventLogger
from lesson_server.protocol.places import Place

logger = EventLogger(__name__)

# Connections received per iteration of the event loop.
RECEIVE_BATCH = 8

# The beginning of a request of an Engine.IO socket, up to the worker's number in the ``sid``.
REQUEST = re.compile(rb"[A-Z]+ /socket\.io/?\?(?:[^ ]*&)?sid=(\d{1,5})\.")

Inbox = tuple[socket.socket, socket.socket]  # the end to read from, and the end to write to


class Worker:
    """One of several workers.

    Args:
        number: the number of this worker, from 0. The replacement of a dead worker gets the same number.
        inboxes: the inboxes of all workers, by number.
    """

    def __init__(self, number: int, inboxes: tuple[Inbox, ...]) -> None:
        self.number = number
        self.inboxes = inboxes
        # For each worker, the connections that wait for room in its inbox, in the order of arrival, with their places.
        self._waiting: tuple[dict[socket.socket, Place], ...] = tuple({} for _ in inboxes)

    def sid(self, sid: str) -> str:
        """Return the id of an Engine.IO socket of this worker."""
        return f"{self.number}.{sid}"

    def other(self, head: bytes) -> int | None:
        """Return the number of the worker that has the Engine.IO socket of a request, or None if it is this worker.

        Args:
            head: the beginning of the request.
        """
        request = REQUEST.match(head)
        number = self.number if request is None else int(request[1])
        return number if number != self.number and number < len(self.inboxes) else None

    def send(self, number: int, connection: socket.socket, place: Place) -> None:
        """Pass a connection to another worker, and close it in this process.

        While the inbox of the other worker is full, the connection waits.

        Args:
            number: the number of the other worker.
            connection: nothing has been read from it.
            place: the place of the connection, until the connection is passed on.
        """
        waiting = self._waiting[number]
        waiting[connection] = place
        place.transfer(partial(self._close, number, connection))
        if len(waiting) == 1:
            self._send(number)

    def receive(self, take: Callable[[socket.socket], None]) -> None:
        """Call ``take`` with each connection that is passed to this worker, until :meth:`stop`."""
        asyncio.get_running_loop().add_reader(self.inboxes[self.number][0], self._receive, take)

    def stop(self) -> None:
        """Stop receiving connections, and close the connections that wait to be passed on."""
        asyncio.get_running_loop().remove_reader(self.inboxes[self.number][0])
        for number, waiting in enumerate(self._waiting):
            for connection in list(waiting):
                self._close(number, connection)

    def _send(self, number: int) -> None:
        inbox, waiting = self.inboxes[number][1], self._waiting[number]
        for connection in list(waiting):
            try:
                socket.send_fds(inbox, [b"."], [connection.fileno()])
            except BlockingIOError:
                asyncio.get_running_loop().add_writer(inbox, self._send, number)
                return
            except OSError as error:  # too many descriptors are in flight between processes
                logger.error(
                    "request_not_passed",
                    "can't pass a request to worker {worker}: {cause}",
                    worker=number,
                    cause=error.strerror,
                )
            self._close(number, connection)
        asyncio.get_running_loop().remove_writer(inbox)

    def _close(self, number: int, connection: socket.socket) -> None:
        self._waiting[number].pop(connection).free()
        connection.close()

    def _receive(self, take: Callable[[socket.socket], None]) -> None:
        for _ in range(RECEIVE_BATCH):
            try:
                _, descriptors, _, _ = socket.recv_fds(self.inboxes[self.number][0], 1, 1)
            except BlockingIOError:
                return
            for descriptor in descriptors:  # empty when out of file descriptors
                take(socket.socket(fileno=descriptor))


def make_inboxes(count: int) -> tuple[Inbox, ...]:
    """Return the inboxes of ``count`` workers; call this before the fork."""
    inboxes = tuple(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count))
    for inbox in inboxes:
        for end in inbox:
            end.setblocking(False)
    return inboxes
