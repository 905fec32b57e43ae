"""A whole server on a Redis Cluster of three masters, of which one fails: what has its keys elsewhere goes on."""

import asyncio
import contextlib
import signal

import pytest
from clients import SUCCESS, UNAVAILABLE, join
from redis_cluster import lesson_on, participants
from roster_api import TOKEN, ask, read
from waiting import until

from lesson_server.errors import StoreUnavailable
from lesson_server.stores.redis import nodes
from lesson_server.stores.redis.client import RedisStore


@pytest.fixture
def server(start_server, cluster):
    return start_server(LESSON_REDIS_URL=cluster.url, LESSON_REDIS_TIMEOUT="1.0")


@pytest.mark.parametrize("fault", ["dead", "hung"])
@pytest.mark.parametrize("of_the_node", [False, True], ids=["another master", "the master of the node's own keys"])
def test_a_master_that_fails_fails_only_the_joins_that_have_a_key_there(
    io_loop, cluster, server, sql, mint, fault, of_the_node
):
    incarnation = server._presence.claims.incarnation
    index_master = cluster.master_of(f"lesson_node_{incarnation.node_id}")
    counts_master = cluster.master_of("lesson_node_counts")
    failing = index_master if of_the_node else next(n for n in range(3) if n not in (index_master, counts_master))
    living = next(n for n in range(3) if n != failing)
    living_lesson, failing_lesson = lesson_on(cluster, sql, living), lesson_on(cluster, sql, failing)
    people = cluster.names(living, 14)

    async def story():
        async with (
            participants(server, mint, living_lesson, people[:12]) as those_who_can,
            participants(server, mint, failing_lesson, people[12:]) as those_who_cannot,
        ):
            cluster.signal(failing, signal.SIGKILL if fault == "dead" else signal.SIGSTOP)
            answers = await asyncio.gather(*map(join, [*those_who_can, *those_who_cannot]))
            assert answers == [SUCCESS] * 12 + [UNAVAILABLE] * 2
            told = cluster.hgetall(f"lesson_student_{living_lesson}")
            assert told == {who: sio.get_sid() for who, sio in zip(people, those_who_can, strict=False)}
            if fault == "hung":
                cluster.signal(failing, signal.SIGCONT)
                for sio in those_who_cannot:
                    while await join(sio) != SUCCESS:
                        await asyncio.sleep(0.05)
                if of_the_node:  # what could not be indexed is indexed now
                    node_id = server._presence.claims.incarnation.node_id
                    await until(lambda: len(cluster.hgetall(f"lesson_node_{node_id}")) == 14)
        await until(lambda: not cluster.hgetall(f"lesson_student_{living_lesson}"))

    io_loop.run_sync(story, timeout=60)
    if fault == "dead":
        cluster.valkeys._running.pop(cluster.ports[failing]).wait()


def test_what_a_master_that_came_back_empty_has_lost_is_written_again(
    io_loop, cluster, start_server, sql, mint, monkeypatch
):
    """The count and the index of the node are on other masters, and so are some of the records."""
    monkeypatch.setattr(nodes, "CHECK_PERIOD", 0.5)
    server = start_server(LESSON_REDIS_URL=cluster.url)
    node_id = server._presence.claims.incarnation.node_id
    kept = {cluster.master_of(f"lesson_node_{node_id}"), cluster.master_of("lesson_node_counts")}
    emptied = next(n for n in range(3) if n not in kept)
    lesson_id = lesson_on(cluster, sql, emptied)
    people = cluster.names(emptied, 2) + cluster.names(kept.pop(), 2)

    async def story():
        async with participants(server, mint, lesson_id, people) as joined:
            assert await asyncio.gather(*map(join, joined)) == [SUCCESS] * 4
            keys = [f"lesson_student_{lesson_id}", f"lesson_seat_{lesson_id}", *people]
            before = {key: cluster.hgetall(key) for key in keys}
            cluster.valkeys.ask(cluster.ports[emptied], "FLUSHALL")
            await until(lambda: {key: cluster.hgetall(key) for key in keys} == before)
            assert server._presence.claims.incarnation.node_id == node_id

    io_loop.run_sync(story, timeout=60)


def test_the_rooms_need_no_certain_master(io_loop, cluster):
    """Each master passes a message on to all others. One that is dead is found so by messages that fail."""

    async def story():
        store = RedisStore(cluster.url, "", 1.0, 2)
        await store.ping()
        dead = cluster.ports.index(store.client.get_primaries()[0].port)
        (channel,) = cluster.names(dead, 1)
        cluster.signal(dead, signal.SIGKILL)
        passed_on = []
        async with asyncio.timeout(10):
            while not passed_on:
                with contextlib.suppress(StoreUnavailable):
                    passed_on = await store.execute(("PUBLISH", channel, "news"))
                await asyncio.sleep(0.01)
        await store.close()
        cluster.valkeys._running.pop(cluster.ports[dead]).wait()

    io_loop.run_sync(story, timeout=60)


@pytest.fixture
def admin_nodes(io_loop, start_server, cluster):
    nodes = [start_server(LESSON_REDIS_URL=cluster.url, LESSON_ADMIN_TOKEN=TOKEN) for _ in range(2)]
    for node in nodes:
        io_loop.run_sync(node._subscription.ping)
    return nodes


def test_the_roster_reads_all_masters_and_a_person_is_removed_on_whichever(io_loop, cluster, admin_nodes, sql, mint):
    here, there = admin_nodes
    lessons = sorted(lesson_on(cluster, sql, master) for master in range(3))

    async def story():
        async with contextlib.AsyncExitStack() as stack:
            ends = []
            for lesson_id in lessons:
                for sio in await stack.enter_async_context(participants(there, mint, lesson_id, ["p1", "p2"])):
                    sio.on("disconnect", ends.append)
                    assert await join(sio) == SUCCESS
            counts = [
                {"lesson_id": lesson_id, "teachers": 0, "participants": 2, "seats": 3, "taken": 0}
                for lesson_id in lessons
            ]
            assert await read(here, "/api/lessons") == {"lessons": counts, "cursor": None}
            removed = []
            for lesson_id in lessons:
                people = (await read(here, f"/api/lessons/{lesson_id}"))["participants"]
                assert [(one["client_id"], one["role"]) for one in people] == [("p1", "student"), ("p2", "student")]
                assert (await ask(here, f"/api/lessons/{lesson_id}/participants/p1", "DELETE")).code == 204
                removed.append(lesson_id)
                await until(lambda: len(ends) == len(removed))
                assert list(cluster.hgetall(f"lesson_student_{lesson_id}")) == ["p2"]
            assert (await read(there, "/api/overview"))["participants"] == 3

    io_loop.run_sync(story, timeout=30)
