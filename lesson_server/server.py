"""The composition root: builds all objects of the server from the settings, starts them and stops them."""

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tornado.ioloop import PeriodicCallback
from tornado.netutil import bind_sockets

from lesson_server.analytics import make_analytics
from lesson_server.errors import OUR_FAULTS, HandshakeRefused, ServiceBusy
from lesson_server.events.event import Event
from lesson_server.events.registry import EVENTS, SERVER_EVENTS
from lesson_server.events.services import Services
from lesson_server.gateway.admission import Admission
from lesson_server.gateway.handlers import SUCCESS, Gateway
from lesson_server.gateway.removal import Removal
from lesson_server.gateway.tracing import Tracing
from lesson_server.http.access import Access, is_loopback
from lesson_server.http.asyncapi import document
from lesson_server.http.figures import Figures
from lesson_server.http.pages import Readiness
from lesson_server.http.routes import Admin, routes
from lesson_server.http.watch import Watch
from lesson_server.log import EventLogger
from lesson_server.metrics import Metrics
from lesson_server.protocol.rooms import Rooms
from lesson_server.protocol.server import EXTRA_SOCKETS, ProtocolServer
from lesson_server.protocol.worker import Worker
from lesson_server.sampler import Sampler
from lesson_server.settings.schema import Settings
from lesson_server.stores.rds.lesson_admin import list_lessons
from lesson_server.stores.rds.lessons import Lessons
from lesson_server.stores.redis.claims import Claims
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.console_sessions import ConsoleSessions
from lesson_server.stores.redis.messages import Messages
from lesson_server.stores.redis.nodes import Node
from lesson_server.stores.redis.presence import Presence
from lesson_server.stores.redis.removals import Removals
from lesson_server.stores.redis.roster import Roster
from lesson_server.stores.redis.seat_sweeper import SeatSweeper
from lesson_server.stores.redis.seats import Seats
from lesson_server.stores.redis.subscription import Subscription
from lesson_server.tokens import TokenVerifier

if TYPE_CHECKING:
    from lesson_server.gateway.spans import Spans

logger = EventLogger(__name__)

# Connections that the kernel queues while the server is busy: a whole school connects on the hour.
BACKLOG = 4096
# Open files other than client connections and the stores' connections.
OTHER_FILES = 100
# Seconds between two updates of a worker's connection counts; any worker may export the sum over all workers.
COUNT_INTERVAL = 1.0
# Seconds at the stop for pending removals of presence, and for sending the last events to Mixpanel and the last spans.
PRESENCE_DEADLINE = 2.0
ANALYTICS_DEADLINE = 3.0
SPANS_DEADLINE = 2.0


def open_port(settings: Settings) -> list[socket.socket]:
    """Return the listening sockets of ``server.host`` and ``server.port``.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    host, port = settings.server.host, settings.server.port
    try:
        return bind_sockets(port, host, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"can't listen on {host}:{port}: {error.strerror}") from None


def url_of(settings: Settings, sockets: list[socket.socket]) -> str:
    """Return the URL of a server that listens on these sockets."""
    host, port = settings.server.host, sockets[0].getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _max_connections(settings: Settings) -> int:
    """Return how many connections may be held: ``server.max_connections``, or what the limit of open files allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = files - settings.rds.pool_size - settings.redis.pool_size - EXTRA_SOCKETS - OTHER_FILES
    return max(min(room, settings.server.max_connections), 1)


