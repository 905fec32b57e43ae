"""The handshake of a websocket: the checks of the request, and the response that refuses it."""

import base64
from http import HTTPStatus

from picows import WSUpgradeRequest, WSUpgradeResponse, WSUpgradeResponseWithListener

from lesson_server.protocol.engine_packets import RequestRefused

# Bytes of a decoded ``Sec-WebSocket-Key`` (RFC 6455).
KEY_SIZE = 16


def check_request(request: WSUpgradeRequest) -> None:
    """Check the headers of a handshake, and reduce ``Connection`` to the one option that picows allows.

    Source: RFC 6455, section 4.2.

    Raises:
        RequestRefused: the handshake is refused.
    """
    options = ",".join(request.headers.getall("Connection", [])).lower().split(",")
    if "upgrade" not in map(str.strip, options) or not _is_key(request.headers.get("Sec-WebSocket-Key", "")):
        raise RequestRefused(3, "Bad request")
    if request.headers.get("Sec-WebSocket-Version") != "13":
        raise RequestRefused(3, "Unsupported websocket version", 426)
    request.headers["Connection"] = "Upgrade"  # Firefox sends a second option


def refuse(refusal: RequestRefused) -> WSUpgradeResponseWithListener:
    """Return the response to a refused handshake."""
    headers = {"Content-Type": "application/json", "Content-Length": str(len(refusal.body))}
    if refusal.status == HTTPStatus.UPGRADE_REQUIRED:
        headers["Sec-WebSocket-Version"] = "13"
    return WSUpgradeResponseWithListener(
        WSUpgradeResponse.create_error_response(refusal.status, refusal.body, headers), None
    )


def _is_key(key: str) -> bool:
    """Return whether ``key`` is the base64 of 16 bytes.

    picows would check this only after the Engine.IO socket has been opened.
    """
    try:
        return len(base64.b64decode(key, validate=True)) == KEY_SIZE
    except ValueError:
        return False
