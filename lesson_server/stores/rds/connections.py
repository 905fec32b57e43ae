"""Connections to RDS, which is PostgreSQL, by aiopg. All errors of aiopg and psycopg2 are translated here.

Two sets of connections: those that look up lessons, and one beside them that asks for nothing but an answer, so that
queries which are slow, or hang, never keep readiness and the probes of availability.py from it.
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
from lesson_server.stores.rds.aiopg_patches import mend

# Seconds from our own timeout to that of the server, which ends there what nobody waits for any more. It comes second
# because aiopg logs each query that the server ends as an error of the event loop.
SERVER_PATIENCE = 0.5

# A query and its parameters; None for a query in which "%" stands for itself.
Statement = tuple[str, Mapping[str, str] | None]

# Errors of a statement, or of the data that it met, at which RDS and the connection are well.
STATEMENT_FAULTS = (
    psycopg2.DataError,
    psycopg2.IntegrityError,
    psycopg2.InternalError,
    psycopg2.NotSupportedError,
    psycopg2.ProgrammingError,
)


class StatementFault(StoreUnavailable):
    """RDS answers, but it can't carry out this statement. ``error`` is psycopg2's."""

    def __init__(self, error: psycopg2.Error) -> None:
        super().__init__("RDS", cause_of(error))
        self.error = error


class Rds:
    """The connections to RDS and whether it answers.

    Args:
        dsn: libpq connection string or URL.
        timeout: seconds for one query, and for the connection that it may have to open.
        pool_size: connections that are opened for lookups before the first client. The caller bounds how many it uses.
        on_unavailable: called when RDS is known not to answer; see availability.py.

    Raises:
        SettingsError: the DSN is malformed.
    """

    def __init__(self, dsn: str, timeout: float, pool_size: int, on_unavailable: Callable[[], object]) -> None:
        options = parse_dsn(dsn).get("options", "")
        server_timeout = int((timeout + SERVER_PATIENCE) * 1000)
        connect = {
            "dsn": dsn,
            "timeout": None,  # ours is enough
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
            StoreUnavailable: RDS can't be reached or refuses us.
        """
        mend()
        try:
            for connections in (*[self._for_lookups] * self._pool_size, self._for_probes):
                async with asyncio.timeout(self._timeout):
                    await connections.open_one()
        except (psycopg2.Error, OSError) as error:
            raise StoreUnavailable("RDS", cause_of(error)) from error

    async def close(self) -> None:
        """Stop the probes and close the connections. The queries must have ended."""
        await self.availability.close()
        self._for_lookups.close()
        self._for_probes.close()

    async def fetch(self, query: str, parameters: Mapping[str, str] | None) -> list[Any]:
        """Return the rows that a query returns.

        Raises:
            StatementFault: RDS answered that it can't carry it out.
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
        """Asks RDS for nothing but an answer, for readiness.

        Raises:
            StoreUnavailable: there was none.
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
        self._for_lookups.close()  # these may hang, too, as when something in the network has forgotten them
        self.availability.failed(cause)
        return StoreUnavailable("RDS", cause)


class _Connections:
    """Connections that are opened when they are wanted and kept while they are good.

    Not aiopg's pool: it makes all wait while it opens one, hands out those that have died, and never closes one that
    hangs.

    Args:
        connect: the arguments of ``aiopg.connect``.
    """

    def __init__(self, connect: Mapping[str, Any]) -> None:
        self._connect = connect
        self._idle: list[aiopg.Connection] = []

    async def open_one(self) -> None:
        self._idle.append(await aiopg.connect(**self._connect))

    def close(self) -> None:
        """Close those that are not in use. To cancel a query closes its connection, too."""
        while self._idle:
            self._idle.pop().close()

    async def execute(self, query: str, parameters: Mapping[str, str] | None) -> list[Any]:
        """Return the rows that a query returns.

        Connections that have died meanwhile, as all have after a restart of RDS, are replaced unnoticed.
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
            # aiopg raises this when the server cancelled the statement; when we were cancelled ourselves, it goes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise psycopg2.extensions.QueryCanceledError("the server cancelled the statement") from None
        finally:
            if not connection.closed:
                self._idle.append(connection)


def parse_dsn(dsn: str) -> dict[str, str]:
    """Return the parts of a connection string. libpq's own error would quote it, and the password with it."""
    try:
        parts: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
        for port in filter(None, parts.get("port", "").split(",")):
            int(port)
    except (psycopg2.ProgrammingError, ValueError):
        raise SettingsError("rds.dsn (LESSON_RDS_DSN): should be a libpq connection string or URI") from None
    return parts


def cause_of(error: BaseException) -> str:
    """One line for the log. psycopg2's messages name host, user and database, never the password."""
    return " ".join(str(error).split()) or type(error).__name__
