"""The contract, seen by python-socketio's own client, with real stores behind the server."""

import asyncio

import pytest
from clients import SUCCESS, TRANSPORTS, UNAVAILABLE, client, error, join, refusal
from joins import join_of
from waiting import until

# The stories


@TRANSPORTS
@pytest.mark.gen_test
async def test_a_teacher_joins_and_leaves(server, redis_client, mint, transports):
    async with client(server, transports, client="teacher", lesson_id=1, access_token=mint("t1", "teacher")) as sio:
        assert await join(sio) == SUCCESS
        assert redis_client.hgetall("lesson_teacher_1") == {"t1": sio.get_sid()}
        assert redis_client.hgetall("t1") == {"lesson_id": "1"}
        assert redis_client.hgetall("lesson_seat_1") == {str(seat): "" for seat in range(1, 31)}
    await until(lambda: redis_client.keys() == ["lesson_seat_1"])


@TRANSPORTS
@pytest.mark.gen_test
async def test_a_participant_joins_and_leaves(server, redis_client, mint, transports):
    async with client(server, transports, client="participant", lesson_id="1", access_token=mint()) as sio:
        assert await join(sio) == SUCCESS
        assert redis_client.hgetall("lesson_student_1") == {"p1": sio.get_sid()}
        assert redis_client.hgetall("p1") == {"sid": sio.get_sid(), "client_id": "p1", "role": "student"}
        session = await server.gateway.connections[sio.get_sid()].services.sockets.get_session(sio.get_sid())
        assert session == {"seat": 30, "client_id": "p1", "role": "student"}
    await until(lambda: sorted(redis_client.keys()) == ["lesson_seat_1", "p1"])


@TRANSPORTS
@pytest.mark.gen_test
async def test_a_guest_is_seated_and_no_more(server, redis_client, transports):
    async with client(server, transports, client="participant", lesson_id="1") as sio:
        assert await join(sio) == SUCCESS
        assert join_of(server.gateway.connections[sio.get_sid()]).state == "seated"
        assert redis_client.keys() == ["lesson_seat_1"]


@pytest.mark.gen_test
async def test_all_of_a_lesson_are_in_its_room_and_nobody_else(server, mint):
    received = []
    async with (
        client(server, client="participant", lesson_id="1", access_token=mint("p1")) as joined,
        client(server, client="participant", lesson_id="1") as guest,
        client(server, client="participant", lesson_id="1") as waiting,
    ):
        for name, sio in (("joined", joined), ("guest", guest), ("waiting", waiting)):
            sio.on("news", lambda data, name=name: received.append(name))
        await join(joined)
        await join(guest)
        await server.gateway.connections[joined.get_sid()].services.sockets.emit("news", {}, room="1")
        await until(lambda: len(received) == 2)
        assert await join(waiting) == SUCCESS  # a round trip later nothing else has come
        assert sorted(received) == ["guest", "joined"]


# The answers: every row of the contract's table, section 3


@pytest.mark.parametrize(
    ("auth", "message"),
    [
        ({}, 'client must be "teacher" or "participant"'),
        (None, 'client must be "teacher" or "participant"'),
        ({"client": "Teacher", "lesson_id": 1}, 'client must be "teacher" or "participant"'),
        ({"client": ["teacher"], "lesson_id": 1}, 'client must be "teacher" or "participant"'),
        ({"client": "hub", "lesson_id": 1}, "the Hub does not join lessons"),
        ({"client": "teacher"}, "lesson_id is required"),
        ({"client": "participant", "lesson_id": None}, "lesson_id is required"),
        ({"client": "participant", "lesson_id": "a b"}, "lesson_id is malformed"),
        ({"client": "participant", "lesson_id": "x" * 65}, "lesson_id is malformed"),
        ({"client": "participant", "lesson_id": True}, "lesson_id is malformed"),
        ({"client": "participant", "lesson_id": {"$ne": 1}}, "lesson_id is malformed"),
    ],
)
def test_a_wrong_handshake_is_refused(io_loop, server, auth, message):
    assert io_loop.run_sync(lambda: refusal(server, auth)) == message
    assert not server.gateway.connections


