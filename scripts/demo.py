"""Starts the server with its own stores, runs a lesson, shows the states and the Redis keys, and stops the server.

Exits with 1 at the first failed check, and then shows the end of the server's log.
"""

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from itertools import groupby
from typing import IO, cast

import aiohttp
import redis
from prometheus_client.parser import text_string_to_metric_families
from redis import asyncio as aioredis
from report import Report
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from simulate_participants import participants
from simulate_teacher import teachers
from simulation import EXIT_INTERRUPTED, Signer, SigningError, attending

LESSON = "1"
PARTICIPANTS = 30
GUESTS = 3

# The connections in each state that GET /metrics must report; every other state has none.
EXPECTED_STATES = {
    ("teacher", "registered"): 1,
    ("participant", "registered"): PARTICIPANTS - GUESTS,
    ("participant", "seated"): GUESTS,
}

# Seconds. The first start makes a database cluster, which takes long on a slow machine.
START_TIMEOUT = 60.0
PRESENCE_TIMEOUT = 5.0
STOP_TIMEOUT = 15.0

# The number of keys that are shown of a group of keys that differ only in a number.
ALIKE = 3

LOG_TAIL = 30

console = Console(highlight=False)


class DemoError(Exception):
    """A check of the demo has failed."""


class Server:
    """A running lesson-server.

    Args:
        url: the URL that the server listens on.
        redis_url: the URL of the server's Redis.
    """

    def __init__(self, process: asyncio.subprocess.Process, url: str, redis_url: str) -> None:
        self._process = process
        self.url = url
        self.redis_url = redis_url

    async def stop(self) -> None:
        """Stop the server by SIGTERM; raise DemoError if it does not stop in time or its exit status is not 0."""
        with suppress(ProcessLookupError):  # it has ended by itself: the status is checked below
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                status = await self._process.wait()
        except TimeoutError:
            raise DemoError(f"the server has not stopped within {STOP_TIMEOUT:.0f} s of SIGTERM") from None
        if status != 0:
            raise DemoError(f"the server's exit status is {status}")


@asynccontextmanager
async def started_server(log: IO[bytes]) -> AsyncIterator[Server]:
    """Start a server with its default settings on a free port; the end of the ``async with`` stops the server."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lesson_server.cli", "run", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=log,
        env={name: value for name, value in os.environ.items() if not name.startswith("LESSON_")},
    )
    try:
        yield await _listening(process)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _listening(process: asyncio.subprocess.Process) -> Server:
    """Echo the output of a server until it accepts connections."""
    assert process.stdout is not None
    said = ""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while line := (await process.stdout.readline()).decode():
                console.print(f"[dim]{escape(line.rstrip())}", soft_wrap=True)
                said += line
                if url := re.search(r"^lesson-server listening on (\S+)$", line):
                    break
            else:
                raise DemoError("the server has ended without listening")
    except TimeoutError:
        raise DemoError(f"the server does not listen after {START_TIMEOUT:.0f} s") from None
    redis_url = re.search(r"^Redis: (\S+)$", said, re.MULTILINE)
    if redis_url is None:
        raise DemoError("the server has not named its Redis")
    return Server(process, url[1], redis_url[1])


async def show_states(url: str) -> None:
    """Show the number of connections in each state; raise DemoError if these are not EXPECTED_STATES."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(f"{url}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    states = {
        (sample.labels["client"], sample.labels["state"]): int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "lesson_connections" and sample.labels["event"] == "join_lesson" and sample.value
    }
    table = Table("client", "state")
    table.add_column("connections", justify="right")
    for (client, state), count in sorted(states.items()):
        table.add_row(client, state, str(count))
    console.print(table)
    if states != EXPECTED_STATES:
        raise DemoError(f"the states should be {EXPECTED_STATES}")


