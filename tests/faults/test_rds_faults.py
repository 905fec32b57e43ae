"""RDS is down, hung, slow; and faults between many nodes."""

import asyncio
import signal

import pytest
from clients import SUCCESS, UNAVAILABLE, client, join
from cluster import Postgres
from everyone import (
    RECOVERED,
    answered,
    everyone,
    get,
    indexed,
    is_ready,
    is_whole,
    joins_through,
    not_ready_because_of,
    present,
    serving,
    succeeds,
)
from waiting import until

from lesson_server.stores.redis import receiver

pytestmark = pytest.mark.usefixtures("quick_nodes")


@pytest.fixture(scope="module")
def own_rds(tmp_path_factory):
    postgres = Postgres(tmp_path_factory.mktemp("rds"))
    yield postgres
    postgres.close()


# RDS


@pytest.mark.gen_test
async def test_a_join_that_rds_has_answered_needs_it_no_more(server, redis_proxy, rds_proxy, redis_client, mint):
    async with everyone(server, mint) as people:
        await joins_through(rds_proxy.refuse, people, server, redis_proxy, redis_client)


@pytest.mark.gen_test(timeout=60)
async def test_a_stopped_rds_process_is_survived(environ, own_rds, redis_client, mint):
    async with serving(environ, LESSON_RDS_DSN=own_rds.dsn) as server, everyone(server, mint) as people:
        own_rds.hang()
        try:
            answers = asyncio.ensure_future(answered(people.connected, people.joining))
            assert (await get(server, "/healthz"))[0] == 200
            code, named = await get(server, "/readyz")
            assert (code, named) == (503, "RDS down\n")
            assert await answers == [UNAVAILABLE] * 2
            assert (await get(server, "/healthz"))[0] == 200
        finally:
            own_rds.restore()
        await until(lambda: succeeds(people.joining), RECOVERED)
        await until(lambda: is_ready(server), RECOVERED)
        await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))


@pytest.mark.gen_test(timeout=60)
async def test_a_restart_of_rds_is_survived(environ, own_rds, redis_client, mint):
    async with serving(environ, LESSON_RDS_DSN=own_rds.dsn) as server, everyone(server, mint) as people:
        await asyncio.to_thread(own_rds.restart)
        await until(lambda: succeeds(people.joining), RECOVERED)
        await until(lambda: is_ready(server), RECOVERED)
        await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))
        assert await answered(people.connected, people.seated, people.registered) == [SUCCESS] * 3


# Many nodes


@pytest.fixture
def two_nodes(start_server):
    return start_server(), start_server()


@pytest.mark.gen_test
async def test_a_room_reaches_across_nodes(two_nodes, mint):
    received = []
    here, there = two_nodes
    async with (
        client(here, client="participant", lesson_id="1") as near,
        client(there, client="participant", lesson_id="1", access_token=mint()) as far,
        client(there, client="participant", lesson_id="1") as waiting,
    ):
        for name, sio in (("near", near), ("far", far), ("waiting", waiting)):
            sio.on("news", lambda data, name=name: received.append(name))
        assert await answered(near, far) == [SUCCESS] * 2
        await until(lambda: is_ready(there))  # its subscription hears
        await here._protocol.sio.emit("news", {}, room="1")
        await until(lambda: sorted(received) == ["far", "near"])
        assert await join(waiting) == SUCCESS  # a round trip later, it has heard nothing
        assert sorted(received) == ["far", "near"]


@pytest.mark.gen_test
async def test_a_subscription_that_was_cut_is_made_again(two_nodes, redis_client):
    received = []
    here, there = two_nodes
    async with client(there, client="participant", lesson_id="1") as far:
        far.on("news", received.append)
        assert await join(far) == SUCCESS
        await until(lambda: is_ready(there))
        redis_client.client_kill_filter(_type="pubsub")
        await until(lambda: redis_client.pubsub_numsub("lesson_node_rooms") == [("lesson_node_rooms", 2)], RECOVERED)
        await here._protocol.sio.emit("news", "again", room="1")
        await until(lambda: received == ["again"])


