"""The two diagrams of the join, written down plainly: one handler, from the first arrow to the last.

What a competent engineer makes of the diagrams in an afternoon: a pool for RDS, a pool for Redis, an ``await`` for each
arrow. The same answers and the same keys as lesson-server's. It has what the diagrams have and no more: no statechart,
no bounds on what a client may send, nothing given back when a join fails or a client leaves, no metrics.

From the environment: ``BENCH_DSN`` ``BENCH_REDIS_URL`` ``BENCH_KEY`` ``BENCH_PORT``.
"""

import os
from typing import Any

import aiopg
import jwt
import socketio
from redis import asyncio as aioredis

PORT = int(os.environ["BENCH_PORT"])
KEY = os.environ["BENCH_KEY"]

DAY = 24 * 60 * 60
RETENTION = 7 * DAY

POOL_SIZE = 10


class PlainJoin:
    """The handlers.

    Args:
        sio: the Socket.IO server that they are registered with.
    """

    def __init__(self, sio: socketio.AsyncServer) -> None:
        self._sio = sio
        sio.on("connect", self.connect)
        sio.on("join_lesson", self.join_lesson)

    async def open(self) -> None:
        """Connect to the stores."""
        self._rds = await aiopg.create_pool(os.environ["BENCH_DSN"], maxsize=POOL_SIZE)
        # The usual pool of redis-py raises an error for the 101st join at once; this one lets it wait.
        pool = aioredis.BlockingConnectionPool.from_url(os.environ["BENCH_REDIS_URL"], decode_responses=True)
        self._redis = aioredis.Redis.from_pool(pool)

    async def connect(self, sid: str, environ: dict[str, Any], auth: dict[str, Any] | None) -> None:
        """Keep the handshake for the join."""
        if not auth or auth.get("client") not in ("teacher", "participant") or not auth.get("lesson_id"):
            raise socketio.exceptions.ConnectionRefusedError("the handshake is wrong")
        await self._sio.save_session(sid, {"auth": auth})

    async def join_lesson(self, sid: str, data: object = None) -> dict[str, Any]:
        """Both diagrams."""
        auth = (await self._sio.get_session(sid))["auth"]
        lesson_id = str(auth["lesson_id"])

        # 2. to 4.: check_lesson_exists
        if await self._query("SELECT 1 FROM lessons WHERE id = %s", lesson_id) is None:
            return {"status": "ERROR", "message": f"lesson {lesson_id} not found"}
        identity = None
        if auth.get("access_token"):
            try:
                identity = jwt.decode(
                    auth["access_token"], KEY, algorithms=["HS256"], options={"require": ["exp", "sub", "role"]}
                )
            except jwt.ExpiredSignatureError:
                return {"status": "ERROR", "message": "access token has expired"}
            except jwt.PyJWTError:
                return {"status": "ERROR", "message": "access token is invalid"}
        elif auth["client"] == "teacher":
            return {"status": "ERROR", "message": "access token is required"}
        if identity is not None and auth["client"] == "teacher" and identity["role"] != "teacher":
            return {"status": "ERROR", "message": "only a teacher can join as teacher"}

        # 5. to 9.: the room, the seat, the session
        await self._sio.enter_room(sid, lesson_id)
        (seat,) = await self._query("SELECT seat_count FROM lessons WHERE id = %s", lesson_id)
        session = await self._sio.get_session(sid)
        if seat:
            session["seat"] = seat
        await self._sio.save_session(sid, session)

        # 10. and 11.: the seat map
        seats_key = f"lesson_seat_{lesson_id}"
        if seat and not await self._redis.exists(seats_key):
            await self._redis.hset(seats_key, mapping={str(number): "" for number in range(1, seat + 1)})
            await self._redis.expire(seats_key, RETENTION)

        if identity is None:
            pass  # a guest
        elif auth["client"] == "teacher":
            await self._join_as_teacher(sid, lesson_id, identity["sub"])
        else:
            await self._join_as_participant(sid, lesson_id, identity["sub"], identity["role"])
        return {"status": "SUCCESS", "data": {}}

    async def _join_as_teacher(self, sid: str, lesson_id: str, user_id: str) -> None:
        teachers_key = f"lesson_teacher_{lesson_id}"
        await self._redis.hset(teachers_key, user_id, sid)
        await self._redis.expire(teachers_key, DAY)
        await self._redis.hset(user_id, "lesson_id", lesson_id)
        await self._redis.expire(user_id, RETENTION)

    async def _join_as_participant(self, sid: str, lesson_id: str, client_id: str, role: str) -> None:
        session = await self._sio.get_session(sid)
        session["client_id"] = client_id
        session["role"] = role
        await self._sio.save_session(sid, session)
        if await self._redis.hexists(client_id, "sid"):
            self._report_reconnect(client_id, lesson_id, role)
        await self._redis.hset(client_id, mapping={"sid": sid, "client_id": client_id, "role": role})
        await self._redis.expire(client_id, DAY)
        students_key = f"lesson_student_{lesson_id}"
        await self._redis.hset(students_key, client_id, sid)
        await self._redis.expire(students_key, RETENTION)

    def _report_reconnect(self, client_id: str, lesson_id: str, role: str) -> None:
        """Without a token of Mixpanel nothing is sent, in lesson-server as here."""

    async def _query(self, query: str, lesson_id: str) -> Any:
        async with self._rds.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(query, (lesson_id,))
            return await cursor.fetchone()
