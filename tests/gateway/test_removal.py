"""removal.py, and handlers.py: the removal of a person from a lesson closes all of the person's connections in it."""

import asyncio
import contextlib

import pytest
from clients import SUCCESS, client, join
from fakes import World, settle, store_down
from handshakes import GUEST, PARTICIPANT, TEACHER
from node_keys import House
from roster_api import TOKEN, ask, failure
from waiting import until

from lesson_server.gateway import removal
from lesson_server.stores.redis.records import ClientRecord, TeacherRecord


async def in_lesson(world: World, sid: str, auth: dict[str, str]):
    join = await world.connect(sid, auth)
    assert (await world.join(sid))["status"] == "SUCCESS"
    return join


@pytest.mark.gen_test
async def test_every_connection_of_the_person_in_the_lesson_is_closed_and_no_other():
    world = World()
    removed = [await in_lesson(world, sid, PARTICIPANT) for sid in ("tab-1", "tab-2")]
    kept = [
        await in_lesson(world, "other-lesson", {**PARTICIPANT, "lesson_id": "2"}),
        await in_lesson(world, "other-person", {**PARTICIPANT, "access_token": "student:p-2"}),
        await in_lesson(world, "teacher", {**TEACHER, "access_token": "teacher:p-1"}),
        await in_lesson(world, "guest", GUEST),
    ]
    await world.gateway.remove("1", "participant", "p-1")
    assert sorted(world.sockets.closed) == ["tab-1", "tab-2"]
    assert all(join.has_ended for join in removed)
    assert not any(join.has_ended for join in kept)
    assert world.redis.hashes["lesson_student_1"] == {"p-2": "other-person"}
    assert not {"tab-1", "tab-2"} & world.sockets.rooms["1"]
    for sid in ("tab-1", "tab-2"):
        await world.disconnect(sid)  # the transport ends later
        assert set(world.held_by(sid)) <= {"redis p-1"}  # known for 24 h, as after any end
    assert world.gateway.connections.keys() == {"other-lesson", "other-person", "teacher", "guest"}


@pytest.mark.gen_test
async def test_a_teacher_is_removed_by_the_user_id():
    world = World()
    await in_lesson(world, "sid", TEACHER)
    await world.gateway.remove("1", "participant", "t-1")
    assert world.sockets.closed == []
    await world.gateway.remove("1", "teacher", "t-1")
    assert world.sockets.closed == ["sid"]
    assert "lesson_teacher_1" not in world.redis.hashes


@pytest.mark.gen_test
async def test_a_join_under_way_ends_without_an_answer():
    world = World()
    hold = world.faults.hold_at("seats.ensure_map")
    await world.connect("sid", PARTICIPANT)
    join = asyncio.create_task(world.join("sid"))
    await hold.reached.wait()
    removal = asyncio.create_task(world.gateway.remove("1", "participant", "p-1"))
    await settle()
    assert not removal.done()  # it waits for the transition that runs
    hold.release()
    await removal
    assert await join is None
    assert world.sockets.closed == ["sid"]
    assert world.presence.written == []
    assert "1" not in world.sockets.rooms


@pytest.mark.gen_test
async def test_a_connection_whose_join_has_failed_is_closed_too():
    world = World()
    world.faults.fail_at("seats.ensure_map", store_down())
    await world.connect("sid", PARTICIPANT)
    assert (await world.join("sid"))["status"] == "ERROR"
    await world.gateway.remove("1", "participant", "p-1")
    assert world.sockets.closed == ["sid"]


@pytest.mark.gen_test
async def test_while_redis_is_down_the_connection_is_closed_and_the_removal_of_its_presence_is_pending():
    world = World()
    await in_lesson(world, "sid", PARTICIPANT)
    world.faults.fail_at("presence.remove", store_down())
    await world.gateway.remove("1", "participant", "p-1")
    assert world.sockets.closed == ["sid"]
    world.presence.retry()
    assert "lesson_student_1" not in world.redis.hashes


@pytest.mark.gen_test
async def test_of_the_connections_only_those_that_are_named_are_closed():
    world = World()
    for sid in ("tab-1", "tab-2"):
        await in_lesson(world, sid, PARTICIPANT)
    await world.gateway.remove("1", "participant", "p-1", ["tab-1", "somewhere else"])
    assert world.sockets.closed == ["tab-1"]
    assert world.redis.hashes["lesson_student_1"] == {"p-1": "tab-2"}


