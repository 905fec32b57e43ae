"""The server: builds everything from the settings, runs it, stops it. The only place where all objects meet."""

import asyncio
import logging
import socket

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from lesson_server.analytics import make_analytics
from lesson_server.connection import Services
from lesson_server.engine import EngineHandler
from lesson_server.gateway import Gateway
from lesson_server.identity import Identities
from lesson_server.lessons import Lessons
from lesson_server.metrics import ConnectionsCollector, Metrics
from lesson_server.presence import Presence
from lesson_server.redis_store import RedisStore
from lesson_server.seats import Seats
from lesson_server.sessions import HANDSHAKE_TIMEOUT, MAX_MESSAGE_SIZE
from lesson_server.settings import Settings
from lesson_server.transport import SocketServer
from lesson_server.web import HealthHandler, MetricsHandler, NotFoundHandler, Readiness, ReadyHandler

logger = logging.getLogger(__name__)

# Connections that the kernel holds ready while the server is busy: a school connects on the hour.
BACKLOG = 4096
# Bytes read at once, and held unread for one connection. Four messages of the largest size.
READ_CHUNK_SIZE = 4 * 1024
READ_BUFFER_SIZE = 4 * MAX_MESSAGE_SIZE
# Connections ended at the same time when the server stops: their presence goes through one pool.
STOP_BATCH = 100
# Seconds at the end for the last events to reach Mixpanel.
ANALYTICS_DEADLINE = 3.0


def make_http_server(application: Application) -> HTTPServer:
    """The HTTP server, with a bound on all that a client may send or leave unsaid."""
    return HTTPServer(
        application,
        max_header_size=MAX_MESSAGE_SIZE,
        max_body_size=MAX_MESSAGE_SIZE,
        max_buffer_size=READ_BUFFER_SIZE,
        chunk_size=READ_CHUNK_SIZE,
        # A client that connects and says nothing, or says it by the byte. Node's default for the first is 5 s.
        idle_connection_timeout=HANDSHAKE_TIMEOUT,
        body_timeout=HANDSHAKE_TIMEOUT,
    )


class LessonServer:
    """A lesson server in this process.

    Args:
        settings: with both stores and the key set.

    Raises:
        SettingsError: the key does not fit the algorithm.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.rds.dsn is not None
        assert settings.redis.url is not None
        self._settings = settings
        self._metrics = Metrics()
        self._analytics = make_analytics(settings.mixpanel, self._metrics.observe_mixpanel)
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
        self._presence = Presence(self._redis, settings.presence.retention)
        self._sio = SocketServer(allowed_origins=settings.server.allowed_origins)
        identities = Identities(settings.auth)
        if identities.weak:
            logger.warning("auth.key is shorter than %s wants: tokens are easier to forge", settings.auth.algorithm)
        self.gateway = Gateway(
            self._sio,
            Services(
                sockets=self._sio,
                lessons=self._lessons,
                seats=Seats(self._redis, settings.presence.retention),
                presence=self._presence,
                identities=identities,
                analytics=self._analytics,
                metrics=self._metrics,
                trust_teacher_user_id=settings.auth.trust_teacher_user_id,
            ),
        )
        self._metrics.registry.register(ConnectionsCollector(self.gateway.occupied_states, self.gateway.all_states))
        self._http = make_http_server(self.application())
        self._sockets: list[socket.socket] = []

    def application(self) -> Application:
        """The HTTP routes."""
        readiness = Readiness({"RDS": self._lessons.ping, "Redis": self._redis.ping})
        return Application(
            [
                (r"/socket\.io/", EngineHandler, {"engine": self._sio.eio}),
                (r"/healthz", HealthHandler),
                (r"/readyz", ReadyHandler, {"readiness": readiness}),
                (r"/metrics", MetricsHandler, {"registry": self._metrics.registry}),
            ],
            default_handler_class=NotFoundHandler,
            log_function=lambda handler: None,  # an access log would hold what clients put into URLs
        )

    @property
    def url(self) -> str:
        """Where the server listens."""
        host = self._settings.server.host
        port = self._sockets[0].getsockname()[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def start(self) -> None:
        """Opens the stores, then the port.

        Raises:
            StoreUnavailable: RDS or Redis can't be reached.
            OSError: the port is taken.
        """
        await self._lessons.open()
        await self._redis.ping()
        self._sockets = bind_sockets(self._settings.server.port, self._settings.server.host, backlog=BACKLOG)
        self._analytics.start()
        self._http.add_sockets(self._sockets)

    async def stop(self) -> None:
        """Stops accepting, ends every connection with its presence, sends the last events, closes the stores."""
        self._http.stop()
        sessions = list(self._sio.eio.sockets.values())
        for start in range(0, len(sessions), STOP_BATCH):
            batch = sessions[start : start + STOP_BATCH]
            await asyncio.gather(*(session.close(self._sio.reason.SERVER_DISCONNECT) for session in batch))
        await asyncio.to_thread(self._analytics.close, ANALYTICS_DEADLINE)
        await self._presence.close()
        await self._redis.close()
        await self._lessons.close()
        await self._http.close_all_connections()