@pytest.mark.parametrize(
    ("kind", "token", "answer"),
    [
        ("teacher", None, error("access token is required")),
        ("teacher", "", error("access token is invalid")),
        ("teacher", {"role": "teacher", "ttl": -1}, error("access token has expired")),
        ("teacher", {"role": "student"}, error("only a teacher can join as teacher")),
        ("teacher", {"role": "teacher", "key": "of somebody else, also long enough"}, error("access token is invalid")),
        ("participant", {"ttl": -1}, error("access token has expired")),
        ("participant", "nonsense", error("access token is invalid")),
        ("participant", 17, error("access token is invalid")),
        ("participant", {"subject": "lesson_seat_1"}, error("access token is invalid")),
        ("participant", {"subject": None}, error("access token is invalid")),
        ("participant", {"role": None}, error("access token is invalid")),
        ("participant", {"role": "a role"}, error("access token is invalid")),
        ("participant", {"exp": None}, error("access token is invalid")),
        ("participant", {"aud": "another"}, SUCCESS),  # no audience is configured
        ("participant", "", error("access token is invalid")),
        ("participant", None, SUCCESS),
    ],
)
def test_a_join_answers_for_the_token(io_loop, server, redis_client, mint, kind, token, answer):
    if isinstance(token, dict):
        token = mint(**token)

    async def story():
        async with client(server, client=kind, lesson_id="1", access_token=token) as sio:
            assert await join(sio) == answer
            if answer != SUCCESS:
                connection = server.gateway.connections[sio.get_sid()]
                assert join_of(connection).state == "connected"
                assert connection.services.sockets.rooms(sio.get_sid()) == []
                assert redis_client.keys() == []
                assert await join(sio) == answer

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_an_unknown_lesson_is_reported_before_a_bad_token(server, redis_client):
    async with client(server, client="teacher", lesson_id="nope", access_token="nonsense") as sio:
        assert await join(sio) == error("lesson nope not found")
        assert redis_client.keys() == []


@pytest.mark.gen_test
async def test_a_lesson_that_appears_can_be_joined_on_the_same_connection(server, sql):
    async with client(server, client="participant", lesson_id="later") as sio:
        assert await join(sio) == error("lesson later not found")
        sql.execute("INSERT INTO lessons (id) VALUES ('later')")
        assert await join(sio) == SUCCESS


@pytest.mark.parametrize("data", [{}, "", 0, False, [], (None, None)], ids=repr)
def test_join_lesson_takes_no_data(io_loop, server, data):
    async def story():
        async with client(server, client="participant", lesson_id="1") as sio:
            assert await join(sio, data) == error("join_lesson takes no data")
            assert await join(sio, None) == SUCCESS

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_a_defect_is_an_internal_error_and_the_log_knows_why(server, redis_client, monkeypatch, caplog, mint):
    token = mint()
    async with client(server, client="participant", lesson_id="1", access_token=token) as sio:
        connection = server.gateway.connections[sio.get_sid()]

        async def defect(*args):
            raise RuntimeError("a secret of ours")

        with monkeypatch.context() as patch:
            patch.setattr(connection.services.seats, "ensure_map", defect)
            assert await join(sio) == error("internal error")
        assert "a secret of ours" in caplog.text
        assert sio.get_sid() in caplog.text
        assert token not in caplog.text
        assert join_of(connection).state == "connected"
        assert await join(sio) == SUCCESS


@pytest.mark.gen_test
async def test_a_store_that_fails_is_said_plainly_and_leaves_nothing(server, sql, redis_client, mint):
    async with client(server, client="participant", lesson_id="1", access_token=mint()) as sio:
        sql.execute("ALTER TABLE lessons RENAME TO gone")
        try:
            assert await join(sio) == UNAVAILABLE
        finally:
            sql.execute("ALTER TABLE gone RENAME TO lessons")
        redis_client.set("lesson_student_1", "in the way")
        assert await join(sio) == UNAVAILABLE
        assert sorted(redis_client.keys()) == ["lesson_seat_1", "lesson_student_1"]
        redis_client.delete("lesson_student_1")
        assert await join(sio) == SUCCESS


# Joining twice


