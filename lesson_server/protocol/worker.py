"""One of several workers, and how workers pass connections to each other.

With ``--workers N`` any worker may accept a request of an Engine.IO socket. The id of the socket begins with the number
of its worker. A worker that accepts a request for another worker passes the connection on, with nothing read from it.

Each worker has an inbox, a pair of unix sockets that is made before the fork. So the inbox of a worker that has died
keeps what is passed to it for the worker that takes its place. An inbox has room for some hundred connections; the
others wait for room where they were accepted.
"""

import asyncio
import logging
import re
import socket
from collections.abc import Callable
from functools import partial

from lesson_server.protocol.places import Place

logger = logging.getLogger(__name__)

# Sockets that are received in one turn of the event loop.
RECEIVE_BATCH = 8

# A request of Engine.IO, up to the number of the worker in the id of its Engine.IO socket.
REQUEST = re.compile(rb"[A-Z]+ /socket\.io/?\?(?:[^ ]*&)?sid=(\d{1,5})\.")

Inbox = tuple[socket.socket, socket.socket]  # to read from, and to write to


class Worker:
    """One of several workers.

    Args:
        number: which one, from 0 on. A worker that takes the place of one that has died has its number.
        inboxes: those of all workers, by number.
    """

    def __init__(self, number: int, inboxes: tuple[Inbox, ...]) -> None:
        self.number = number
        self.inboxes = inboxes
        # The connections that wait for room in the inbox of each worker, in the order of their arrival.
        self._waiting: tuple[dict[socket.socket, Place], ...] = tuple({} for _ in inboxes)

    def sid(self, sid: str) -> str:
        """Return the id of an Engine.IO socket of this worker."""
        return f"{self.number}.{sid}"

    def other(self, head: bytes) -> int | None:
        """Return the worker that has the Engine.IO socket of a request, if that is another one.

        Args:
            head: the beginning of the request.
        """
        request = REQUEST.match(head)
        number = self.number if request is None else int(request[1])
        return number if number != self.number and number < len(self.inboxes) else None

    def send(self, number: int, connection: socket.socket, place: Place) -> None:
        """Pass a connection to another worker, and close it here. While its inbox is full, the connection waits.

        Args:
            number: that of the other worker.
            connection: nothing has been read from it.
            place: that of the connection, which it keeps until it is passed on.
        """
        waiting = self._waiting[number]
        waiting[connection] = place
        place.hand_over(partial(self._part_with, number, connection))
        if len(waiting) == 1:
            self._send(number)

    def receive(self, take: Callable[[socket.socket], None]) -> None:
        """Call ``take`` with each connection that is passed to this worker, until :meth:`stop`."""
        asyncio.get_running_loop().add_reader(self.inboxes[self.number][0], self._receive, take)

    def stop(self) -> None:
        """Receive nothing any more, and close the connections that wait to be passed on."""
        asyncio.get_running_loop().remove_reader(self.inboxes[self.number][0])
        for number, waiting in enumerate(self._waiting):
            for connection in list(waiting):
                self._part_with(number, connection)

    def _send(self, number: int) -> None:
        inbox, waiting = self.inboxes[number][1], self._waiting[number]
        for connection in list(waiting):
            try:
                socket.send_fds(inbox, [b"."], [connection.fileno()])
            except BlockingIOError:
                asyncio.get_running_loop().add_writer(inbox, self._send, number)
                return
            except OSError as error:  # more connections are on their way between processes than the system allows
                logger.error("can't pass a request to worker %d: %s", number, error.strerror)
            self._part_with(number, connection)
        asyncio.get_running_loop().remove_writer(inbox)

    def _part_with(self, number: int, connection: socket.socket) -> None:
        self._waiting[number].pop(connection).leave()
        connection.close()

    def _receive(self, take: Callable[[socket.socket], None]) -> None:
        for _ in range(RECEIVE_BATCH):
            try:
                _, descriptors, _, _ = socket.recv_fds(self.inboxes[self.number][0], 1, 1)
            except BlockingIOError:
                return
            for descriptor in descriptors:  # none when there is no room for one more open file
                take(socket.socket(fileno=descriptor))


def make_inboxes(count: int) -> tuple[Inbox, ...]:
    """Return the inboxes of that many workers; made before the fork."""
    inboxes = tuple(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count))
    for inbox in inboxes:
        for end in inbox:
            end.setblocking(False)
    return inboxes
