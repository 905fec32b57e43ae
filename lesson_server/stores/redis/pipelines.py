"""Pipelines of commands to one Redis server, with fewer system calls and less Python than redis-py's own."""

import asyncio
import hashlib
from functools import partial
from typing import Any

from hiredis import pack_command
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from lesson_server.stores.redis.store import Command

# A redis-py client. The client of Redis Cluster has the same commands, but no common base class.
Redis = Any


class Pipelines:
    """Sends commands to one Redis server.

    Args:
        client: a redis-py client of this server alone.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client
        # Connections that were taken from the client's pool, and are kept: to take one from the pool and return it
        # would take half as long as a round trip.
        self._idle: list[Any] = []
        self._digests: dict[Any, str] = {}  # script → its SHA-1 digest, for scripts that have been sent

    async def execute(self, commands: list[Command]) -> list[Any]:
        """Send commands as one pipeline, and return the answers, with an exception for each refused command.

        Raises:
            RedisError, OSError: the server failed or was too slow.
        """
        answers = await self._exchange([self._by_digest(command) for command in commands])
        await self._send_scripts(commands, answers)
        return answers

    def _by_digest(self, command: Command) -> Command:
        """Replace a script that has been sent before by its digest: scripts would be most of what a join sends."""
        if command[0] != "EVAL":
            return command
        script = command[1]
        digest = self._digests.get(script)
        if digest is None:
            self._digests[script] = hashlib.sha1(str(script).encode(), usedforsecurity=False).hexdigest()
            return command
        return ("EVALSHA", digest, *command[2:])

    async def _send_scripts(self, commands: list[Command], answers: list[Any]) -> None:
        """Send the scripts whose digests the server did not know, because it has been restarted or replaced."""
        unknown = [position for position, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            found = await self._exchange([commands[position] for position in unknown])
            for position, answer in zip(unknown, found, strict=True):
                answers[position] = answer

    async def _exchange(self, commands: list[Command]) -> list[Any]:
        """Send commands as one pipeline, and return the answers, with an exception for each error."""
        connection = self._idle.pop() if self._idle else await self._client.connection_pool.get_connection()
        try:
            return await connection.retry.call_with_retry(  # type: ignore[no-any-return]
                partial(self._exchange_by, connection, commands), lambda _: connection.disconnect()
            )
        finally:
            self._idle.append(connection)

    async def _exchange_by(self, connection: Any, commands: list[Command]) -> list[Any]:
        await connection.connect()  # only if disconnected; with Sentinel, to the current master
        # One timeout for all answers: redis-py would set one for each answer, and start a task to send. hiredis packs
        # the commands, because redis-py packs them in Python, seven times slower.
        timeout, connection.socket_timeout = connection.socket_timeout, None
        try:
            async with asyncio.timeout(timeout):
                await connection.send_packed_command(b"".join(map(pack_command, commands)))  # type: ignore[arg-type]
                return [await self._answer(connection, command) for command in commands]
        except TimeoutError:
            raise RedisTimeoutError(f"no answer within {timeout} s") from None
        finally:
            connection.socket_timeout = timeout

    async def _answer(self, connection: Any, command: Command) -> Any:
        try:
            return await self._client.parse_response(connection, command[0])
        except ResponseError as error:
            return error