@pytest.mark.gen_test
async def test_joining_again_does_nothing_twice(server, monkeypatch, mint):
    async with client(server, client="participant", lesson_id="1", access_token=mint()) as sio:
        assert await join(sio) == SUCCESS
        services = server.gateway.connections[sio.get_sid()].services
        monkeypatch.setattr(services.lessons, "get", pytest.fail)
        monkeypatch.setattr(services.seats, "ensure_map", pytest.fail)
        monkeypatch.setattr(services.presence, "write", pytest.fail)
        assert await join(sio) == SUCCESS


@pytest.mark.gen_test
async def test_two_joins_in_flight_are_one_join_with_two_answers(server, redis_client, mint):
    async with client(server, client="participant", lesson_id="1", access_token=mint()) as sio:
        before = redis_client.info("commandstats").get("cmdstat_hset", {}).get("calls", 0)
        assert await asyncio.gather(join(sio), join(sio), join(sio)) == [SUCCESS] * 3
        # One for {client_id}, one for lesson_student_{lesson_id}, one for each index: of the node, of the new seat map.
        assert redis_client.info("commandstats")["cmdstat_hset"]["calls"] - before == 4


@pytest.mark.gen_test
async def test_an_old_connection_that_ends_takes_nothing_from_the_new_one(server, redis_client, mint):
    old = client(server, client="participant", lesson_id="1", access_token=mint())
    sio = await old.__aenter__()
    await join(sio)
    async with client(server, client="participant", lesson_id="1", access_token=mint()) as new:
        await join(new)
        await old.__aexit__(None, None, None)
        await until(lambda: len(server.gateway.connections) == 1)
        await asyncio.sleep(0.05)
        assert redis_client.hgetall("lesson_student_1") == {"p1": new.get_sid()}


# Settings that change what a client sees


def test_a_trusted_user_id_stands_in_place_of_a_token(io_loop, start_server, redis_client):
    server = start_server(LESSON_AUTH_TRUST_TEACHER_USER_ID="true")

    async def story():
        async with client(server, client="teacher", lesson_id="1", user_id="ms-hill") as sio:
            assert await join(sio) == SUCCESS
            assert redis_client.hgetall("lesson_teacher_1") == {"ms-hill": sio.get_sid()}
        for user_id in ("lesson_seat_1", "", 5, ["x"]):
            async with client(server, client="teacher", lesson_id="1", user_id=user_id) as sio:
                assert await join(sio) == error("access token is invalid")
        async with client(server, client="teacher", lesson_id="1") as sio:
            assert await join(sio) == error("access token is required")

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_a_user_id_is_not_trusted_by_default(server):
    async with client(server, client="teacher", lesson_id="1", user_id="ms-hill") as sio:
        assert await join(sio) == error("access token is required")


def test_every_key_has_the_prefix(io_loop, start_server, redis_client, mint):
    server = start_server(LESSON_REDIS_KEY_PREFIX="school:", LESSON_PRESENCE_RETENTION="1h")

    async def story():
        async with (
            client(server, client="participant", lesson_id="1", access_token=mint()) as participant,
            client(server, client="teacher", lesson_id="1", access_token=mint("t1", "teacher")) as teacher,
        ):
            await join(participant)
            await join(teacher)
            day, hour = 86_400, 3_600
            assert {key: redis_client.ttl(key) for key in redis_client.keys("*")} == {
                "school:lesson_seat_1": hour,
                "school:lesson_teacher_1": day,
                "school:t1": hour,
                "school:p1": day,
                "school:lesson_student_1": hour,
            }
            assert {redis_client.type(key) for key in redis_client.keys("*")} == {"hash"}

    io_loop.run_sync(story)


def test_audience_and_issuer_are_checked_when_set(io_loop, start_server, mint):
    server = start_server(LESSON_AUTH_AUDIENCE="lessons", LESSON_AUTH_ISSUER="school")

    async def story():
        for claims, answer in [
            ({"aud": "lessons", "iss": "school"}, SUCCESS),
            ({"aud": "lessons"}, error("access token is invalid")),
            ({"aud": "other", "iss": "school"}, error("access token is invalid")),
        ]:
            async with client(server, client="participant", lesson_id="1", access_token=mint(**claims)) as sio:
                assert await join(sio) == answer

    io_loop.run_sync(story)
