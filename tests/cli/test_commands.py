"""The command line, run as an operator runs it.

A command that ends by itself is called in this process, where that does not matter: the process of the operator only
calls the same function, and takes half a second to begin.
"""

import os
import re
import signal
import subprocess
import urllib.request
from unittest.mock import patch

import jwt
import psutil
import psycopg2
import pytest
from cluster import KEY, ROOT
from commands import COMMAND, clean_environ, running

from lesson_server.cli.commands import main


def call(*arguments, **environ):
    """Runs a command to its end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, env=clean_environ(**environ), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def call_here(capsys):
    """Runs a command to its end, in this process."""

    def call_here(*arguments, **environ):
        with patch.dict(os.environ, environ):
            try:
                status = main(list(map(str, arguments)))
            except SystemExit as ended:  # of argparse
                status = int(ended.code)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, said.out, said.err)

    return call_here


def embedded_processes(data_dir):
    """The servers that run on a data directory."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(data_dir) in " ".join(one.info["cmdline"] or [])]


# run


def test_it_serves_the_stores_of_the_environment(environ):
    with running(**environ) as server:
        assert re.fullmatch(r"lesson-server listening on http://127\.0\.0\.1:\d+", server.said[-1])
        assert len(server.said) == 1
        assert urllib.request.urlopen(server.url + "/readyz").status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(environ, number):
    with running(**environ) as server:
        server.send_signal(number)
        assert server.wait(30) == 0
        assert server.stderr.read() == ""


def test_the_options_win_over_the_environment(environ):
    with running("--host", "localhost", "--port", "0", **environ | {"LESSON_SERVER_PORT": "1"}) as server:
        assert server.url.startswith("http://localhost:")


def test_without_stores_it_starts_its_own_and_leaves_none_running(tmp_path):
    data_dir = tmp_path / "data"
    environ = {"LESSON_SERVER_DATA_DIR": str(data_dir), "LESSON_SERVER_PORT": "0"}
    with running(**environ) as server:
        assert any(line.startswith("PostgreSQL: ") for line in server.said)
        assert any(line.startswith("Redis: ") for line in server.said)
        assert "30" in call("lesson", "list", **environ).stdout
        assert call("lesson", "add", "algebra", "--seats", 12, "--title", "Algebra", **environ).returncode == 0
        second = call("run", **environ)
        assert (second.returncode, second.stderr.count("\n")) == (1, 1)
        assert str(data_dir) in second.stderr
    assert server.returncode == 0
    assert embedded_processes(data_dir) == []
    # The data are kept, and can be reached without a server.
    assert "algebra     12  Algebra" in call("lesson", "list", **environ).stdout
    assert embedded_processes(data_dir) == []


def test_what_a_killed_server_left_running_is_stopped_by_the_next(tmp_path):
    data_dir = tmp_path / "data"
    environ = {"LESSON_SERVER_DATA_DIR": str(data_dir), "LESSON_SERVER_PORT": "0"}
    with running(**environ) as server:
        server.kill()
        server.wait()
    with running(**environ) as server:
        pass
    assert server.returncode == 0
    assert embedded_processes(data_dir) == []


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"LESSON_SERVER_PORT": "many"}, "server.port"),
        ({"LESSON_SERVER_COLOUR": "red"}, "LESSON_SERVER_COLOUR"),
        ({"LESSON_RDS_DSN": "dbname=x"}, "LESSON_REDIS_URL"),
        ({"LESSON_REDIS_URL": "redis://:sesame@x"}, "LESSON_RDS_DSN"),
        ({"LESSON_REDIS_URL": "redis://:sesame@x", "LESSON_RDS_DSN": "password=sesame"}, "LESSON_AUTH_KEY"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line_that_names_it(environ, named):
    ended = call("run", **environ)
    assert ended.returncode == 2
    assert named in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "sesame" not in ended.stderr


@pytest.mark.parametrize(
    ("store", "broken"),
    [
        ("Redis", {"LESSON_REDIS_URL": "redis://:sesame@127.0.0.1:1"}),
        ("RDS", {"LESSON_RDS_DSN": "host=127.0.0.1 port=1 password=sesame"}),
    ],
)
def test_a_store_that_is_not_there_stops_the_start_with_one_line(environ, store, broken):
    ended = call("run", **environ | broken)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"lesson-server: {store}: ")
    assert "Traceback" not in ended.stderr
    assert "sesame" not in ended.stderr


