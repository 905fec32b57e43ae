"""shard.py: every step is answered, whatever becomes of the round trip that it is part of."""

import asyncio

import hiredis
import pytest
from fakes import run, settle
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError, ResponseError

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.redis.shard import MAX_STEPS, Part, Shard, Step


class FakeRedis:
    """A client of redis-py, its pool and its one connection. A test says what the commands are answered; by default
    nothing, until ``answer`` is set."""

    socket_timeout = 3600.0

    def __init__(self):
        self.answers = None
        self.answer = asyncio.Event()
        self.pings = 0
        self.asked = []
        self.lent = 0
        self.is_connected = self.is_closed = False
        self.breaks = False
        self.connection_pool = self
        self.retry = Retry(NoBackoff(), 0)

    async def ping(self):
        self.pings += 1
        raise RedisConnectionError("down")

    async def aclose(self):
        self.is_closed = True

    # The pool

    async def get_connection(self):
        self.lent += 1
        return self

    # The connection

    async def connect(self):
        self.is_connected = True

    async def disconnect(self):
        self.is_connected = False

    async def send_packed_command(self, packed):
        assert self.is_connected
        assert self.socket_timeout is None
        reader = hiredis.Reader(encoding="utf-8")
        reader.feed(packed)
        self.asked.append([tuple(command) for command in iter(reader.gets, False)])
        if self.breaks:
            self.breaks = False
            raise RedisConnectionError("broken")

    async def parse_response(self, connection, name):
        if self.answers is None:
            await self.answer.wait()
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer


def make_shard(client, redirect=None, failures=None, pool_size=1):
    failures = [] if failures is None else failures
    return Shard("Redis", client, pool_size, redirect, lambda: failures.append("failed"))


def submit(shard, *commands, parts=1):
    """Submits a step, or one of its parts; the others are for other shards."""
    step = Step(commands, 0, [None] * len(commands), asyncio.get_running_loop().create_future(), parts)
    shard.submit(Part(step, range(len(commands))))
    return step.done


async def is_refused(done):
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(5):
            await done


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_round_trip_that_is_given_up_at_any_turn_of_the_loop_answers_its_steps(turns):
    """Cancelled before its first step, a task runs none of its own code."""

    async def scenario():
        client = FakeRedis()
        shard = make_shard(client)
        first, second = submit(shard, ("GET", "a")), submit(shard, ("GET", "b"))
        for _ in range(turns):
            await asyncio.sleep(0)
        third = submit(shard, ("GET", "c"))
        shard._fail_all()
        for done in (first, second, third):
            await is_refused(done)
        await settle()
        submit(shard, ("GET", "d"))
        await settle()
        assert client.lent == 1  # the connection is there again
        await shard.close()

    run(scenario())


def test_what_is_asked_for_while_no_round_trip_is_under_way_is_sent_in_the_next_turn():
    async def scenario():
        client = FakeRedis()
        shard = make_shard(client, pool_size=2)
        submit(shard, ("GET", "a"))
        submit(shard, ("GET", "b"))
        await asyncio.sleep(0)
        assert client.asked == [[("GET", "a"), ("GET", "b")]]
        await shard.close()

    run(scenario())


def test_while_a_round_trip_is_under_way_the_next_one_lets_steps_of_the_next_turn_in():
    async def scenario():
        client = FakeRedis()
        shard = make_shard(client, pool_size=2)
        submit(shard, ("GET", "a"))
        await settle()
        submit(shard, ("GET", "b"))
        await asyncio.sleep(0)
        submit(shard, ("GET", "c"))
        await settle()
        assert client.asked == [[("GET", "a")], [("GET", "b"), ("GET", "c")]]
        await shard.close()

    run(scenario())


def test_a_connection_that_breaks_is_connected_anew_as_the_pool_does_it():
    """The pool of a Sentinel asks where the master is now."""

    async def scenario():
        client = FakeRedis()
        client.retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        client.answers = {"GET": "1"}
        client.breaks = True
        shard = make_shard(client)
        assert await submit(shard, ("GET", "a")) == ["1"]
        assert client.asked == [[("GET", "a")]] * 2
        await shard.close()

    run(scenario())