# Over two nodes

STUDENT, TEACHER_PATH = "/api/lessons/1/participants/p1", "/api/lessons/1/teachers/t1"
NOBODY = (404, "nobody of this id is in this lesson")
UNAVAILABLE = (503, "Redis is unavailable, try again")


@pytest.fixture
def nodes(io_loop, start_server):
    nodes = [start_server(LESSON_ADMIN_TOKEN=TOKEN) for _ in range(2)]
    for node in nodes:
        io_loop.run_sync(node._subscription.ping)
    return nodes


@pytest.fixture
def quick(monkeypatch):
    """A node that does not answer is not waited for."""
    for name in ("REQUEST_INTERVAL", "LOOK_INTERVAL", "REPEAT_INTERVAL"):
        monkeypatch.setattr(removal, name, 0.01)


@pytest.fixture
def dead_node(io_loop, stores):
    """A node that has written presence, and does not answer messages."""
    node = House(stores.redis_url)
    io_loop.run_sync(node.beat)
    yield node
    io_loop.run_sync(node.close)


@contextlib.asynccontextmanager
async def joined(node, auth, transports=("websocket",)):
    """A client in the lesson, and the reasons for which it was disconnected."""
    async with client(node, transports, **auth) as sio:
        ends = []
        sio.on("disconnect", ends.append)
        assert await join(sio) == SUCCESS
        yield sio, ends


def student(mint, subject="p1", lesson_id="1"):
    return {"client": "participant", "lesson_id": lesson_id, "access_token": mint(subject)}


def teacher(mint, subject="t1", lesson_id="1"):
    return {"client": "teacher", "lesson_id": lesson_id, "access_token": mint(subject, "teacher")}


@pytest.mark.gen_test
async def test_every_connection_on_every_node_is_disconnected_and_the_presence_is_gone(nodes, mint, redis_client):
    here, there = nodes
    async with (
        joined(here, student(mint)) as (_, first),
        joined(there, student(mint)) as (_, second),
        joined(there, student(mint), ["polling"]) as (_, third),
        joined(there, student(mint, "p2")) as (_, other_person),
        joined(here, teacher(mint, "p1")) as (_, namesake),
    ):
        answer = await ask(here, STUDENT, "DELETE")
        assert answer.code == 204
        assert redis_client.hkeys("lesson_student_1") == ["p2"]
        assert redis_client.hkeys("lesson_teacher_1") == ["p1"]
        await until(lambda: first and second and third)
        assert first == second == third == ["server disconnect"]
        assert await failure(there, STUDENT, "DELETE") == NOBODY
        async with joined(there, student(mint)) as (again, _):
            assert redis_client.hget("lesson_student_1", "p1") == again.get_sid()
        assert (other_person, namesake) == ([], [])


@pytest.mark.gen_test
async def test_a_person_stays_in_other_lessons(nodes, mint, redis_client, sql):
    sql.execute("INSERT INTO lessons (id) VALUES ('2')")
    here, there = nodes
    async with joined(there, teacher(mint)) as (_, ends), joined(here, teacher(mint, lesson_id="2")) as (_, kept):
        assert (await ask(here, TEACHER_PATH, "DELETE")).code == 204
        await until(lambda: ends)
        assert not redis_client.exists("lesson_teacher_1")
        assert redis_client.hget("t1", "lesson_id") == "2"
        assert kept == []


@pytest.mark.parametrize(
    "path", [STUDENT, TEACHER_PATH, "/api/lessons/none/teachers/t1", "/api/lessons/1/teachers/%ff"]
)
@pytest.mark.gen_test
async def test_who_is_not_there_is_not_found(nodes, path, redis_client):
    assert await failure(nodes[0], path, "DELETE") == NOBODY
    assert redis_client.keys() == []


@pytest.mark.gen_test
async def test_a_lesson_id_that_can_not_be_is_not_asked_for(nodes, redis_client):
    redis_client.hset("lesson_student_a b", "p1", "sid")
    assert await failure(nodes[0], "/api/lessons/a%20b/participants/p1", "DELETE") == NOBODY
    assert redis_client.exists("lesson_student_a b")


