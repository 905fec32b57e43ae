"""Connections to RDS (PostgreSQL) by aiopg.

All errors of aiopg and psycopg2 are translated here. There are two sets of connections: one for lookups of lessons, and
one for readiness and the probes of availability.py, so that slow or hanging queries never block these two.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import aiopg
import psycopg2
import psycopg2.extensions

from lesson_server.errors import StoreUnavailable
from lesson_server.settings.schema import SettingsError
from lesson_server.stores.availability import Availability
from lesson_server.stores.rds import aiopg_patches

# Seconds from our own timeout to the statement_timeout of the server, which ends a query that no caller waits for any
# more. The server's timeout is later because aiopg logs each query that the server ends as an error of the event loop.
SERVER_PATIENCE = 0.5

# A query and its parameters. None: "%" has no special meaning in the query.
Statement = tuple[str, Mapping[str, str] | None]

# Errors of a statement, or of the data that it reads. RDS and the connection work.
STATEMENT_FAULTS = (
    psycopg2.DataError,
    psycopg2.IntegrityError,
    psycopg2.InternalError,
    psycopg2.NotSupportedError,
    psycopg2.ProgrammingError,
)


class StatementFault(StoreUnavailable):
    """RDS answers, but can't execute this statement.

    ``error`` is the error of psycopg2.
    """

    def __init__(self, error: psycopg2.Error) -> None:
        super().__init__("RDS", cause_of(error))
        self.error = error


class Rds:
    """The connections to RDS, and its availability.

    Args:
        dsn: libpq connection string or URL.
        timeout: seconds for one query, including the time to open a connection if none is idle.
        pool_size: number of lookup connections that :meth:`open` opens. The caller limits how many are in use.
        on_unavailable: called when RDS becomes unavailable; see availability.py.

    Raises:
        SettingsError: the DSN is malformed.
    """

    def __init__(self, dsn: str, timeout: float, pool_size: int, on_unavailable: Callable[[], object]) -> None:
        options = parse_dsn(dsn).get("options", "")
        server_timeout = int((timeout + SERVER_PATIENCE) * 1000)
        connect = {
            "dsn": dsn,
            "timeout": None,  # the timeouts of this class are enough
            "enable_hstore": False,  # saves a query on each new connection
            "options": f"{options} -c statement_timeout={server_timeout}",
        }
        self._timeout = timeout
        self._pool_size = pool_size
        self._for_lookups = _Connections(connect)
        self._for_probes = _Connections(connect)
        self.availability = Availability("RDS", self._probe, on_unavailable)

    async def open(self) -> None:
        """Open the connections.

        Raises:
            StoreUnavailable: RDS can't be reached or refuses the connection.
        """
        aiopg_patches.apply()
        try:
            for connections in (*[self._for_lookups] * self._pool_size, self._for_probes):
                async with asyncio.timeout(self._timeout):
                    await connections.open_one()
        except (psycopg2.Error, OSError) as error:
            raise StoreUnavailable("RDS", cause_of(error)) from error

    async def close(self) -> None:
        """Stop the probes and close the connections, after all queries have ended."""
        await self.availability.close()
        self._for_lookups.close()
        self._for_probes.close()

    async def fetch(self, query: str, parameters: Mapping[str, str] | None) -> list[Any]:
        """Run a query and return its rows.

        Raises:
            StatementFault: RDS answered that it can't execute the query.
            StoreUnavailable: RDS failed or was too slow.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await self._for_lookups.execute(query, parameters)
        except STATEMENT_FAULTS as error:
            raise StatementFault(error) from error
        except (psycopg2.Error, OSError) as error:
            raise self._failed(cause_of(error)) from error

    async def ping(self) -> None:
        """Check that RDS answers, for readiness.

        Raises:
            StoreUnavailable: RDS did not answer.
        """
        self.availability.require()
        try:
            async with asyncio.timeout(self._timeout):
                await self._probe()
        except (psycopg2.Error, OSError) as error:
            raise self._failed(cause_of(error)) from error

    async def _probe(self) -> None:
        await self._for_probes.execute("SELECT 1", None)

    def _failed(self, cause: str) -> StoreUnavailable:
        self._for_lookups.close()  # idle connections may hang too, e.g. if the network has dropped them
        self.availability.failed(cause)
        return StoreUnavailable("RDS", cause)


class _Connections:
    """Connections that are opened on demand and kept while they work.

    aiopg's pool is not used: it blocks all callers while it opens a connection, hands out dead connections, and never
    closes a hanging connection.

    Args:
        connect: the arguments of ``aiopg.connect``.
    """

    def __init__(self, connect: Mapping[str, Any]) -> None:
        self._connect = connect
        self._idle: list[aiopg.Connection] = []

    async def open_one(self) -> None:
        self._idle.append(await aiopg.connect(**self._connect))

    def close(self) -> None:
        """Close the idle connections; a connection in use is closed by cancelling its query."""
        while self._idle:
            self._idle.pop().close()

    async def execute(self, query: str, parameters: Mapping[str, str] | None) -> list[Any]:
        """Run a query and return its rows.

        Dead connections, as all are after a restart of RDS, are replaced without an error.
        """
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._execute_by(connection, query, parameters)
            except psycopg2.Error:
                if not connection.closed:
                    raise
        return await self._execute_by(await aiopg.connect(**self._connect), query, parameters)

    async def _execute_by(
        self, connection: aiopg.Connection, query: str, parameters: Mapping[str, str] | None
    ) -> list[Any]:
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(query, parameters)
                return list(await cursor.fetchall())
        except asyncio.CancelledError:
            # aiopg raises this also when the server cancelled the statement. Only our own cancellation is propagated.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise psycopg2.extensions.QueryCanceledError("the server cancelled the statement") from None
        finally:
            if not connection.closed:
                self._idle.append(connection)


def parse_dsn(dsn: str) -> dict[str, str]:
    """Return the parts of a connection string.

    libpq's own error is replaced: it would quote the connection string, including the password.
    """
    try:
        parts: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
        for port in filter(None, parts.get("port", "").split(",")):
            int(port)
    except (psycopg2.ProgrammingError, ValueError):
        raise SettingsError("rds.dsn (LESSON_RDS_DSN): should be a libpq connection string or URI") from None
    return parts


def cause_of(error: BaseException) -> str:
    """Return an error as one line for the log.

    psycopg2's messages name host, user and database, never the password.
    """
    return " ".join(str(error).split()) or type(error).__name__
