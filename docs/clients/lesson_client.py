"""A client that stays in its lesson: it joins, joins again after each reconnect, and waits while the server is busy."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import socketio
from socketio.exceptions import SocketIOError

# What may succeed in a moment. Nothing else is tried again.
RETRYABLE = {"the lesson service is busy, try again", "the lesson service is unavailable, try again"}


class Refused(Exception):
    """The server has refused the client, for a reason that a retry does not change."""


async def stay_in_lesson(
    sio: socketio.AsyncClient,
    url: str,
    get_auth: Callable[[], Awaitable[dict[str, Any]]],
    on_joined: Callable[[], Awaitable[None]],
) -> None:
    """Stay in a lesson until the task is cancelled.

    Args:
        sio: the client, made with ``reconnection=False``, because only this function knows what a retry helps.
        url: of the server.
        get_auth: returns the handshake, such as ``{"client": "participant", "lesson_id": 42, "access_token": "…"}``. It
            is called for each connection, so that an access token that has expired is replaced.
        on_joined: is called each time that the client has joined.

    Raises:
        Refused: the handshake or the join is refused.
    """
    reason = ""

    def note_reason(error: object) -> None:
        nonlocal reason
        reason = error["message"] if isinstance(error, dict) and "message" in error else str(error)

    sio.on("connect_error", note_reason)
    attempt = 0
    while True:
        try:
            # --8<-- [start:join]
            await sio.connect(url, auth=await get_auth(), wait_timeout=10)
            answer = await sio.call("join_lesson", timeout=6)  # the server answers within 5 s
            if answer["status"] == "SUCCESS":
                attempt = 0
                await on_joined()
                await sio.wait()  # until the connection ends
            elif answer["message"] not in RETRYABLE:
                raise Refused(answer["message"])
            # --8<-- [end:join]
        # --8<-- [start:retry]
        except SocketIOError:
            # The server has refused the handshake; otherwise it was not reached, or did not answer.
            if sio.failed_namespaces and reason not in RETRYABLE:
                raise Refused(reason) from None
        finally:
            await sio.disconnect()
        # By chance, so that the clients of a class don't all come back in the same moment.
        await asyncio.sleep(random.uniform(0, min(2 * 2**attempt, 30)))
        attempt += 1
        # --8<-- [end:retry]
