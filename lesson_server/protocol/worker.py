"""One of several workers, and how workers pass sockets to each other.

With ``--workers N`` a request of a session may be accepted by any worker. The id of a session begins with the number of
its worker; who accepts a request of another worker's session passes the socket on, with nothing read from it.

Each worker has an inbox, a pair of unix sockets that is made before the fork. So the inbox of a worker that has died
keeps what is passed to it for the worker that takes its place.
"""

import asyncio
import logging
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Sockets that are received in one turn of the event loop.
RECEIVE_BATCH = 8

# A request of Engine.IO, up to the number of the worker in the id of its session.
REQUEST = re.compile(rb"[A-Z]+ /socket\.io/?\?(?:[^ ]*&)?sid=(\d{1,5})\.")

Inbox = tuple[socket.socket, socket.socket]  # to read from, and to write to


@dataclass(frozen=True)
class Worker:
    """One of several workers.

    Attributes:
        number: which one, from 0 on. A worker that takes the place of one that has died has its number.
        inboxes: those of all workers, by number.
    """

    number: int
    inboxes: tuple[Inbox, ...]

    def sid(self, sid: str) -> str:
        """The id of a session of this worker."""
        return f"{self.number}.{sid}"

    def other(self, head: bytes) -> int | None:
        """The worker that has the session of a request, if that is another one.

        Args:
            head: the beginning of the request.
        """
        request = REQUEST.match(head)
        number = self.number if request is None else int(request[1])
        return number if number != self.number and number < len(self.inboxes) else None

    def send(self, number: int, connection: socket.socket) -> None:
        """Passes a socket to another worker, and closes it here. One that finds no room in the inbox is just closed."""
        try:
            socket.send_fds(self.inboxes[number][1], [b"."], [connection.fileno()])
        except BlockingIOError:
            logger.error("worker %d does not take the requests of its sessions", number)
        connection.close()

    def receive(self, take: Callable[[socket.socket], None]) -> None:
        """Calls ``take`` with each socket that is passed to this worker, until :meth:`stop`."""
        asyncio.get_running_loop().add_reader(self.inboxes[self.number][0], self._receive, take)

    def stop(self) -> None:
        """Receives nothing any more."""
        asyncio.get_running_loop().remove_reader(self.inboxes[self.number][0])

    def _receive(self, take: Callable[[socket.socket], None]) -> None:
        for _ in range(RECEIVE_BATCH):
            try:
                _, descriptors, _, _ = socket.recv_fds(self.inboxes[self.number][0], 1, 1)
            except BlockingIOError:
                return
            for descriptor in descriptors:  # none when there is no room for one more open file
                take(socket.socket(fileno=descriptor))


def make_inboxes(count: int) -> tuple[Inbox, ...]:
    """The inboxes of that many workers; made before the fork."""
    inboxes = tuple(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count))
    for inbox in inboxes:
        for end in inbox:
            end.setblocking(False)
    return inboxes
