"""postgresql.py: its cluster, its pid file, its failures."""

import signal
import subprocess
from pathlib import Path

import pytest
from embedded_stores import lessons, pid_of_postgresql, processes_of, query, quiet

from lesson_server.embedded.errors import EmbeddedError
from lesson_server.embedded.processes import demotion
from lesson_server.embedded.programs import find_programs
from lesson_server.embedded.stores import EmbeddedStores


def test_pgport_of_the_operator_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "6543")
    with EmbeddedStores(data_dir) as stores:
        stores.start(quiet)
        assert lessons(stores.dsn) == [("1", "", 30)]


def test_an_initdb_cut_short_is_begun_anew(new_dir: Path) -> None:
    half = new_dir / "postgresql.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedStores(new_dir) as stores:
        stores.start(quiet)
        assert lessons(stores.dsn) == [("1", "", 30)]
    assert not half.exists()


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
    command: list[str | Path] = [*demotion().command, find_programs().postgresql / "postgres"]
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


def test_the_error_shows_postgresqls_last_words_and_valkey_is_stopped(data_dir: Path) -> None:
    settings = data_dir / "postgresql/postgresql.auto.conf"
    settings.write_text("nonsense = 1\n")
    with pytest.raises(EmbeddedError, match=r'(?s)^PostgreSQL did not start; .*postgresql\.log:\n.*"nonsense"'):
        EmbeddedStores(data_dir).start(quiet)
    assert processes_of(data_dir) == []
    settings.write_text("")
    with EmbeddedStores(data_dir) as stores:
        stores.start(quiet)


def test_a_database_that_cannot_be_prepared_is_an_embedded_error(data_dir: Path) -> None:
    with EmbeddedStores(data_dir) as stores:
        stores.start_database(quiet)
        query(stores.dsn, "DROP TABLE lessons; CREATE DOMAIN lessons AS int")
    with pytest.raises(EmbeddedError, match=rf'^can\'t start the stores in {data_dir}: .*"lessons" already exists'):
        EmbeddedStores(data_dir).start(quiet)
    assert processes_of(data_dir) == []
