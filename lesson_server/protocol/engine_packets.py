"""Engine.IO 4 on the wire: packets, the payloads of polling, and refused requests."""

import base64
from collections.abc import Iterable

import orjson

# Packets in the body of a POST, and in the response of a poll: python-engineio accepts no more, on either side.
MAX_PACKETS_IN_PAYLOAD = 16

# The type of a packet is its first character.
OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP = "0123456"
# Between the packets of a payload.
SEPARATOR = "\x1e"


class ProtocolError(Exception):
    """The client violated the protocol, and its Engine.IO socket ends; in an upgrade, only the websocket ends.

    The text contains nothing that the client sent.
    """


class RequestRefused(Exception):
    """An HTTP request or websocket handshake is refused, with an HTTP status and an error code of Engine.IO."""

    def __init__(self, code: int, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.body = orjson.dumps({"code": code, "message": message})
        self.status = status


def encode_payload(packets: Iterable[str | bytes]) -> str:
    """Return the payload of a poll's response: the packets, or NOOP if there are none."""
    texts = (packet if isinstance(packet, str) else "b" + base64.b64encode(packet).decode() for packet in packets)
    return SEPARATOR.join(texts) or NOOP


def decode_payload(body: bytes) -> list[str]:
    """Return the packets in the body of a POST.

    Raises:
        ProtocolError: the body is not UTF-8, or has too many packets.
    """
    try:
        packets = body.decode().split(SEPARATOR)
    except UnicodeDecodeError:
        raise ProtocolError("malformed payload") from None
    if len(packets) > MAX_PACKETS_IN_PAYLOAD:
        raise ProtocolError("too many packets")
    return packets