def _make_spans() -> "Spans | None":
    """Return the spans of OpenTelemetry, if its standard variable asks for them."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    try:
        from lesson_server.gateway.spans import Spans
    except ModuleNotFoundError as error:
        logger.warning(
            "otel_not_installed",
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, and no spans are sent: pip install 'lesson-server[otel]' ({cause})",
            cause=str(error),
        )
        return None
    return Spans()


class LessonServer:
    """A lesson server in this process.

    Args:
        settings: with both stores and the key set.
        worker: this process among several workers; None for a single process.
        events: the events that clients may send.
        is_embedded: whether the stores are those of the embedded set-up.

    Raises:
        SettingsError: the key does not fit the algorithm.
    """

    def __init__(
        self,
        settings: Settings,
        worker: Worker | None = None,
        events: Sequence[Event] = EVENTS,
        *,
        is_embedded: bool = False,
    ) -> None:
        assert settings.rds.dsn is not None
        assert settings.redis.url is not None
        self._settings = settings
        self._worker = worker
        self._metrics = Metrics()
        self._analytics = make_analytics(settings.mixpanel, self._metrics.observe_mixpanel)
        self._spans = _make_spans()
        self._lessons = Lessons(
            settings.rds.dsn.get_secret_value(),
            settings.rds.lesson_query,
            settings.rds.timeout,
            settings.rds.pool_size,
        )
        self._redis = RedisStore(
            settings.redis.url.get_secret_value(),
            settings.redis.key_prefix,
            settings.redis.timeout,
            settings.redis.pool_size,
        )
        seats = Seats(self._redis, settings.presence.retention, settings.seats.grace, self._metrics.observe_seat)
        self._sweeper = SeatSweeper(seats, self._metrics.seat_sweep_seconds.observe)
        claims = Claims(self._redis, settings.presence.retention, seats)
        self._removals = Removals(self._redis, claims)
        self._presence = Presence(self._redis, claims, self._removals)
        self._subscription = Subscription(self._redis)
        messages = Messages(self._subscription)
        self._rooms = Rooms(self._subscription)
        self._readiness = Readiness(
            {"RDS": self._lessons.ping, "Redis": self._redis.ping, "rooms": self._subscription.ping}
        )
        self._protocol = ProtocolServer(
            self._rooms,
            max_connections=_max_connections(settings),
            allowed_origins=settings.server.allowed_origins,
            worker=worker,
            observe_drop=self._metrics.observe_drop,
        )
        sio = self._protocol.sio
        tokens = TokenVerifier(settings.auth)
        if tokens.weak:
            logger.warning(
                "auth_key_short",
                "auth.key is shorter than {algorithm} wants: tokens are easier to forge",
                algorithm=settings.auth.algorithm,
            )
        self.gateway = Gateway(
            sio,
            Services(
                sockets=sio,
                lessons=self._lessons,
                seats=seats,
                presence=self._presence,
                tokens=tokens,
                analytics=self._analytics,
                metrics=self._metrics,
                trust_teacher_user_id=settings.auth.trust_teacher_user_id,
            ),
            Admission(
                _max_connections(settings),
                settings.server.connect_rate,
                {event.name: event.rate(settings.server) for event in events},
            ),
            events,
            self._spans,
        )
        self._node = Node(
            self._redis,
            self._presence,
            seats,
            self.gateway,
            self._metrics.nodes_lost.inc,
            self._metrics.observe_correction,
        )
        roster = Roster(self._redis, self.gateway.is_busy)
        stores = {"RDS": lambda: self._lessons.status, "Redis": lambda: self._redis.status}
        self._sampler = Sampler(self._metrics, self._readiness.silent, stores, lambda: self._node.alive)
        self._figures = Figures(
            self.gateway,
            self._metrics,
            {**stores, "Mixpanel": lambda: self._analytics.status},
            lambda: claims.incarnation.node_id,
            messages,
        )
        self._watch = Watch(roster, self._figures, messages)
        self._tracing = Tracing(self.gateway, messages)
        self._removal = Removal(self.gateway, roster, claims, seats, messages)
        token = settings.admin.token
        admin = Admin(
            access=Access(
                None if token is None else token.get_secret_value(),
                is_embedded and is_loopback(settings.server.host),
                ConsoleSessions(self._redis),
            ),
            roster=roster,
            removal=self._removal,
            watch=self._watch,
            tracing=self._tracing,
            tokens=tokens,
            list_lessons=self._list_lessons,
            events=events,
        )
        asyncapi = document(events, SERVER_EVENTS)
        self._protocol.add_pages(routes(self._readiness, self._metrics_text, admin, asyncapi))
        self._subscription.on_subscribed = self._node.check_all
        self._sockets: list[socket.socket] = []
        self._metrics.connections_limit.set(_max_connections(settings))
        self._metrics.begin_at_zero(
            [(event.name, client) for event in events for client in event.regions],
            [SUCCESS, *(refusal.outcome for refusal in OUR_FAULTS)],
            [HandshakeRefused.outcome, ServiceBusy.outcome],
        )
        # Periodic, because another worker may have to export the sum.
        self._counting = PeriodicCallback(self._count_connections, COUNT_INTERVAL * 1000)

    def _count_connections(self) -> None:
        self._metrics.count_connections(self.gateway.count_states())

    async def _list_lessons(self) -> list[str]:
        assert self._settings.rds.dsn is not None
        lessons = await asyncio.to_thread(list_lessons, self._settings.rds.dsn.get_secret_value())
        return [lesson_id for lesson_id, *_ in lessons]

    def _metrics_text(self) -> bytes:
        self._count_connections()
        return self._metrics.text()

    @property
    def url(self) -> str:
        """The URL that the server listens on."""
        return url_of(self._settings, self._sockets)

    async def start(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the stores, then the port.

        Args:
            sockets: the listening sockets, if a parent process has opened the port.

        Raises:
            StoreUnavailable: RDS or Redis can't be reached.
            OSError: the port is taken.
        """
        await self._lessons.open()
        await self._node.start()
        self._sockets = sockets or open_port(self._settings)
        self._analytics.start()
        self._subscription.start()
        self._sweeper.start()
        self._figures.start()
        self._sampler.start()
        self._protocol.start(self._sockets)
        if self._worker is not None:
            self._counting.start()

    async def drain(self) -> None:
        """Report the server as not ready, and end the sessions over ``server.drain`` seconds.

        May be cancelled, to stop at once.
        """
        self._readiness.close()
        await self._protocol.drain(self._settings.server.drain)

    async def stop(self) -> None:
        """End every connection and its presence, send the last events, and close the stores.

        Bounded in time: presence that could not be removed from Redis is left for other nodes to sweep.
        """
        self._counting.stop()
        await self._sampler.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PRESENCE_DEADLINE):
                await self._protocol.stop()
                await self._removals.settled()
        await asyncio.to_thread(self._analytics.close, ANALYTICS_DEADLINE)
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close, SPANS_DEADLINE)
        await self._node.close()
        await self._sweeper.close()
        await self._removal.close()
        await self._watch.close()
        await self._tracing.close()
        await self._figures.close()
        await self._rooms.close()
        await self._subscription.close()
        await self._removals.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PRESENCE_DEADLINE):
                await self._redis.close()
        await self._lessons.close()
