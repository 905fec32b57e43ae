"""One Redis server (or one master of a Redis Cluster): its availability, batches and error translation."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import (
    AskError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from lesson_server.errors import StoreRefused, StoreUnavailable
from lesson_server.stores.availability import Availability
from lesson_server.stores.redis.pipelines import Pipelines, Redis
from lesson_server.stores.redis.store import Command

# What redis-py raises when Redis does not serve a command. RedisClusterException, raised when a cluster is gone, is no
# RedisError. UnicodeDecodeError means that another application has written bytes that are no text to one of our keys.
FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError, UnicodeDecodeError)
# What a master of a cluster answers to a command that another master serves. MovedError is an AskError.
REDIRECTIONS = (AskError, TryAgainError)

# Maximum number of steps that share a round trip: a batch of this size is answered in about 5 ms.
MAX_STEPS = 200


@dataclass(slots=True)
class Step:
    """The commands of one call of :meth:`RedisStore.execute`.

    Attributes:
        commands: all commands; the first ``bookkeeping`` of them may fail.
        answers: filled in as the shards answer; an exception for each failed command.
        unanswered: number of parts of the step that have not been answered.
        done: resolves to the answers, for the caller.
    """

    commands: tuple[Command, ...]
    bookkeeping: int
    answers: list[Any]
    done: "asyncio.Future[list[Any]]"
    unanswered: int = 0


@dataclass(slots=True)
class Part:
    """The commands of a step that one shard serves: all commands, unless Redis is a cluster."""

    step: Step
    positions: range | list[int]


class Shard:
    """A Redis server whose concurrent steps share round trips.

    The commands of steps that are submitted at the same moment are sent as one pipeline. At the start of a lesson most
    steps are, and a shared round trip costs a fifth of separate round trips.

    Args:
        name: the operators' name for the server.
        client: a redis-py client of this server alone.
        pool_size: maximum number of concurrent round trips; parts submitted meanwhile are sent with the next one.
        redirect: executes one command that another master serves. None: the server is not part of a cluster.
        on_failure: called when a request has failed because of the server.
    """

    def __init__(
        self,
        name: str,
        client: Redis,
        pool_size: int,
        redirect: Callable[[Command], Awaitable[Any]] | None,
        on_failure: Callable[[], None],
    ) -> None:
        self.client = client
        self.availability = Availability(name, self._probe, self._fail_all)
        self._pipelines = Pipelines(client)
        self._name = name
        self._pool_size = pool_size
        self._redirect = redirect
        self._on_failure = on_failure
        self._waiting: deque[Part] = deque()
        self._round_trips: set[asyncio.Task[None]] = set()
        self._beginning = False  # a round trip is scheduled, and has not taken its parts yet
        self._closed = False

    def submit(self, part: Part) -> None:
        """Send a part with the next round trip, or fail the part at once if the server is unavailable."""
        try:
            self.availability.require()
        except StoreUnavailable as error:
            self._settle(part, [error] * len(part.positions))
        else:
            self._waiting.append(part)
            self._begin_soon()
        if self._closed:
            self._fail_all()

    async def close(self) -> None:
        """Cancel the round trips in progress, fail the queued parts, and close the connections."""
        self._closed = True
        await self.availability.close()
        self._fail_all()
        if self._round_trips:
            await asyncio.wait(self._round_trips)
        await self.client.aclose()

    async def _probe(self) -> None:
        try:
            await self.client.ping()
        except Exception:
            self._on_failure()
            raise

    def _fail_all(self) -> None:
        """Cancel all round trips and fail all parts, because the server is unavailable or the shard is closed."""
        for task in self._round_trips:
            task.cancel()
        self._beginning = False  # a task that is cancelled before it starts does not reset this
        self._refuse(self._waiting)
        self._waiting.clear()

    def _refuse(self, parts: Iterable[Part]) -> None:
        for part in parts:
            self._settle(part, [self.availability.refusal()] * len(part.positions))

    def _begin_soon(self) -> None:
        """Schedule a round trip for the next event loop iteration, so that it takes all parts of this iteration."""
        if not self._closed and not self._beginning and self._waiting and len(self._round_trips) < self._pool_size:
            self._beginning = True
            task = asyncio.create_task(self._round_trip())
            self._round_trips.add(task)
            task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[None]") -> None:
        self._round_trips.discard(task)
        self._begin_soon()

    async def _round_trip(self) -> None:
        """Send the queued parts."""
        for _ in range(len(self._round_trips) - 1):  # the more round trips in progress, the larger the batch
            await asyncio.sleep(0)
        self._beginning = False
        parts = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_STEPS))]
        # A step whose caller was cancelled must not be executed: the removal of its record may have begun.
        parts = [part for part in parts if not part.step.done.done()]
        self._begin_soon()
        try:
            if parts:
                await self._execute(parts)
        except asyncio.CancelledError:
            self._refuse(parts)
            raise

    async def _execute(self, parts: list[Part]) -> None:
        """Send the commands of the parts as one pipeline, and settle the parts.

        All errors of redis-py are translated here.
        """
        commands = [part.step.commands[position] for part in parts for position in part.positions]
        answers: list[Any]
        try:
            answers = await self._pipelines.execute(commands)
            if self._redirect is not None:
                answers = await self._follow(commands, answers)
        except Exception as error:  # an error of redis-py, or a defect, which the callers report
            answers = [error] * len(commands)
        start = 0
        for part in parts:
            end = start + len(part.positions)
            self._settle(part, [self._translate(answer) for answer in answers[start:end]])
            start = end
        if not self._closed:
            self._note(answers)

    async def _follow(self, commands: list[Command], answers: list[Any]) -> list[Any]:
        """Execute the commands that this master no longer serves on other masters, e.g. while slots are migrated."""
        assert self._redirect is not None
        failure: Exception | None = None
        for position, answer in enumerate(answers):
            if isinstance(answer, REDIRECTIONS):
                try:
                    answers[position] = failure or await self._redirect(commands[position])
                except FAILURES as error:
                    answers[position] = error
                    if not _is_refusal(error):  # the rest fails too: each command could wait for a timeout
                        failure = error
        return answers

    def _translate(self, answer: Any) -> Any:
        """Translate an error of redis-py into StoreRefused or StoreUnavailable."""
        if isinstance(answer, FAILURES):
            return (StoreRefused if _is_refusal(answer) else StoreUnavailable)(self._name, _cause_of(answer))
        return answer

    def _note(self, answers: list[Any]) -> None:
        """Note a failure of the server, if an answer of a round trip shows one.

        A key of another type is not a failure of the server.
        """
        failure = next((answer for answer in answers if isinstance(answer, FAILURES) and not _is_refusal(answer)), None)
        if failure is not None:
            self.availability.failed(_cause_of(failure))
            self._on_failure()

    @staticmethod
    def _settle(part: Part, answers: list[Any]) -> None:
        """Store the answers of a part, and complete the step after its last part."""
        step = part.step
        for position, answer in zip(part.positions, answers, strict=True):
            step.answers[position] = answer
        step.unanswered -= 1
        if step.unanswered or step.done.done():
            return
        errors = [answer for answer in step.answers[step.bookkeeping :] if isinstance(answer, Exception)]
        if not errors:
            step.done.set_result(step.answers)
        else:  # StoreRefused says that the other commands have been executed: any other error comes first
            step.done.set_exception(next((error for error in errors if not isinstance(error, StoreRefused)), errors[0]))


def _is_refusal(error: Exception) -> bool:
    # Redis 6.2 has "WRONGTYPE" in the middle of the message when a script has accessed the key.
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


def _cause_of(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