@pytest.mark.gen_test
async def test_who_joins_again_at_once_stays(nodes, mint, redis_client, monkeypatch):
    """The presence may be there again before the removal has seen that it was gone."""
    here, there = nodes
    monkeypatch.setattr(removal, "REQUEST_INTERVAL", -1.0)  # each look is the last one of its request
    has_joined = asyncio.Event()
    looks = []
    connections = here._removal._roster.connections

    async def look(*person):
        looks.append(person)
        if len(looks) == 2:
            await has_joined.wait()
        return await connections(*person)

    monkeypatch.setattr(here._removal._roster, "connections", look)
    async with joined(there, student(mint)) as (_, ends):
        answer = asyncio.ensure_future(ask(here, STUDENT, "DELETE"))
        await until(lambda: ends)
        async with joined(there, student(mint)) as (again, kept):
            has_joined.set()
            assert (await answer).code == 204
            await asyncio.gather(here._subscription.ping(), there._subscription.ping())
            assert redis_client.hget("lesson_student_1", "p1") == again.get_sid()
            assert kept == []
    assert len(looks) >= 2


@pytest.mark.gen_test
async def test_a_request_that_was_lost_is_repeated(nodes, quick, mint, monkeypatch):
    here, there = nodes
    lost = []
    publish = here._subscription.publish

    async def publish_or_lose(channel, text):
        if not lost:
            lost.append(text)
        else:
            await publish(channel, text)

    monkeypatch.setattr(here._subscription, "publish", publish_or_lose)
    async with joined(there, student(mint)) as (_, ends), joined(here, student(mint)) as (_, own):
        assert (await ask(here, STUDENT, "DELETE")).code == 204
        await until(lambda: ends and own)
    assert len(lost) == 1


@pytest.mark.gen_test
async def test_a_live_node_that_hears_late_closes_the_connection_too(nodes, quick, mint, redis_client, monkeypatch):
    """Its subscription may be silent for some time: it would write the presence again at its next check."""
    here, there = nodes
    heard = []
    receive = there._subscription._handlers["lesson_node_messages"]

    async def hear_late(text):
        if '"kind":"remove"' in text:
            heard.append(text)
            if len(heard) <= removal.REQUESTS:
                return
        await receive(text)

    monkeypatch.setitem(there._subscription._handlers, "lesson_node_messages", hear_late)
    async with joined(there, student(mint)) as (_, ends):
        assert (await ask(here, STUDENT, "DELETE")).code == 204
        assert not redis_client.exists("lesson_student_1")
        async with joined(there, student(mint)) as (_, kept):
            await until(lambda: ends)
            await there._node.check_records()
            assert redis_client.hlen("lesson_student_1") == 1
            assert kept == []
    assert len(heard) > removal.REQUESTS


@pytest.mark.gen_test
async def test_the_presence_of_a_node_that_does_not_answer_is_removed(nodes, quick, dead_node, redis_client):
    await dead_node.join(ClientRecord("dead-1", "1", "p1", "student"), ClientRecord("dead-2", "1", "p1", "student"))
    await dead_node.join(TeacherRecord("dead-3", "1", "t1"), ClientRecord("dead-4", "1", "p2", "student"))
    for path in (STUDENT, TEACHER_PATH):
        assert (await ask(nodes[0], path, "DELETE")).code == 204
    assert redis_client.hgetall("lesson_student_1") == {"p2": "dead-4"}
    assert not redis_client.exists("lesson_teacher_1", "t1")
    assert redis_client.keys("lesson_node_claims:p1*") == []


@pytest.mark.gen_test
async def test_a_person_on_a_live_and_on_a_dead_node_is_removed_from_both(nodes, quick, dead_node, mint, redis_client):
    for first in (True, False):
        if first:
            await dead_node.join(ClientRecord("dead", "1", "p1", "student"))
        async with joined(nodes[1], student(mint)) as (_, ends):
            if not first:
                await dead_node.join(ClientRecord("dead", "1", "p1", "student"))
            assert (await ask(nodes[0], STUDENT, "DELETE")).code == 204
            assert not redis_client.exists("lesson_student_1")
            await until(ends.copy)


