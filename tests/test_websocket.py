"""websocket.py on a transport of the test's own: when it reads, and what it keeps of what the system does not take."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any

import pytest
from edge import PING, frame
from fakes import settle
from websockets.frames import Frame, Opcode

from lesson_server import sessions
from lesson_server.admission import Places
from lesson_server.websocket import READ_SIZE, Websocket

GREETING = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


class FakeTransport(asyncio.Transport):
    """Takes as many bytes as there is room for; the rest waits in it."""

    def __init__(self) -> None:
        self.is_reading_ = True
        self.room = 1_000_000
        self.sent = b""
        self.waiting = b""
        self.writes = 0
        self.is_aborted = False
        self.protocol: Websocket

    def pause_reading(self) -> None:
        self.is_reading_ = False

    def resume_reading(self) -> None:
        self.is_reading_ = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1
        self.waiting += bytes(data)
        self._flush()

    def give_room(self, room: int) -> None:
        self.room += room
        self._flush()
        if not self.waiting:
            self.protocol.resume_writing()

    def _flush(self) -> None:
        self.sent += self.waiting[: self.room]
        taken = min(self.room, len(self.waiting))
        self.waiting, self.room = self.waiting[taken:], self.room - taken

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def is_closing(self) -> bool:
        return self.is_aborted

    def close(self) -> None:
        raise AssertionError("not in these tests")

    def abort(self) -> None:
        self.is_aborted = True


class FakeSession:
    """Keeps what it receives; handles it at once, or when ``may_go_on``."""

    def __init__(self) -> None:
        self.received: list[str | bytes] = []
        self.dropped: list[str] = []
        self.may_go_on: asyncio.Event | None = None

    def receive_from(self, websocket: Websocket, packet: str | bytes) -> Awaitable[object] | None:
        self.received.append(packet)
        return self.may_go_on.wait() if self.may_go_on is not None else None

    def drop(self, why: str) -> None:
        self.dropped.append(why)


class World:
    """A websocket between a transport and a session of the test's own."""

    read_buffer = memoryview(bytearray(READ_SIZE))

    def __init__(self, room: int = 1_000_000) -> None:
        self.websockets: set[Websocket] = set()
        self.tasks: list[asyncio.Task[None]] = []
        self.session = FakeSession()
        self.transport = FakeTransport()
        self.transport.room = room
        place = Places(1).take(lambda: None)
        self.websocket = Websocket(self.session, self, GREETING, place)  # type: ignore[arg-type]
        self.transport.protocol = self.websocket
        self.websocket.connection_made(self.transport)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    def arrive(self, data: bytes) -> None:
        """What the loop does with bytes, at most as many as there is room for."""
        for start in range(0, len(data), READ_SIZE):
            chunk = data[start : start + READ_SIZE]
            self.websocket.get_buffer(-1)[: len(chunk)] = chunk
            self.websocket.buffer_updated(len(chunk))


# Reading


@pytest.mark.parametrize(("size", "has_its_turn"), [(READ_SIZE - 1, True), (READ_SIZE, False)])
@pytest.mark.gen_test
async def test_who_may_have_sent_more_goes_on_when_others_have_had_their_turn(size: int, has_its_turn: bool) -> None:
    world = World()
    world.arrive(frame("x" * (size - 8)))
    assert world.transport.is_reading_ is has_its_turn
    await settle()
    assert world.transport.is_reading_
    assert world.session.received == ["x" * (size - 8)]


@pytest.mark.gen_test
async def test_while_a_message_is_handled_one_more_piece_is_read_and_no_more() -> None:
    world = World()
    world.session.may_go_on = asyncio.Event()
    world.arrive(frame("first"))
    assert world.transport.is_reading_  # the end of the connection must be seen
    world.arrive(frame("second") + frame("third"))
    assert not world.transport.is_reading_
    await settle()
    assert not world.transport.is_reading_
    assert world.session.received == ["first"]
    world.session.may_go_on.set()
    await settle()
    assert world.session.received == ["first", "second", "third"]
    assert world.transport.is_reading_


@pytest.mark.gen_test
async def test_a_turn_of_the_others_does_not_end_the_wait_for_a_message() -> None:
    world = World()
    world.session.may_go_on = asyncio.Event()
    world.arrive(frame("x" * (READ_SIZE - 8)))
    await settle()
    assert not world.transport.is_reading_
    world.session.may_go_on.set()
    await settle()
    assert world.transport.is_reading_


# Writing


def pongs(count: int) -> bytes:
    return Frame(Opcode.PONG, b"").serialize(mask=False) * count


@pytest.mark.gen_test
async def test_what_there_is_room_for_is_sent_at_once() -> None:
    world = World()
    world.arrive(frame("", PING) * 3)
    assert world.transport.sent == GREETING + pongs(3)


@pytest.mark.gen_test
async def test_what_the_system_does_not_take_is_kept_together_and_sent_in_order() -> None:
    """Each write that the transport keeps would cost an object of half a kB."""
    world = World(room=len(GREETING) - 1)
    for _ in range(50):
        world.arrive(frame("", PING))
    assert world.transport.writes == 1
    world.transport.give_room(2)
    assert world.transport.writes == 2
    world.transport.give_room(1_000)
    world.arrive(frame("", PING))
    assert world.transport.sent == GREETING + pongs(51)
    assert not world.websocket._unsent


@pytest.mark.gen_test
async def test_who_leaves_too_much_unread_is_dropped() -> None:
    world = World(room=0)
    left = sessions.MAX_UNREAD_BYTES - len(GREETING)
    world.arrive(frame("", PING) * (left // 2))
    assert (world.session.dropped, world.transport.is_aborted) == ([], False)
    world.arrive(frame("", PING))
    assert (world.session.dropped, world.transport.is_aborted) == (["slow reader"], True)