@pytest.mark.gen_test
async def test_a_subscription_that_hears_nothing_is_not_ready_and_is_replaced(
    server, redis_proxy, redis_client, monkeypatch
):
    """A firewall forgot it: its socket is open, and deaf; all others work."""
    monkeypatch.setattr(receiver, "PING_INTERVAL", 0.5)
    monkeypatch.setattr(receiver, "RECEIVE_TIMEOUT", 1.2)
    redis_client.client_kill_filter(_type="pubsub")  # the next one knows the shorter times
    await until(lambda: is_ready(server))
    redis_proxy.deafen()
    await until(lambda: not_ready_because_of(server, "rooms"))
    await until(lambda: is_ready(server))


@pytest.mark.parametrize("at_another_node", [False, True], ids=["at one node", "at two nodes"])
@pytest.mark.parametrize(("kind", "role"), [("participant", "student"), ("teacher", "teacher")])
def test_of_two_tabs_the_later_join_counts_and_the_old_sockets_end_does_not_matter(
    io_loop, two_nodes, redis_client, mint, at_another_node, kind, role
):
    async def story():
        here, there = two_nodes
        token = mint("anna", role)
        async with client(here, client=kind, lesson_id="1", access_token=token) as old:
            assert await join(old) == SUCCESS
            async with client(
                there if at_another_node else here, client=kind, lesson_id="1", access_token=token
            ) as new:
                assert await join(new) == SUCCESS
                assert present(redis_client) == {"anna": new.get_sid()}
                old_sid = old.get_sid()
                await old.disconnect()
                await until(lambda: old_sid not in indexed(redis_client))
                assert present(redis_client) == {"anna": new.get_sid()}
                assert redis_client.exists("anna")
            await until(lambda: not present(redis_client))

    io_loop.run_sync(story)


@pytest.mark.parametrize("at_another_node", [False, True], ids=["at one node", "at two nodes"])
@pytest.mark.parametrize(("kind", "role"), [("participant", "student"), ("teacher", "teacher")])
def test_when_the_newest_of_several_tabs_ends_the_one_before_it_stands(
    io_loop, two_nodes, redis_client, mint, at_another_node, kind, role
):
    async def story():
        here, there = two_nodes
        auth = {"client": kind, "lesson_id": "1", "access_token": mint("anna", role)}
        async with client(here, **auth) as first, client(here, **auth) as second:
            assert await answered(first, second) == [SUCCESS] * 2
            async with client(there if at_another_node else here, **auth) as third:
                assert await join(third) == SUCCESS
                assert present(redis_client) == {"anna": third.get_sid()}
            await until(lambda: present(redis_client) == {"anna": second.get_sid()}, 2)
            await second.disconnect()
            await until(lambda: present(redis_client) == {"anna": first.get_sid()}, 2)
            person = {"lesson_id": "1"} if kind == "teacher" else {"sid": first.get_sid()}
            assert person.items() <= redis_client.hgetall("anna").items()
        await until(lambda: not present(redis_client), 2)

    io_loop.run_sync(story)


@pytest.mark.gen_test(timeout=60)
async def test_when_the_node_of_the_newest_tab_dies_the_one_before_it_stands(start_node, environ, redis_client, mint):
    here, there = start_node(environ), start_node(environ)
    auth = {"client": "participant", "lesson_id": "1", "access_token": mint("anna")}
    async with client(here, **auth) as first, client(there, **auth) as second:
        assert await join(first) == await join(second) == SUCCESS
        there.send(signal.SIGKILL)
        await until(lambda: present(redis_client) == {"anna": first.get_sid()})
        assert redis_client.hget("anna", "sid") == first.get_sid()


@pytest.mark.parametrize(("kind", "role"), [("participant", "student"), ("teacher", "teacher")])
def test_who_moves_between_lessons_is_in_the_new_one_only(io_loop, two_nodes, redis_client, sql, mint, kind, role):
    """The new lesson's join comes before the old socket's end, at another node."""
    sql.execute("INSERT INTO lessons (id) VALUES ('2')")

    async def story():
        here, there = two_nodes
        async with client(there, client=kind, lesson_id="2", access_token=mint("anna", role)) as new:
            async with client(here, client=kind, lesson_id="1", access_token=mint("anna", role)) as old:
                assert await join(old) == SUCCESS
                assert await join(new) == SUCCESS
                assert present(redis_client, "2") == {"anna": new.get_sid()}
            await until(lambda: not present(redis_client, "1"))
            assert present(redis_client, "2") == {"anna": new.get_sid()}
            expected = {"lesson_id": "2"} if kind == "teacher" else {"sid": new.get_sid()}
            assert expected.items() <= redis_client.hgetall("anna").items()

    io_loop.run_sync(story)
