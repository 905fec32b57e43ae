"""The transports of an Engine.IO socket: polling, a websocket, and the upgrade from polling to a websocket.

polling.py serves the HTTP requests of polling, websocket.py the frames of websockets.
"""

import asyncio
from functools import partial
from typing import Protocol

from lesson_server.protocol import limits
from lesson_server.protocol.engine_packets import (
    CLOSE,
    MAX_PACKETS_IN_PAYLOAD,
    NOOP,
    PING,
    PONG,
    UPGRADE,
    ProtocolError,
    encode_payload,
)


class PollingTransport:
    """The polling transport of an Engine.IO socket.

    Args:
        outbox: the queued packets of the Engine.IO socket; a poll takes the first of them.

    Attributes:
        request: the HTTP request of the pending poll, or None.
        is_paused: whether the websocket of an upgrade has been probed. Then the client pauses polling.
    """

    __slots__ = ("_outbox", "_pending", "is_paused", "request")

    def __init__(self, outbox: list[str | bytes]) -> None:
        self._outbox = outbox
        self._pending: asyncio.Future[None] | None = None  # the pending poll
        self.request: object = None
        self.is_paused = False

    async def poll(self, request: object) -> str:
        """Wait until there are packets to send, and return them as one payload.

        Raises:
            ProtocolError: another poll is pending.
        """
        if self._pending is not None:
            raise ProtocolError("two polls at once")
        if self.is_paused:
            return NOOP  # the client waits for this last response
        if not self._outbox:
            self._pending = asyncio.get_running_loop().create_future()
            self.request = request
            await self._pending
            self._pending = self.request = None
        return self._take_payload()

    def answer(self) -> None:
        """Let the pending poll, if there is one, return the queued packets."""
        if self._pending is not None and not self._pending.done():
            self._pending.set_result(None)

    def pause(self) -> None:
        """Answer the pending poll, and every further poll at once."""
        self.is_paused = True
        self.answer()

    def close(self) -> list[str]:
        """Answer the pending poll, if there is one, and return the payloads for the next polls."""
        final_payloads = []
        while self._outbox:
            final_payloads.append(self._take_payload())
        # CLOSE gets a payload of its own: the JavaScript client would handle it before a message in the same payload.
        final_payloads.append(CLOSE)
        if self._pending is not None:
            self._outbox.append(final_payloads.pop(0))
            self.answer()
        return final_payloads

    def _take_payload(self) -> str:
        payload = encode_payload(self._outbox[:MAX_PACKETS_IN_PAYLOAD])
        del self._outbox[:MAX_PACKETS_IN_PAYLOAD]
        return payload


class WebsocketTransport(Protocol):
    """A websocket, as its Engine.IO socket uses it.

    Attributes:
        is_writable: whether the kernel accepts data. When it does so again, ``EngineSocket.flush`` is called.
    """

    is_writable: bool

    def keep(self) -> None: ...
    def write(self, packet: str | bytes) -> None: ...
    def disconnect(self, *, abort: bool) -> None: ...


class Upgrade:
    """An upgrade under way: after a timeout, the websocket is closed, and polling continues.

    Args:
        polling: the transport of the Engine.IO socket.
        websocket: the websocket that is to replace polling.
    """

    __slots__ = ("_polling", "_timer", "websocket")

    def __init__(self, polling: PollingTransport, websocket: WebsocketTransport) -> None:
        self._polling = polling
        self.websocket = websocket
        expire = partial(websocket.disconnect, abort=True)
        self._timer = asyncio.get_running_loop().call_later(limits.HANDSHAKE_TIMEOUT, expire)

    def receive(self, packet: str | bytes) -> bool:
        """Handle a packet from the websocket: first the probe, then UPGRADE.

        Returns:
            whether the client has completed the upgrade.

        Raises:
            ProtocolError: any other packet.
        """
        if packet == PING + "probe" and not self._polling.is_paused:
            self.websocket.write(PONG + "probe")
            self._polling.pause()
            return False
        if packet == UPGRADE and self._polling.is_paused:
            self._timer.cancel()  # it references the websocket
            return True
        raise ProtocolError("not an upgrade")

    def cancel(self) -> None:
        """Continue with polling, because the websocket is lost."""
        self._polling.is_paused = False
        self._timer.cancel()  # it references the websocket