@pytest.mark.gen_test
async def test_a_person_whom_another_program_has_written_is_removed(nodes, quick, redis_client):
    redis_client.hset("lesson_student_1", mapping={"p1": "a sid", "p2": "another"})
    redis_client.hset("lesson_teacher_1", "t1", "a sid")
    redis_client.hset("t1", "lesson_id", "1")
    for path in (STUDENT, TEACHER_PATH):
        assert (await ask(nodes[0], path, "DELETE")).code == 204
    assert redis_client.hgetall("lesson_student_1") == {"p2": "another"}
    assert not redis_client.exists("lesson_teacher_1", "t1")


@pytest.mark.gen_test
async def test_a_sid_that_another_program_has_written_over_a_dead_nodes_is_removed(
    nodes, quick, dead_node, redis_client
):
    await dead_node.join(ClientRecord("dead", "1", "p1", "student"))
    redis_client.hset("lesson_student_1", "p1", "foreign")
    assert (await ask(nodes[0], STUDENT, "DELETE")).code == 204
    assert not redis_client.exists("lesson_student_1")


@pytest.mark.gen_test
async def test_two_removals_at_once_are_one(nodes, mint, redis_client):
    async with joined(nodes[0], student(mint)) as (_, ends):
        answers = await asyncio.gather(*(ask(node, STUDENT, "DELETE") for node in nodes))
        assert {answer.code for answer in answers} <= {204, 404}
        await until(lambda: ends)
        assert not redis_client.exists("lesson_student_1")


@pytest.mark.parametrize("step", range(12))
@pytest.mark.gen_test
async def test_while_redis_is_down_the_answer_says_so(nodes, quick, dead_node, redis_client, monkeypatch, step):
    await dead_node.join(ClientRecord("dead", "1", "p1", "student"))
    store = nodes[0]._redis
    execute = store.execute
    steps = []

    async def fail_from_step_on(*commands, bookkeeping=()):
        if "lesson_student_1" in commands[0] or commands[0][:2] == ("PUBLISH", "lesson_node_messages"):
            steps.append(commands)
            if len(steps) > step:
                raise store_down()
        return await execute(*commands, bookkeeping=bookkeeping)

    monkeypatch.setattr(store, "execute", fail_from_step_on)
    assert await failure(nodes[0], STUDENT, "DELETE") == UNAVAILABLE
    assert len(steps) > step


@pytest.mark.gen_test
async def test_a_join_under_way_does_not_hold_up_the_messages_of_its_node(nodes, mint, monkeypatch):
    here, there = nodes
    reached, go_on = asyncio.Event(), asyncio.Event()
    ended = []
    ensure_map = there.gateway._services.seats.ensure_map

    async def hold(*lesson):
        reached.set()
        try:
            await go_on.wait()
        finally:
            ended.append(lesson)
        await ensure_map(*lesson)

    async with joined(here, student(mint)) as (_, ends), client(there, **student(mint)) as joining:
        monkeypatch.setattr(there.gateway._services.seats, "ensure_map", hold)
        gone = []
        joining.on("disconnect", gone.append)
        await joining.emit("join_lesson")
        await reached.wait()
        assert (await ask(here, STUDENT, "DELETE")).code == 204
        await there._subscription.ping()
        assert (ended, gone) == ([], [])
        go_on.set()
        await until(lambda: gone and ends)


@pytest.mark.parametrize(
    "message", ["{}", '{"kind":"remove"}', '{"kind":"remove","lesson_id":1,"client":[],"person":{}}']
)
@pytest.mark.gen_test
async def test_a_foreign_message_removes_nobody(nodes, mint, redis_client, message):
    async with joined(nodes[0], student(mint)) as (_, ends):
        redis_client.publish("lesson_node_messages", message)
        await nodes[0]._subscription.ping()
        assert redis_client.exists("lesson_student_1")
        assert ends == []


@pytest.mark.gen_test
async def test_the_seat_of_a_removed_participant_is_free_and_no_other(nodes, mint, redis_client):
    here, there = nodes
    async with client(there, client="participant", lesson_id="1", access_token=mint("p1")) as sio:
        await join(sio)
        redis_client.hset("lesson_seat_1", mapping={"2": "p1", "3": "somebody else"})
        assert (await ask(here, STUDENT, "DELETE")).code == 204
    seats = redis_client.hgetall("lesson_seat_1")
    assert len(seats) == 30
    assert {seat: occupant for seat, occupant in seats.items() if occupant} == {"3": "somebody else"}
