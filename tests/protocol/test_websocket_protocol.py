"""websocket_protocol.py between a connection and a fake Engine.IO server: how much it reads at once."""

import asyncio
import importlib.metadata
import inspect

import picows
import pytest
from fake_engine import websocket_of
from picows.picows import WSProtocol  # type: ignore[attr-defined]
from raw_client import TEXT, frame

from lesson_server.protocol.websocket_protocol import READ_SIZE

SMALLEST = len(frame(""))


@pytest.mark.gen_test
async def test_a_client_that_sends_much_is_read_in_several_turns_of_the_loop() -> None:
    count = 20 * READ_SIZE // SMALLEST
    async with websocket_of(frame("") * count) as engine:
        while sum(engine.engine_socket.received) < count:
            await asyncio.sleep(0)
            engine.engine_socket.received.append(0)
    assert max(engine.engine_socket.received) <= READ_SIZE // SMALLEST + 1


@pytest.mark.gen_test
async def test_a_large_message_makes_no_later_read_larger() -> None:
    count = 20 * READ_SIZE // SMALLEST
    async with websocket_of(frame("x" * 7 * READ_SIZE) + frame("") * count) as engine:
        while sum(engine.engine_socket.received) < 1 + count:
            await asyncio.sleep(0)
            engine.engine_socket.received.append(0)
    assert max(engine.engine_socket.received) <= READ_SIZE // SMALLEST + 1


# What this rests on


def test_the_protocol_of_picows_is_made_as_it_was() -> None:
    """Its arguments are given by position, for it has no names for them that could be seen."""
    assert importlib.metadata.version("picows").startswith("2.3.")
    assert issubclass(WSProtocol, asyncio.BufferedProtocol)
    with pytest.raises(TypeError, match="exactly 15 positional arguments"):
        WSProtocol()


def test_picows_takes_text_as_it_is() -> None:
    assert list(inspect.signature(picows.WSTransport.send).parameters)[:3] == ["self", "msg_type", "message"]
    assert picows.WSMsgType.TEXT == TEXT
