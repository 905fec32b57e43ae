"""services.py: the fakes do what the real services do. Each test runs against both."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jwt
import pytest
from clients import client
from cluster import KEY
from fakes import FakeLessons, FakePresence, FakeRedis, FakeSeats, FakeSockets, FakeTokens, Faults
from presences import GRACE, new_presence

from lesson_server.errors import AccessTokenExpired, AccessTokenInvalid, LessonNotFound
from lesson_server.events.services import Lessons, Presence, Seats, Tokens
from lesson_server.settings.schema import AuthSettings
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord
from lesson_server.stores.redis.seats import Seats as RealSeats
from lesson_server.stores.redis.seats import Taking
from lesson_server.tokens import Identity, TokenVerifier

RETENTION = 3_600

both = pytest.mark.parametrize("kind", ["fake", "real"])


# RDS


@pytest.fixture
def lessons(kind, request) -> Lessons:
    if kind == "fake":
        return FakeLessons(Faults(), {"1": 30})
    return request.getfixturevalue("open_lessons")()


@both
@pytest.mark.gen_test
async def test_a_lesson_has_its_number_of_seats(lessons):
    lesson = await lessons.get("1")
    assert (lesson.lesson_id, lesson.seat_count) == ("1", 30)


@both
@pytest.mark.gen_test
async def test_an_unknown_lesson_is_named(lessons):
    with pytest.raises(LessonNotFound, match=r"^lesson nine not found$"):
        await lessons.get("nine")


# Redis


@dataclass
class Stores:
    """What writes to one Redis, and what stands there then."""

    presence: Presence
    elsewhere: Presence  # another node
    seats: Seats
    hashes: Callable[[], dict[str, dict[str, str]]]


@pytest.fixture
def redis_stores(kind, request, io_loop):
    if kind == "fake":
        redis, faults = FakeRedis(), Faults()
        fake = FakePresence(faults, redis)
        yield Stores(fake, fake, FakeSeats(faults, redis), lambda: redis.hashes)
        return
    onlooker = request.getfixturevalue("redis_client")
    store = RedisStore(request.getfixturevalue("stores").redis_url, "", 2.0, 4)
    presence, elsewhere = new_presence(store, RETENTION), new_presence(store, RETENTION)
    yield Stores(
        presence,
        elsewhere,
        RealSeats(store, RETENTION, GRACE),
        lambda: {key: onlooker.hgetall(key) for key in onlooker.keys("*")},
    )
    for one in (presence, elsewhere):
        io_loop.run_sync(one.removals.close)
    io_loop.run_sync(store.close)


FIRST = ClientRecord("sid-1", "1", "anna", "student")
SECOND = replace(FIRST, sid="sid-2", lesson_id="2", role="assistant")
TEACHER = TeacherRecord("sid-3", "1", "ms-hill")


def shown(record: ClientRecord) -> dict[str, str]:
    return {"sid": record.sid, "client_id": record.client_id, "role": record.role}


@both
@pytest.mark.gen_test
async def test_a_seat_map_is_made_once_grows_and_keeps_its_occupants(redis_stores):
    await redis_stores.seats.ensure_map("1", 2)
    assert redis_stores.hashes() == {"lesson_seat_1": {"1": "", "2": ""}}
    await redis_stores.seats.ensure_map("1", 3)
    await redis_stores.seats.ensure_map("1", 2)
    assert redis_stores.hashes() == {"lesson_seat_1": {"1": "", "2": "", "3": ""}}
    await redis_stores.seats.ensure_map("2", 0)
    assert "lesson_seat_2" not in redis_stores.hashes()


@both
@pytest.mark.gen_test
async def test_a_person_has_one_seat_and_a_seat_one_person(redis_stores):
    seats = redis_stores.seats
    assert await seats.take("1", "anna", None, 2) == (Taking.TAKEN, 1)
    assert await seats.take("1", "anna", None, 2) == await seats.take("1", "anna", 1, 2) == (Taking.HELD, 1)
    assert await seats.take("1", "ben", 1, 2) == (Taking.HELD_BY_ANOTHER, 0)
    assert await seats.take("1", "ben", 3, 2) == (Taking.NO_SUCH_SEAT, 0)
    assert await seats.take("1", "anna", 2, 2) == (Taking.TAKEN, 2)
    assert await seats.take("1", "ben", None, 2) == (Taking.TAKEN, 1)
    assert await seats.take("1", "cem", None, 2) == (Taking.FULL, 0)
    assert await seats.take("2", "cem", None, 0) == await seats.take("2", "cem", 1, 0) == (Taking.NO_SEATS, 0)
    assert redis_stores.hashes() == {"lesson_seat_1": {"1": "ben", "2": "anna"}}
    assert await seats.ensure_map("1", 2, "anna") == 2
    assert await seats.ensure_map("1", 2, "cem") == 0


@both
@pytest.mark.gen_test
async def test_a_seat_is_restored_unless_it_was_left_or_is_taken(redis_stores):
    seats = redis_stores.seats
    await seats.ensure_map("1", 2)
    assert await seats.restore("1", "anna", 2) == await seats.restore("1", "anna", 1) == 2
    assert await seats.restore("1", "ben", 2) == 0
    await seats.leave("1", "anna")
    await seats.leave("1", "cem")
    assert await seats.restore("1", "anna", 2) == 0
    assert redis_stores.hashes() == {"lesson_seat_1": {"1": "", "2": ""}}
    assert await seats.take("1", "anna", None, 2) == (Taking.TAKEN, 1)


@both
@pytest.mark.gen_test
async def test_a_client_that_was_known_by_another_sid_is_back(redis_stores):
    assert await redis_stores.presence.write(FIRST) is False
    assert await redis_stores.elsewhere.write(SECOND) is True
    assert redis_stores.hashes() == {
        "lesson_student_1": {"anna": "sid-1"},
        "lesson_student_2": {"anna": "sid-2"},
        "anna": shown(SECOND),
    }


@both
@pytest.mark.gen_test
async def test_a_client_that_ended_is_remembered_and_one_whose_join_failed_is_not(redis_stores):
    await redis_stores.presence.write(FIRST)
    await redis_stores.presence.remove("sid-1", undo=True)
    assert redis_stores.hashes() == {}
    await redis_stores.presence.write(FIRST)
    await redis_stores.presence.remove("sid-1")
    assert redis_stores.hashes() == {"anna": shown(FIRST)}
    assert await redis_stores.presence.write(SECOND) is True
    await redis_stores.presence.remove("sid-2", undo=True)
    assert redis_stores.hashes() == {"anna": shown(FIRST)}


@both
@pytest.mark.gen_test
async def test_the_connection_before_the_one_that_ended_stands_again(redis_stores):
    await redis_stores.presence.write(FIRST)
    await redis_stores.elsewhere.write(SECOND)
    await redis_stores.elsewhere.remove("sid-2")
    assert redis_stores.hashes() == {"lesson_student_1": {"anna": "sid-1"}, "anna": shown(FIRST)}


@both
@pytest.mark.gen_test
async def test_what_is_restored_stands_behind_a_newer_connection(redis_stores):
    await redis_stores.presence.write(FIRST)
    await redis_stores.elsewhere.write(SECOND)
    await redis_stores.presence.restore(FIRST)
    assert redis_stores.hashes()["anna"] == shown(SECOND)


@both
@pytest.mark.gen_test
async def test_a_teacher_stands_in_both_records_and_leaves_nothing(redis_stores):
    assert await redis_stores.presence.write(TEACHER) is False
    assert redis_stores.hashes() == {"lesson_teacher_1": {"ms-hill": "sid-3"}, "ms-hill": {"lesson_id": "1"}}
    await redis_stores.presence.remove("sid-3")
    await redis_stores.presence.remove("sid-3")
    await redis_stores.presence.remove("never-seen")
    assert redis_stores.hashes() == {}


# Access tokens


@dataclass
class Issuer:
    tokens: Tokens
    good: str
    expired: str


@pytest.fixture
def issuer(kind) -> Issuer:
    if kind == "fake":
        return Issuer(FakeTokens(), "student:anna", "expired")
    verifier = TokenVerifier(AuthSettings.model_validate({"key": KEY}))
    expired = jwt.encode({"sub": "anna", "role": "student", "exp": 1}, KEY)
    return Issuer(verifier, verifier.mint("anna", "student", 60), expired)


@both
def test_a_token_tells_who_it_is_or_is_refused(issuer):
    assert issuer.tokens.verify(issuer.good) == Identity("anna", "student")
    with pytest.raises(AccessTokenExpired):
        issuer.tokens.verify(issuer.expired)
    for text in ("", "forged", 7):
        with pytest.raises(AccessTokenInvalid):
            issuer.tokens.verify(text)


# Rooms and sessions


@pytest.fixture
def with_sockets(kind, request, io_loop):
    """Runs a check with the Socket.IO server, a sid of its, and what tells the rooms of the sid."""
    server = request.getfixturevalue("server") if kind == "real" else None

    async def work(check):
        if server is None:
            fake = FakeSockets(Faults())
            fake.open("sid")
            await check(fake, "sid", lambda: [room for room, members in fake.rooms.items() if "sid" in members])
            return
        async with client(server, client="participant", lesson_id="1") as sio:
            sockets = server.gateway.connections[sio.get_sid()].services.sockets
            await check(sockets, sio.get_sid(), lambda: sockets.rooms(sio.get_sid()))

    return lambda check: io_loop.run_sync(lambda: work(check))


@both
def test_a_room_is_entered_and_left_and_leaving_again_is_nothing(with_sockets):
    async def check(sockets, sid, rooms):
        await sockets.enter_room(sid, "1")
        assert rooms() == ["1"]
        for _ in range(2):
            await sockets.leave_room(sid, "1")
            assert rooms() == []

    with_sockets(check)


@both
def test_a_session_is_kept_as_it_was_saved(with_sockets):
    async def check(sockets, sid, rooms):
        session = await sockets.get_session(sid)
        assert session == {}
        session["seat"] = 3
        await sockets.save_session(sid, session)
        assert await sockets.get_session(sid) == {"seat": 3}
        with pytest.raises(KeyError):
            await sockets.save_session("gone", {})

    with_sockets(check)
