"""websocket_protocol.py: what it rests on."""

import asyncio
import importlib.metadata
import inspect

import picows
import pytest
from picows.picows import WSProtocol  # type: ignore[attr-defined]
from raw_client import TEXT


def test_the_protocol_of_picows_is_made_as_it_was() -> None:
    """Its arguments are given by position, for it has no names for them that could be seen."""
    assert importlib.metadata.version("picows").startswith("2.3.")
    assert issubclass(WSProtocol, asyncio.BufferedProtocol)
    with pytest.raises(TypeError, match="exactly 15 positional arguments"):
        WSProtocol()


def test_picows_takes_text_as_it_is() -> None:
    assert list(inspect.signature(picows.WSTransport.send).parameters)[:3] == ["self", "msg_type", "message"]
    assert picows.WSMsgType.TEXT == TEXT
