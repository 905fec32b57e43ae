"""The services that the steps of the charts use, as protocols."""

from dataclasses import dataclass
from typing import Any, Protocol

from lesson_server.analytics import Analytics
from lesson_server.metrics import Metrics
from lesson_server.stores.rds.lesson import Lesson
from lesson_server.stores.redis.records import Record
from lesson_server.stores.redis.seats import Taking
from lesson_server.tokens import Identity


class Sockets(Protocol):
    """The Socket.IO server: its rooms and its sessions."""

    async def enter_room(self, sid: str, room: str) -> None: ...
    async def leave_room(self, sid: str, room: str) -> None: ...
    async def get_session(self, sid: str) -> dict[str, Any]: ...
    async def save_session(self, sid: str, session: dict[str, Any]) -> None: ...
    def close_connection(self, sid: str) -> None: ...


class Lessons(Protocol):
    """The lessons in RDS; see :class:`lesson_server.stores.rds.lessons.Lessons`."""

    async def get(self, lesson_id: str) -> Lesson: ...


class Seats(Protocol):
    """The seat maps in Redis; see :class:`lesson_server.stores.redis.seats.Seats`."""

    async def ensure_map(self, lesson_id: str, seat_count: int, client_id: str | None = None) -> int: ...
    async def take(self, lesson_id: str, client_id: str, seat: int | None, seat_count: int) -> tuple[Taking, int]: ...
    async def leave(self, lesson_id: str, client_id: str) -> None: ...
    async def restore(self, lesson_id: str, client_id: str, seat: int) -> int: ...


class Presence(Protocol):
    """The presence in Redis; see :class:`lesson_server.stores.redis.presence.Presence`."""

    async def write(self, record: Record) -> bool: ...
    async def restore(self, record: Record) -> None: ...
    async def remove(self, sid: str, *, undo: bool = False) -> None: ...


class Tokens(Protocol):
    """The check of access tokens; see :class:`lesson_server.tokens.TokenVerifier`."""

    def verify(self, token: object) -> Identity: ...


@dataclass(frozen=True, slots=True)
class Services:
    """The services of one server; the same for all connections."""

    sockets: Sockets
    lessons: Lessons
    seats: Seats
    presence: Presence
    tokens: Tokens
    analytics: Analytics
    metrics: Metrics
    trust_teacher_user_id: bool
