"""Redis: the sessions of people who have logged in to the console, so that a logout holds on every node."""

import hashlib
import secrets

from lesson_server.stores.redis import keys
from lesson_server.stores.redis.store import Store

# Seconds until a session ends.
SESSION_LIFE = 12 * 60 * 60


class ConsoleSessions:
    """The sessions of the console.

    Redis holds a digest of each session's id, so that reading Redis does not give the session away.

    Args:
        store: the connection to Redis.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self) -> str:
        """Begin a session, and return its id.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        session = secrets.token_urlsafe(24)
        await self._store.execute(("SET", self._key(session), "", "EX", SESSION_LIFE))
        return session

    async def is_valid(self, session: str) -> bool:
        """Return whether a session has begun, and has not ended.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        (found,) = await self._store.execute(("EXISTS", self._key(session)))
        return bool(found)

    async def end(self, session: str) -> None:
        """End a session.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        await self._store.execute(("DEL", self._key(session)))

    def _key(self, session: str) -> str:
        return self._store.key(keys.console_session(hashlib.sha256(session.encode()).hexdigest()))
