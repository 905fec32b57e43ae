"""The Socket.IO handlers: a handshake becomes a connection, and join_lesson an acknowledgement.

This is the one error boundary: whatever a step raises ends here, as an answer to the client and, when it is a defect,
as a traceback in the log. A handler that raised would send no acknowledgement, and the client would wait for ever.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from socketio.exceptions import ConnectionRefusedError  # noqa: A004 (the library's, not the builtin)

from lesson_server.errors import (
    HubRefused,
    InvalidTransition,
    LessonIdMalformed,
    LessonIdRequired,
    Refusal,
    StoreUnavailable,
    UnexpectedData,
    UnknownClient,
)
from lesson_server.events.connection import Connection, Credentials, ParticipantConnection, Services, TeacherConnection
from lesson_server.events.machine import LessonMachine
from lesson_server.gateway.admission import Admission
from lesson_server.identity import MAX_TOKEN_LENGTH
from lesson_server.protocol.transport import SocketServer
from lesson_server.stores.rds.lessons import LESSON_ID

logger = logging.getLogger(__name__)

# Seconds for the steps of a join. The contract promises an answer within 5; giving back after a failure takes the rest.
JOIN_DEADLINE = 4.0

Answer = dict[str, Any]
SUCCESS: Answer = {"status": "SUCCESS", "data": {}}

KINDS: dict[object, type[Connection]] = {kind.CLIENT: kind for kind in (TeacherConnection, ParticipantConnection)}


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the ``auth`` object of a connection says, checked as far as the contract checks it at connect."""

    kind: type[Connection]
    lesson_id: str
    credentials: Credentials

    @classmethod
    def parse(cls, auth: object) -> "Handshake":
        """Reads the handshake.

        Source: contract, section 2.

        Raises:
            HandshakeRefused: it is not one.
        """
        fields = auth if isinstance(auth, dict) else {}
        client = fields.get("client")
        if client == "hub":
            raise HubRefused
        if not isinstance(client, str) or client not in KINDS:
            raise UnknownClient
        lesson_id = fields.get("lesson_id")
        if lesson_id is None:
            raise LessonIdRequired
        # JSON's true is an int to Python.
        if isinstance(lesson_id, bool) or not isinstance(lesson_id, str | int):
            raise LessonIdMalformed
        if LESSON_ID.fullmatch(str(lesson_id)) is None:
            raise LessonIdMalformed
        credentials = Credentials(_credential(fields.get("access_token")), _credential(fields.get("user_id")))
        return cls(KINDS[client], str(lesson_id), credentials)


def _credential(value: object) -> str | None:
    """A text of the handshake, or an empty one in place of what can be neither a token nor a subject: the connection
    keeps it, and 16 kB of JSON may be 400 kB of objects."""
    if value is None:
        return None
    return value if isinstance(value, str) and value.isascii() and len(value) <= MAX_TOKEN_LENGTH else ""


