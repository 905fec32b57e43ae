"""Seats on a Redis Cluster: the master that has the seat map of a lesson, and no other, publishes its changes."""

import asyncio
import contextlib
from functools import partial

import pytest
import redis
from clients import SUCCESS, UNAVAILABLE, join
from redis_cluster import lesson_on, participants
from waiting import until


@pytest.fixture
def two_nodes(io_loop, start_server, cluster):
    nodes = [start_server(LESSON_REDIS_URL=cluster.url, LESSON_REDIS_TIMEOUT="1.0") for _ in range(2)]
    for node in nodes:
        io_loop.run_sync(node._subscription.ping)
    return nodes


@contextlib.asynccontextmanager
async def class_on(nodes, mint, lesson_id, people):
    """A participant on each node; and the changes that each has seen."""
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        seen = {}
        for node, person in zip(nodes, people, strict=True):
            (sio,) = await stack.enter_async_context(participants(node, mint, lesson_id, [person]))
            sio.on("seat_changed", seen.setdefault(person, []).append)
            assert await join(sio) == SUCCESS
            clients.append(sio)
        yield clients, seen


async def take(sio, seat=None):
    return await sio.call("take_seat", *([] if seat is None else [{"seat": seat}]), timeout=10)


def taken(seat):
    return {"status": "SUCCESS", "data": {"seat": seat}}


async def assert_changes_arrive(classes):
    """Everybody of each class takes a seat and leaves it again; the whole class sees each change once."""
    for (first, second), seen in classes:
        for changes in seen.values():
            changes.clear()
        assert await take(first) == taken(1)
        assert await take(second, 3) == taken(3)
        assert await first.call("leave_seat") == await second.call("leave_seat") == SUCCESS
        one, other = seen
        told = [
            {"seat": 1, "client_id": one},
            {"seat": 3, "client_id": other},
            {"seat": 1, "client_id": None},
            {"seat": 3, "client_id": None},
        ]
        await until(partial([told, told].__eq__, list(seen.values())))


def test_the_seats_of_lessons_on_different_masters_are_told_on_all_nodes(io_loop, cluster, two_nodes, sql, mint):
    lessons = [lesson_on(cluster, sql, master) for master in range(3)]

    async def story():
        async with contextlib.AsyncExitStack() as stack:
            classes = [
                await stack.enter_async_context(class_on(two_nodes, mint, lesson_id, ["anna", "ben"]))
                for lesson_id in lessons
            ]
            for master, lesson_id in enumerate(lessons):  # no other master has to do with the lesson
                assert cluster.subscribers(lesson_id) == [2 if each == master else 0 for each in range(3)]
            await assert_changes_arrive(classes)

    io_loop.run_sync(story, timeout=30)


def test_without_a_master_the_seats_of_lessons_on_the_others_are_told(io_loop, cluster, two_nodes, sql, mint):
    deadlines = cluster.master_of("lesson_node_seat_deadlines")  # without it, no seat can be taken
    dead = (deadlines + 1) % 3
    living = [master for master in range(3) if master != dead]
    lessons = [lesson_on(cluster, sql, master) for master in living]
    dead_lesson = lesson_on(cluster, sql, dead)

    async def story():
        async with contextlib.AsyncExitStack() as stack:
            classes = [
                await stack.enter_async_context(class_on(two_nodes, mint, lesson_id, cluster.names(living[0], 2)))
                for lesson_id in lessons
            ]
            (lost, _), _ = await stack.enter_async_context(
                class_on(two_nodes, mint, dead_lesson, cluster.names(living[1], 2))
            )
            cluster.valkeys.kill(cluster.ports[dead])
            assert await take(lost) == UNAVAILABLE
            await assert_changes_arrive(classes)

    io_loop.run_sync(story, timeout=60)


def test_after_a_failover_the_replica_tells_the_changes(io_loop, cluster, two_nodes, sql, mint):
    failing = (cluster.master_of("lesson_node_seat_deadlines") + 1) % 3
    replica = cluster.add_replica(failing)
    lesson_id = lesson_on(cluster, sql, failing)

    async def story():
        async with class_on(two_nodes, mint, lesson_id, ["anna", "ben"]) as group:
            (anna, _), seen = group
            assert await take(anna) == taken(1)
            await until(lambda: all(seen.values()))
            written = {"1": "anna", "2": "", "3": ""}
            await until(lambda: read_from_replica(cluster, replica, lesson_id) == written)
            cluster.valkeys.kill(cluster.ports[failing])
            cluster.valkeys.ask(replica, "CLUSTER", "FAILOVER", "TAKEOVER")
            await until(lambda: cluster.subscribers(lesson_id, [replica]) == [2])
            while await anna.call("leave_seat") != SUCCESS:
                await asyncio.sleep(0.05)
            await until(lambda: all({"seat": 1, "client_id": None} in changes for changes in seen.values()))
            await assert_changes_arrive([group])

    io_loop.run_sync(story, timeout=60)


def read_from_replica(cluster, port, lesson_id):
    with redis.Redis(port=port, decode_responses=True) as replica:
        replica.readonly()
        return replica.hgetall(f"lesson_seat_{lesson_id}")


@pytest.mark.parametrize("is_stale", [False, True], ids=["", "the nodes hear of it late"])
def test_after_its_slot_has_moved_a_lesson_is_told_of_its_changes_again(
    io_loop, cluster, two_nodes, sql, mint, is_stale
):
    """The lessons whose slots stay where they are miss nothing meanwhile."""
    moved, stays = lesson_on(cluster, sql, 0), lesson_on(cluster, sql, 0)
    stale = [hear_late(node._redis) for node in two_nodes] if is_stale else []

    async def story():
        async with (
            class_on(two_nodes, mint, moved, ["anna", "ben"]) as moved_class,
            class_on(two_nodes, mint, stays, ["anna", "ben"]) as (clients, seen),
        ):
            migration = asyncio.create_task(asyncio.to_thread(cluster.migrate, f"lesson_seat_{moved}", 0, 1))
            turns = 0
            while not migration.done() or cluster.subscribers(moved) != [0, 2, 0]:
                assert await take(clients[0]) == taken(1)
                assert await clients[0].call("leave_seat") == SUCCESS
                turns += 1
            told = [{"seat": 1, "client_id": "anna"}, {"seat": 1, "client_id": None}] * turns
            await until(partial([told, told].__eq__, list(seen.values())))
            await assert_changes_arrive([moved_class, (clients, seen)])
            assert stale == [[]] * len(stale)

    io_loop.run_sync(story, timeout=60)


def hear_late(store):
    """The first attempts to find the masters of the cluster again find the former ones."""
    late = ["first", "second"]
    find_servers = store.find_servers

    async def find_servers_late():
        if late:
            late.pop()
        else:
            await find_servers()

    store.find_servers = find_servers_late
    return late
