"""The data directory of the embedded stores: its paths, its owner, its sockets and the generated key.

::

    .lesson-server/         0700
        owner               locked while in use: the pid of the owner, then the DSN for ``lesson-server lesson``
        auth.key            0600, signs the access tokens
        postgresql/         the cluster
        postgresql.log
        valkey/             its append-only files
        valkey.log
        sockets/            unix sockets (there is no TCP); a symlink to a shorter path if this path is too long

One process owns a data directory. The owner is the parent of both servers, and stops them when it stops. If the owner
is killed, the servers keep running: the next owner stops them before it starts its own servers.
"""

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from lesson_server.embedded.errors import DataDirInUseError

# The longest path of a unix socket, in bytes: macOS has 104, Linux 108, with the final zero.
SOCKET_PATH_LIMIT = 103


class DataDir:
    """A data directory, owned by this process from ``take`` to ``release``.

    Args:
        path: the directory; ``take`` makes it if it is missing.

    Attributes:
        path: the directory as the operator names it, for messages.
        root: the directory. This path and those below are absolute and without symlinks, because ``find_servers``
            recognizes our servers by these command-line arguments.
        cluster: PostgreSQL's directory.
        new_cluster: PostgreSQL's directory while initdb fills it.
        valkey: Valkey's directory.
        sockets: the directory of the sockets; set by ``make_sockets``.
    """

    sockets: Path

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path.resolve()
        self.cluster = self.root / "postgresql"
        self.new_cluster = self.root / "postgresql.new"
        self.valkey = self.root / "valkey"
        self._sockets_link = self.root / "sockets"
        self._owner: tuple[int, int] | None = None  # pid and lock descriptor, while we own the data directory

    # The owner

    @property
    def is_owned(self) -> bool:
        """Whether this process is the owner. A forked worker is not: its parent is."""
        return self._owner is not None and self._owner[0] == os.getpid()

    def take(self) -> None:
        """Become the owner.

        Raises:
            DataDirInUseError: another process is the owner, or this process is already.
            OSError: the directory can't be made.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.root / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno != errno.EWOULDBLOCK:
                raise
            holder = read_owner(self.root)
            raise DataDirInUseError(f"{self.path} is in use by process {holder[0] if holder else '?'}") from None
        self._owner = os.getpid(), lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def publish(self, dsn: str) -> None:
        """Publish the DSN of the lessons: other processes get it by ``read_owner``."""
        assert self._owner is not None
        pid, lock = self._owner
        os.pwrite(lock, f"{pid}\n{dsn}\n".encode(), 0)

    def withdraw(self) -> None:
        """Remove the published DSN."""
        assert self._owner is not None
        os.ftruncate(self._owner[1], 0)

    def release(self) -> None:
        """Remove the sockets, then unlock the directory for the next owner."""
        assert self._owner is not None
        self.remove_sockets()
        _, lock = self._owner
        self._owner = None
        os.close(lock)

    # The sockets

    def make_sockets(self, longest_name: str) -> None:
        """Make a new private directory for the sockets, whose path is short enough for a socket address.

        Args:
            longest_name: the longest name of a socket, relative to the directory.
        """
        sockets = self._sockets_link
        # libpq reads a comma as a separator of hosts
        if len(os.fsencode(sockets / longest_name)) > SOCKET_PATH_LIMIT or "," in str(sockets):
            sockets = Path(tempfile.mkdtemp(prefix="lesson-server-"))
            self._sockets_link.symlink_to(sockets)  # lets the next owner find the directory if we are killed
        else:
            sockets.mkdir(mode=0o700)
        self.sockets = sockets

    def remove_sockets(self) -> None:
        """Remove the sockets of this owner, or of one that was killed."""
        with suppress(FileNotFoundError):
            if self._sockets_link.is_symlink():
                # Follow one link only: in a public directory, somebody may have replaced the target by a link.
                target = self._sockets_link.readlink()
                self._sockets_link.unlink()
                shutil.rmtree(target)
            else:
                shutil.rmtree(self._sockets_link)

    # The key

    def ensure_key(self) -> str:
        """Return the HMAC key; generate it at the first start."""
        key = read_key(self.root)
        if key is None:
            key = secrets.token_urlsafe(32)
            new = self.root / "auth.key.new"  # a truncated key file would be a weak key
            with open(new, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(key)
            new.replace(self.root / "auth.key")
        return key


# What any process may read


def read_owner(data_dir: Path) -> list[str]:
    """Return the owner's pid, then its DSN if published; an empty list while the owner starts or stops."""
    return (data_dir / "owner").read_text().splitlines()


def read_key(data_dir: Path) -> str | None:
    """Return the generated HMAC key of a data directory, or None before the first start."""
    try:
        return (data_dir / "auth.key").read_text()
    except FileNotFoundError:
        return None
