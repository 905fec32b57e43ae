"""Teachers, participants and guests, and what they hold in Redis."""

import asyncio
import contextlib
from types import SimpleNamespace

from clients import SUCCESS, client, join
from presences import SHARED_KEYS
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server.server import LessonServer
from lesson_server.settings.sources import load

# The contract: seconds in which a join is answered, and in which a server is itself again once a store has returned.
ANSWERED = 5.0

RECOVERED = 5.0


@contextlib.asynccontextmanager
async def serving(environ, **more):
    """A node in this process."""
    server = LessonServer(load(environ={**environ, **more}))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def everyone(node, mint):
    """One client in each state that lasts; ``joining`` is one for the test to put into the middle of its join."""
    async with (
        client(node, client="participant", lesson_id="1", access_token=mint("connected")) as connected,
        client(node, client="participant", lesson_id="1", access_token=mint("joining")) as joining,
        client(node, client="participant", lesson_id="1") as seated,
        client(node, client="participant", lesson_id="1", access_token=mint("registered")) as registered,
        client(node, client="teacher", lesson_id="1", access_token=mint("teacher", "teacher")) as teacher,
    ):
        for sio in (seated, registered, teacher):
            assert await join(sio) == SUCCESS
        yield SimpleNamespace(
            connected=connected, joining=joining, seated=seated, registered=registered, teacher=teacher
        )


def present(redis_client, lesson_id="1"):
    """Whom Redis tells to be in a lesson, and by which sid."""
    return {
        **redis_client.hgetall(f"lesson_teacher_{lesson_id}"),
        **redis_client.hgetall(f"lesson_student_{lesson_id}"),
    }


def is_whole(redis_client, people, *names):
    """Whether Redis tells the whole truth: exactly these are there, each by its sid, and the lesson has its seats."""
    return (
        present(redis_client) == {name: vars(people)[name].get_sid() for name in names}
        and redis_client.hlen("lesson_seat_1") == 30
    )


def indexes(redis_client):
    """The indexes of the nodes that hold somebody."""
    return [key for key in redis_client.keys("lesson_node_*") if ":" not in key and key not in SHARED_KEYS]


def indexed(redis_client):
    """What stands in the indexes of the nodes."""
    return "".join(entry for key in indexes(redis_client) for entry in redis_client.hvals(key))


def has_no_trace_of(redis_client, who):
    """Whether nothing of a client that never got in stands in Redis."""
    claims = redis_client.keys(f"lesson_node_claims:{who}*") + redis_client.keys(f"lesson_node_claims*{{{who}}}")
    return not (redis_client.exists(who) or who in present(redis_client) or who in indexed(redis_client) or claims)


async def get(node, path):
    answer = await AsyncHTTPClient().fetch(node.url + path, raise_error=False, request_timeout=ANSWERED)
    return answer.code, answer.body.decode()


async def is_ready(node):
    return (await get(node, "/readyz"))[0] == 200


async def answered(*people):
    """Their joins' answers, each of which comes within the contract's time."""
    async with asyncio.timeout(ANSWERED):
        return await asyncio.gather(*map(join, people))


async def held_up(node, state="lesson_validated", count=1):
    """Waits until a join is held up by Redis in that state of the chart, where ``count`` participants are then."""

    async def reached():
        _, text = await get(node, "/metrics")
        return f'lesson_connections{{client="participant",event="join_lesson",state="{state}"}} {count}.0' in text

    await until(reached)


async def joins_through(fault, people, server, redis_proxy, redis_client):
    """One joins; while Redis has not answered, something happens; and then the join is whole."""
    redis_proxy.hang()
    joining = asyncio.ensure_future(join(people.joining))
    await held_up(server)
    fault()
    redis_proxy.restore()
    assert await joining == SUCCESS
    await until(lambda: is_whole(redis_client, people, "joining", "registered", "teacher"))


async def succeeds(sio):
    return await join(sio) == SUCCESS


async def not_ready_because_of(node, what):
    code, named = await get(node, "/readyz")
    return code == 503 and what in named
