"""What the tests of take_seat and leave_seat share: a gateway in memory, and people who have joined lesson 1."""

from collections.abc import Mapping

from fakes import World

from lesson_server.gateway.handlers import Answer

ANNA = {"client": "participant", "lesson_id": "1", "access_token": "student:anna"}
BEN = {"client": "participant", "lesson_id": "1", "access_token": "student:ben"}
GUEST = {"client": "participant", "lesson_id": "1"}
TEACHER = {"client": "teacher", "lesson_id": "1", "access_token": "teacher:hill"}


def seat(number: int) -> Answer:
    return {"status": "SUCCESS", "data": {"seat": number}}


def error(message: str) -> Answer:
    return {"status": "ERROR", "message": message}


async def joined(world: World, sid: str, auth: Mapping[str, object]) -> None:
    await world.connect(sid, auth)
    assert await world.join(sid) == {"status": "SUCCESS", "data": {}}


async def send(world: World, event: str, sid: str, *data: object) -> Answer | None:
    return await world.sockets.handlers[event](sid, *data)


def taken(world: World, lesson_id: str = "1") -> dict[int, str]:
    """Who sits where."""
    seats = world.redis.hashes.get(f"lesson_seat_{lesson_id}", {})
    return {int(number): occupant for number, occupant in seats.items() if occupant}
