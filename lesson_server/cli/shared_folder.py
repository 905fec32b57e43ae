"""A temporary folder that several processes use, as the workers do for their metrics."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path


class SharedFolder:
    """A folder that goes with the last process that uses it, or, when that one was killed, when the next one is made.

    Users are the process that makes it and those that are forked from it. They share a lock on the folder, which the
    kernel releases when the last of them has left or ended.

    Args:
        prefix: what its name begins with, and that of no other folder.
        suffix: what the names of its files end in; nothing else is removed.
    """

    def __init__(self, prefix: str, suffix: str) -> None:
        self._suffix = suffix
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            self._remove_if_unused(left)
        self._lock = self._make(prefix)

    def leave(self) -> None:
        """End the use of the folder by this process."""
        os.close(self._lock)
        self._remove_if_unused(self.path)

    def _make(self, prefix: str) -> int:
        """Make the folder and lock it. Another process that starts may take it for left over before it is locked."""
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if self.path.exists():
                    return lock
                os.close(lock)

    def _remove_if_unused(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # it is in use, or another user's, or another process has just removed it
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid != os.geteuid():
                    return
                for name in os.listdir(descriptor):  # by the descriptor: the path may be another folder's by now
                    if name.endswith(self._suffix):
                        os.unlink(name, dir_fd=descriptor)
                path.rmdir()
            finally:
                os.close(descriptor)