def test_a_port_that_is_taken_stops_the_start_with_one_line(environ):
    with running(**environ) as server:
        ended = call("run", **environ | {"LESSON_SERVER_PORT": server.url.rpartition(":")[2]})
        assert ended.returncode == 1
        assert "Address already in use" in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr


# token


def test_a_token_is_signed_with_the_configured_key():
    printed = call("token", "--role", "teacher", "--subject", "ms-hill", "--ttl", 60, LESSON_AUTH_KEY=KEY)
    claims = jwt.decode(printed.stdout.strip(), KEY, ["HS256"])
    assert (claims["sub"], claims["role"]) == ("ms-hill", "teacher")
    assert claims["exp"] - claims["iat"] == 60


def test_a_token_without_a_key_says_what_to_do(call_here, tmp_path):
    ended = call_here("token", "--role", "teacher", "--subject", "x", LESSON_SERVER_DATA_DIR=str(tmp_path))
    assert ended.returncode == 1
    assert "LESSON_AUTH_KEY" in ended.stderr


@pytest.mark.parametrize(
    ("role", "subject", "ttl"), [("a b", "x", 60), ("x", "lesson_x", 60), ("x", "x", 0), ("x", "x", "soon")]
)
def test_a_token_that_no_server_accepts_is_not_printed(call_here, role, subject, ttl):
    ended = call_here("token", "--role", role, "--subject", subject, "--ttl", ttl, LESSON_AUTH_KEY=KEY)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


# lesson


def test_lessons_are_added_changed_and_listed(call_here, environ):
    assert "added" in call_here("lesson", "add", "b", **environ).stdout
    assert "changed" in call_here("lesson", "add", "b", "--seats", "5", "--title", "B", **environ).stdout
    assert call_here("lesson", "list", **environ).stdout.splitlines()[1:] == ["1          30", "b           5  B"]


def test_a_lesson_that_nobody_could_join_is_not_added(call_here, environ, sql):
    ended = call_here("lesson", "add", "a b", **environ)
    assert ended.returncode == 1
    sql.execute("SELECT count(*) FROM lessons")
    assert sql.fetchone() == (1,)


def test_a_lesson_with_more_seats_than_a_join_could_make_is_not_added(call_here, environ):
    ended = call_here("lesson", "add", "huge", "--seats", 10_001, **environ)
    assert (ended.returncode, "10000 seats at most" in ended.stderr) == (1, True)


def test_only_run_needs_every_setting(call_here, environ):
    assert call_here("lesson", "list", LESSON_RDS_DSN=environ["LESSON_RDS_DSN"]).returncode == 0
    assert call_here("settings", LESSON_RDS_DSN=environ["LESSON_RDS_DSN"]).returncode == 0


def test_a_platform_without_the_table_is_told_so(call_here, environ, sql):
    sql.execute("ALTER TABLE lessons RENAME TO gone")
    try:
        ended = call_here("lesson", "list", **environ)
    finally:
        sql.execute("ALTER TABLE gone RENAME TO lessons")
    assert ended.returncode == 1
    assert 'relation "lessons" does not exist' in ended.stderr


# settings


def test_every_setting_is_shown_with_its_origin_and_no_secret(environ):
    shown = call("settings", "--config", "conf/development.toml", **environ).stdout
    rows = {line.split()[0]: line for line in shown.splitlines()}
    assert rows["server.port"].split() == ["server.port", "0", "LESSON_SERVER_PORT"]
    assert rows["server.host"].split()[-1] == "conf/development.toml"
    assert rows["auth.key"].split() == ["auth.key", "********", "LESSON_AUTH_KEY"]
    assert KEY not in shown
    assert environ["LESSON_RDS_DSN"] not in shown


def test_the_schema_can_be_applied_again(environ):
    with psycopg2.connect(environ["LESSON_RDS_DSN"]) as connection, connection.cursor() as cursor:
        cursor.execute((ROOT / "conf/schema.sql").read_text())
    connection.close()


def test_without_a_command_it_says_what_there_is(call_here):
    ended = call_here()
    assert ended.returncode == 2
    assert "COMMAND" in ended.stderr
