"""Requests of Engine.IO that several tests send."""

import pytest
from raw_client import SECRET, UPGRADE_HEADERS, websocket_query

short_timeouts = pytest.mark.usefixtures("short_timeouts")

FOREIGN = "https://elsewhere.example"

WEBSOCKET = websocket_query()


def handshake(url: str, *headers: str) -> bytes:
    """The head of a request for a websocket."""
    lines = [f"GET {url} HTTP/1.1", *(f"{name}: {value}" for name, value in UPGRADE_HEADERS.items()), *headers]
    return "\r\n".join([*lines, "", ""]).encode()


HOST = b"Host: here.example\r\n"

GET = b"GET /socket.io/?access_token=" + SECRET.encode() + b" HTTP/1.1\r\n"

POST = GET.replace(b"GET", b"POST") + HOST