def test_a_shard_that_is_closed_answers_what_waits_and_what_comes_and_asks_nobody_any_more():
    async def scenario():
        client, failures = FakeRedis(), []
        shard = make_shard(client, failures=failures)
        under_way = submit(shard, ("GET", "a"))
        await settle()
        waiting = submit(shard, ("GET", "b"))
        async with asyncio.timeout(5):
            await shard.close()
        assert not shard._round_trips
        assert client.is_closed
        for done in (under_way, waiting):
            await is_refused(done)
        await is_refused(submit(shard, ("GET", "c")))
        await settle()
        assert client.asked == [[("GET", "a")]]
        assert (client.pings, failures) == (0, [])

    run(scenario())


def test_a_refusal_is_told_only_when_the_rest_has_been_carried_out():
    async def scenario():
        client = FakeRedis()
        client.answers = {"REFUSED": ResponseError("WRONGTYPE"), "DOWN": ResponseError("LOADING"), "GET": "1"}
        shard = make_shard(client)
        with pytest.raises(StoreRefused):
            await submit(shard, ("REFUSED",), ("GET",))
        with pytest.raises(StoreUnavailable) as caught:
            await submit(shard, ("REFUSED",), ("DOWN",))
        assert not isinstance(caught.value, StoreRefused)
        await shard.close()

    run(scenario())


def test_redirections_that_fail_cost_one_timeout_and_not_one_each():
    async def scenario():
        client, redirected = FakeRedis(), []
        client.answers = {"MOVED": MovedError("1 127.0.0.1:7001"), "GET": "1"}

        async def redirect(command):
            redirected.append(command)
            raise RedisConnectionError("the other master hangs")

        shard = make_shard(client, redirect)
        answered = submit(shard, ("GET", "a"))
        moved = [submit(shard, ("MOVED", str(number))) for number in range(3)]
        assert await answered == ["1"]
        for done in moved:
            await is_refused(done)
        assert len(redirected) == 1
        await shard.close()

    run(scenario())


def test_a_redirection_that_is_refused_fails_no_other():
    """A key of another type says nothing of the master, and StoreRefused says that all else has been carried out."""

    async def scenario():
        client = FakeRedis()
        client.answers = {"MOVED": MovedError("1 127.0.0.1:7001")}

        async def redirect(command):
            if command[1] == "list":
                raise ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
            return f"answer to {command[1]}"

        shard = make_shard(client, redirect)
        refused, answered = submit(shard, ("MOVED", "list")), submit(shard, ("MOVED", "hash"))
        with pytest.raises(StoreRefused):
            await refused
        assert await answered == ["answer to hash"]
        await shard.close()

    run(scenario())


def test_what_has_moved_is_answered_by_the_master_that_has_it_now():
    async def scenario():
        client = FakeRedis()
        client.answers = {"MOVED": MovedError("1 127.0.0.1:7001"), "GET": "1"}

        async def redirect(command):
            return f"answer to {command[1]}"

        shard = make_shard(client, redirect)
        assert await submit(shard, ("GET", "a"), ("MOVED", "b")) == ["1", "answer to b"]
        await shard.close()

    run(scenario())


def test_a_defect_is_told_to_the_caller_and_is_no_failure_of_redis():
    async def scenario():
        client, failures = FakeRedis(), []
        client.answers = {}
        shard = make_shard(client, failures=failures)
        with pytest.raises(KeyError):
            await submit(shard, ("GET", "a"))
        assert failures == []
        await shard.close()

    run(scenario())


@pytest.mark.parametrize("pool_size", [1, 2])
def test_steps_share_round_trips_of_which_as_many_are_under_way_as_the_pool_has_connections(pool_size):
    async def scenario():
        client = FakeRedis()
        shard = make_shard(client, pool_size=pool_size)
        first = [submit(shard, ("GET", "a")) for _ in range(MAX_STEPS)]
        others = [submit(shard, ("GET", "b")) for _ in range(MAX_STEPS + 1)]
        await settle()
        assert client.lent == pool_size
        assert [len(commands) for commands in client.asked] == [MAX_STEPS] * pool_size
        client.answers = {"GET": "1"}
        client.answer.set()
        assert await asyncio.gather(*first, *others) == [["1"]] * (2 * MAX_STEPS + 1)
        assert [len(commands) for commands in client.asked] == [MAX_STEPS, MAX_STEPS, 1]
        await shard.close()

    run(scenario())


