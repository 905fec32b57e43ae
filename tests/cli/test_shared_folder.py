"""shared_folder.py with processes that are forked as the workers are."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from lesson_server.cli.shared_folder import SharedFolder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make():
    return SharedFolder("shared-", ".db")


class Child:
    """A process that uses a folder until it is told to leave it, or killed."""

    def __init__(self, folder):
        told, self._tell = os.pipe()
        ready, is_ready = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._tell)
            os.write(is_ready, b".")
            os.read(told, 1)
            folder.leave()
            os._exit(0)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        os.close(is_ready)

    def leave(self):
        os.close(self._tell)
        assert os.waitpid(self._pid, 0)[1] == 0

    def kill(self):
        os.close(self._tell)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@pytest.mark.parametrize("first", [0, 1])
def test_a_folder_goes_with_the_last_that_leaves_it(first):
    folder = make()
    (folder.path / "1.db").touch()
    users = [folder, Child(folder)]
    users.pop(first).leave()
    assert (folder.path / "1.db").exists()
    users.pop().leave()
    assert not folder.path.exists()


def test_a_folder_whose_users_were_killed_goes_when_the_next_is_made():
    folder = make()
    child = Child(folder)
    os.close(folder._lock)  # as when this process is killed
    other = make()
    assert folder.path.exists()
    child.kill()
    make().leave()
    assert not folder.path.exists()
    assert other.path.exists()
    other.leave()


def test_nothing_is_removed_that_is_not_ours(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "shared-notes").mkdir()
    (tmp_path / "shared-notes" / "lesson.txt").touch()
    (tmp_path / "shared-file.db").touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "1.db").touch()
    (tmp_path / "shared-link").symlink_to(tmp_path / "target")
    before = sorted(tmp_path.rglob("*"))
    make().leave()
    assert sorted(tmp_path.rglob("*")) == before


def test_only_the_user_can_read_it():
    folder = make()
    assert Path(folder.path).stat().st_mode & 0o777 == 0o700
    folder.leave()