async def show_redis(store: aioredis.Redis) -> None:
    """Show the keys in Redis, one row each; of keys that differ only in a number, show the first ALIKE."""
    table = Table(expand=True)
    for column in ("key", "type", "TTL"):
        table.add_column(column, no_wrap=True)
    table.add_column("content", no_wrap=True, ratio=1)
    # Only the keys of the diagrams: the server's own keys would take more rows than the keys of the join.
    keys = sorted([key async for key in store.scan_iter() if not key.startswith("lesson_node")], key=_natural)
    for _, group in groupby(keys, key=lambda key: re.sub(r"\d+", "#", key)):
        alike = list(group)
        for key in alike[:ALIKE]:
            kind, ttl = str(await store.type(key)), await store.ttl(key)
            content = cast(dict[str, str], await store.hgetall(key)) if kind == "hash" else {}
            table.add_row(
                escape(key),
                kind,
                "none" if ttl < 0 else str(timedelta(seconds=ttl)),
                escape(", ".join(f"{field}={value or repr(value)}" for field, value in content.items())),
            )
        if len(alike) > ALIKE:
            table.add_row(f"[dim]and {len(alike) - ALIKE} more like it")
    console.print(table)


def _natural(key: str) -> list[tuple[int, str]]:
    """Return a sort key that puts participant-10 after participant-9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", key)]


async def check_presence(store: aioredis.Redis, *, expected: bool) -> None:
    """Wait until the presence keys of the lesson exist, or are gone; raise DemoError after PRESENCE_TIMEOUT."""
    keys = (f"lesson_teacher_{LESSON}", f"lesson_student_{LESSON}")
    deadline = time.monotonic() + PRESENCE_TIMEOUT
    while await store.exists(*keys) != (len(keys) if expected else 0):
        if time.monotonic() > deadline:
            raise DemoError(f"{' and '.join(keys)} should {'exist' if expected else 'be gone'}")
        await asyncio.sleep(0.05)


async def check_seats(store: aioredis.Redis) -> None:
    """Raise DemoError if a participant with a token has no seat."""
    occupants = set(await cast(Awaitable[list[str]], store.hvals(f"lesson_seat_{LESSON}")))
    standing = {f"participant-{number}" for number in range(1, PARTICIPANTS - GUESTS + 1)} - occupants
    if standing:
        raise DemoError(f"without a seat: {', '.join(sorted(standing, key=_natural))}")


async def demonstrate(log: IO[bytes]) -> None:
    """Run the demo step by step; raise DemoError at the first failed check."""
    # SIGTERM cancels the demo, which then stops its server.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)

    step("Start the server, with a PostgreSQL and a Valkey of its own")
    async with started_server(log) as server:
        sign = Signer("@.lesson-server/auth.key")
        clients = teachers(LESSON, 1, sign) + participants(LESSON, PARTICIPANTS, GUESTS, sign, take_seats=True)
        async with aioredis.Redis.from_url(server.redis_url, decode_responses=True) as store:
            step(f"A teacher and {PARTICIPANTS} participants join lesson {LESSON}; all but {GUESTS} guests take a seat")
            async with attending(clients, server.url):
                report = Report(clients)
                console.print(report.as_table())
                if report.failed:
                    raise DemoError(f"{report.failed} of {len(clients)} could not join, or take a seat")

                step("The states of their connections (GET /metrics)")
                await show_states(server.url)

                step("The records in Redis")
                await check_presence(store, expected=True)
                await check_seats(store)
                await show_redis(store)

            step("All leave; nobody is in the lesson any more, and the seats are kept for those who come back soon")
            await check_presence(store, expected=False)
            await check_seats(store)
            await show_redis(store)

        step("Stop the server")
        await server.stop()


def step(text: str) -> None:
    """Print the title of the next step."""
    console.print(f"\n[bold cyan]{text}")


def main() -> int:
    """Run the demo and return the exit status."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        try:
            asyncio.run(demonstrate(log))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return EXIT_INTERRUPTED
        except (DemoError, SigningError, OSError, aiohttp.ClientError, redis.RedisError) as error:
            log.seek(0)
            for line in log.read().decode(errors="replace").splitlines()[-LOG_TAIL:]:
                console.print(f"[dim]{escape(line)}", soft_wrap=True)
            console.print(f"\n[bold red]The demo has failed: {escape(str(error) or repr(error))}")
            return 1
    console.print(f"\n[bold green]All is well, in {time.monotonic() - started:.1f} s.")
    console.print("To see lessons live: make run, then http://127.0.0.1:8080/console")
    return 0


if __name__ == "__main__":
    sys.exit(main())
