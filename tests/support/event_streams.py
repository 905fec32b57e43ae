"""A reader of server-sent events, as a browser is one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import orjson
from waiting import LONG

SILENT = object()  # a comment line


class EventStream:
    """The events of an open stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> tuple[Any, Any]:
        """The next event, as its name and data; (None, None) for a comment line; EOFError at the end."""
        name = data = None
        async with asyncio.timeout(LONG):
            while line := (await self.response.content.readline()).decode():
                field, _, value = line.rstrip("\n").partition(":")
                if not field and value == "" and line.startswith(":"):
                    return None, None
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    data = orjson.loads(value)
                elif not field and name is not None:
                    return name, data
        raise EOFError

    async def event(self) -> tuple[str, Any]:
        """The next event that is no comment line."""
        while True:
            name, data = await self.next()
            if name is not None:
                return name, data

    async def until(self, name: str, condition: Callable[[Any], object] = lambda data: True) -> Any:
        """The data of the next event of that name for which a condition holds."""
        async with asyncio.timeout(LONG):
            while True:
                event, data = await self.next()
                if event == name and condition(data):
                    return data

    async def ended(self) -> list[str]:
        """Waits for the end, and returns the names of the events that came before."""
        names = []
        try:
            async with asyncio.timeout(LONG):
                while True:
                    names.append((await self.next())[0])
        except (EOFError, aiohttp.ClientError):
            return [name for name in names if name is not None]


@contextlib.asynccontextmanager
async def event_stream(
    url: str, headers: Mapping[str, str] | None = None, status: int = 200
) -> AsyncIterator[EventStream]:
    """Opens a stream; its end closes the connection, as a browser does that leaves the page."""
    # A DummyCookieJar: the headers say which cookie is sent.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        response = await session.get(url, headers=headers)
        try:
            assert response.status == status, await response.text()
            if status == 200:
                assert response.headers["Content-Type"] == "text/event-stream"
            yield EventStream(response)
        finally:
            response.close()