def test_a_step_is_answered_when_the_last_of_its_parts_is():
    async def scenario():
        clients = FakeRedis(), FakeRedis()
        shards = [make_shard(client) for client in clients]
        done = asyncio.get_running_loop().create_future()
        step = Step((("GET", "a"), ("GET", "b")), 0, [None, None], done, 2)
        for number, (client, shard) in enumerate(zip(clients, shards, strict=True)):
            client.answers = {"GET": number}
            assert not done.done()
            shard.submit(Part(step, [number]))
            await settle()
        assert await done == [0, 1]
        for shard in shards:
            await shard.close()

    run(scenario())


def test_a_caller_who_gives_up_does_not_take_the_answers_from_those_who_share_the_round_trip():
    async def scenario():
        client = FakeRedis()
        shard = make_shard(client)
        first, second = submit(shard, ("GET", "a")), submit(shard, ("GET", "b"))
        await settle()
        first.cancel()
        client.answers = {"GET": "1"}
        client.answer.set()
        async with asyncio.timeout(5):
            assert await second == ["1"]
        await shard.close()

    run(scenario())


def test_a_part_that_was_refused_is_not_sent_later():
    """Its step waits for another master of the cluster; it must not be carried out after it was given up."""

    async def scenario():
        client = FakeRedis()
        shard = make_shard(client)
        submit(shard, ("GET", "a"))
        await settle()
        submit(shard, ("GET", "b"), parts=2)
        shard._fail_all()
        await settle()
        assert client.asked == [[("GET", "a")]]
        await shard.close()

    run(scenario())


def test_a_shard_of_which_nothing_is_wanted_does_nothing():
    async def scenario():
        client = FakeRedis()
        client.answers = {"GET": "1"}
        shard = make_shard(client)
        assert await submit(shard, ("GET", "a")) == ["1"]
        await settle()
        assert not shard._beginning
        await shard.close()

    run(scenario())


def test_each_round_trip_of_a_connection_has_the_same_time_and_no_more():
    async def scenario():
        client = FakeRedis()
        client.socket_timeout = 0.05
        client.answers = {"GET": "1"}
        shard = make_shard(client)
        assert await submit(shard, ("GET", "a")) == ["1"]
        client.answers = None
        with pytest.raises(StoreUnavailable) as caught:
            async with asyncio.timeout(5):
                await submit(shard, ("GET", "a"))
        assert caught.value.cause == "Redis: no answer within 0.05 s"
        await shard.close()

    run(scenario())


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ResponseError("OOM command not\nallowed"), "OOM command not allowed"),
        (RedisConnectionError("down"), "down"),
        (RedisConnectionError(), "ConnectionError"),
    ],
)
def test_a_redis_that_can_not_serve_has_failed_and_one_with_a_foreign_key_has_not(error, cause):
    async def scenario():
        client, failures = FakeRedis(), []
        client.answers = {"SET": error, "HSET": ResponseError("WRONGTYPE"), "GET": "1"}
        shard = make_shard(client, failures=failures)
        with pytest.raises(StoreRefused):
            await submit(shard, ("GET", "a"), ("HSET", "a"))
        assert failures == []
        with pytest.raises(StoreUnavailable) as caught:
            await submit(shard, ("GET", "a"), ("SET", "a"))
        assert not isinstance(caught.value, StoreRefused)
        assert caught.value.cause == f"Redis: {cause}"
        assert failures == ["failed"]
        await settle()
        assert failures == ["failed"] * 2  # the probe, too
        await is_refused(submit(shard, ("GET", "a")))
        assert len(client.asked) == 2  # it is known now
        await shard.close()

    run(scenario())


def test_when_redis_is_known_not_to_answer_nobody_waits_for_it_any_more():
    async def scenario():
        client = FakeRedis()
        shard = make_shard(client)
        under_way = submit(shard, ("GET", "a"))
        await settle()
        waiting = submit(shard, ("GET", "b"))
        shard.availability.failed("timeout")
        for done in (under_way, waiting):
            await is_refused(done)
        await settle()
        assert not shard._round_trips
        assert shard.availability._probing
        await shard.close()
        assert not shard.availability._probing

    run(scenario())