class Gateway:
    """Every connection of this process, and the events that reach it.

    Args:
        sio: the Socket.IO server; the handlers are registered with it.
        services: what the connections work with.
        admission: how many connections and joins are taken on.
    """

    def __init__(self, sio: SocketServer, services: Services, admission: Admission) -> None:
        self.connections: dict[str, Connection] = {}
        self._services = services
        self._metrics = services.metrics
        self._machines = {kind: LessonMachine(kind.CHART, self._metrics.observe_step) for kind in KINDS.values()}
        self._joins: dict[str, asyncio.Future[Answer | None]] = {}
        self._admission = admission
        sio.on("connect", self.connect)
        sio.on("join_lesson", self.join_lesson)
        sio.on("disconnect", self.disconnect)

    def occupied_states(self) -> Iterator[tuple[str, str]]:
        """The client and the state of every connection."""
        return ((connection.CLIENT, connection.state) for connection in self.connections.values())

    def all_states(self) -> Iterator[tuple[str, str]]:
        """Each client with each state that a connection can be held in."""
        for kind in KINDS.values():
            yield from ((kind.CLIENT, state) for state in kind.CHART.STATES if state != "disconnected")

    # Handlers. python-socketio tries other signatures when one of these raises TypeError, so none may raise it.

    def connect(self, sid: str, environ: dict[str, Any], auth: object) -> None:
        """Takes a client in, in the state that its chart begins with.

        Raises:
            ConnectionRefusedError: the client gets ``connect_error`` with the message.
        """
        try:
            handshake = Handshake.parse(auth)
            self._admission.admit_connection(len(self.connections))
        except Refusal as refusal:
            raise ConnectionRefusedError(str(refusal)) from None
        kind = handshake.kind
        self.connections[sid] = kind(
            sid, handshake.lesson_id, self._services, self._machines[kind], handshake.credentials
        )

    async def join_lesson(self, sid: str, *data: object) -> Answer | None:
        """Answers one ``join_lesson``; two at once on one connection are one join with two answers.

        Returns:
            the acknowledgement, or None when the client has gone.
        """
        connection = self.connections.get(sid)
        if connection is None:
            return None
        if data not in ((), (None,)):
            return self._refused(connection, UnexpectedData())
        running = self._joins.get(sid)
        if running is not None:
            return await asyncio.shield(running)
        try:
            if connection.state == connection.CHART.INITIAL:  # joining again costs nothing, and is never refused
                self._admission.admit_join()
        except Refusal as refusal:
            return self._refused(connection, refusal)
        running = self._joins[sid] = asyncio.get_running_loop().create_future()
        answer = None
        try:
            answer = await self._join(connection)
        finally:
            del self._joins[sid]
            running.set_result(answer)
        return answer

    async def disconnect(self, sid: str, reason: str) -> None:
        """Ends a connection. What it held is given back even when the client went in the middle of its join."""
        connection = self.connections.pop(sid, None)
        if connection is None:
            return  # its handshake was refused
        await self._give_back(connection, "disconnect")

    # What a node asks of its connections

    def present(self) -> list[str]:
        """The sids of the connections that Redis should tell of."""
        return [sid for sid, connection in self.connections.items() if connection.is_present]

    def seated(self) -> dict[str, str]:
        """The lessons whose seat map should stand in Redis, each with the sid of a connection that is in it."""
        return {connection.lesson_id: sid for sid, connection in self.connections.items() if connection.needs_seat_map}

    async def restore(self, sids: Sequence[str]) -> int:
        """Writes again what these connections hold in Redis.

        Returns:
            how many of them are still there.

        Raises:
            StoreUnavailable: Redis failed or was too slow; some have been restored.
        """
        connections = [self.connections[sid] for sid in sids if sid in self.connections]
        return sum(await asyncio.gather(*map(self._restore, connections)))

    @staticmethod
    async def _restore(connection: Connection) -> bool:
        try:
            return await connection.fire("restore")
        except InvalidTransition:  # it has not joined, or has just ended
            return False

    # The join

    async def _join(self, connection: Connection) -> Answer | None:
        started = time.perf_counter()
        refusal = None
        try:
            async with asyncio.timeout(JOIN_DEADLINE):
                await connection.join()
        except Exception as error:
            refusal = self._refusal_of(connection, error)
            await self._give_back(connection, "abandon")
        self._metrics.join_seconds.labels(connection.CLIENT).observe(time.perf_counter() - started)
        if connection.state == "disconnected":
            self._count(connection, "disconnected")
            return None
        if refusal is not None:
            return self._refused(connection, refusal)
        self._count(connection, "success")
        return SUCCESS

    async def _give_back(self, connection: Connection, trigger: str) -> None:
        """Fires what leads out of a join or a connection. The steps of these raise nothing."""
        with contextlib.suppress(InvalidTransition):  # the connection ended meanwhile, and gave back then
            await connection.fire(trigger)

    def _refusal_of(self, connection: Connection, error: Exception) -> Refusal:
        """What the client is told of an error. A defect is told to the log instead."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, TimeoutError):
            refusal = StoreUnavailable("the stores", f"not done within {JOIN_DEADLINE} s")
            logger.error("join of %r failed: %s", connection, refusal.cause)
            return refusal
        if not (isinstance(error, InvalidTransition) and connection.state == "disconnected"):
            logger.error("join of %r failed", connection, exc_info=error)
        return Refusal()

    def _refused(self, connection: Connection, refusal: Refusal) -> Answer:
        self._count(connection, refusal.outcome)
        return {"status": "ERROR", "message": str(refusal)}

    def _count(self, connection: Connection, outcome: str) -> None:
        self._metrics.joins.labels(connection.CLIENT, outcome).inc()
