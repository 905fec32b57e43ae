"""The Valkey of a data directory."""

from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import redis

from lesson_server.embedded.data_dir import DataDir
from lesson_server.embedded.processes import Server, spawn


class Valkey:
    """Valkey, reachable by a unix socket only.

    Args:
        directory: the data directory, with its sockets made.
        program: valkey-server.

    Attributes:
        url: the URL, for redis-py.
    """

    def __init__(self, directory: DataDir, program: Path) -> None:
        self._directory = directory
        self._program = program
        self._socket = directory.sockets / "valkey.sock"
        self.url = f"unix://{quote(str(self._socket))}"

    def spawn(self) -> Server:
        """Start Valkey; the caller stops it."""
        self._directory.valkey.mkdir(mode=0o700, exist_ok=True)
        settings: dict[str, str | Path] = {
            "port": "0",
            "unixsocket": self._socket,
            "unixsocketperm": "700",
            "dir": self._directory.valkey,
            "appendonly": "yes",
            "save": "",  # no snapshots: the append-only file is enough
            "set-proc-title": "no",  # keeps the command line, which find_servers compares
        }
        options = (word for name, value in settings.items() for word in (f"--{name}", value))
        return spawn("Valkey", [self._program, *options], self._directory.root)

    def answers(self) -> bool:
        """Return whether Valkey answers."""
        try:
            with closing(redis.Redis.from_url(self.url)) as client:
                return bool(client.ping())
        except redis.ConnectionError:  # also while Valkey loads its data
            return False
