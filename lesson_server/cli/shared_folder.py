"""A temporary folder that several processes share; the workers keep their metrics in one."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path


class SharedFolder:
    """A folder that its last user removes or, if the last user was killed, the next process that makes such a folder.

    The users are the process that makes the folder and the processes forked from it. They share a lock on the folder;
    the kernel releases the lock when the last user has left or ended.

    Args:
        prefix: the beginning of the folder's name; the name of no other folder begins with it.
        suffix: the end of the names of the folder's files; no other file is removed.
    """

    def __init__(self, prefix: str, suffix: str) -> None:
        self._suffix = suffix
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            self._remove_if_unused(left)
        self._lock = self._make(prefix)

    def leave(self) -> None:
        """End this process' use of the folder; the last user removes the folder."""
        os.close(self._lock)
        self._remove_if_unused(self.path)

    def _make(self, prefix: str) -> int:
        """Make the folder and lock it.

        Until the lock is held, another process that starts may remove the folder as unused: then make another one.
        """
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if self.path.exists():
                    return lock
                os.close(lock)

    def _remove_if_unused(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # the folder is in use, another user's, or just removed by another process
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid != os.geteuid():
                    return
                for name in os.listdir(descriptor):  # by descriptor: the path may name another folder by now
                    if name.endswith(self._suffix):
                        os.unlink(name, dir_fd=descriptor)
                path.rmdir()
            finally:
                os.close(descriptor)
