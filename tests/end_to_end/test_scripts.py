"""The simulators and the demo, as processes, against a real server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
import simulate_participants
from processes import unmeasured

ROOT = Path(__file__).parents[2]
TEACHER = "simulate_teacher.py"
PARTICIPANTS = "simulate_participants.py"
# A server that compares its messages with its AsyncAPI document, and ends with another status than 0 if they differ.
NODE = str(ROOT / "tests/support/node.py")

STOP_TIMEOUT = 30
SCRIPT_TIMEOUT = 60

# For processes whose working directory is elsewhere. The simulators import nothing of the server.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LESSON_")} | {
    "PYTHONPATH": str(ROOT)
}
SIMULATORS_ENVIRONMENT = unmeasured(ENVIRONMENT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the server and of the scripts; the server's data directory is in it."""
    return tmp_path_factory.mktemp("home")


@contextmanager
def running_server(home: Path) -> Iterator[str]:
    """Start a server in its default set-up, and yield its URL; it has lesson 1."""
    with subprocess.Popen(
        [sys.executable, NODE, "{}", "run", "--port", "0"],
        cwd=home,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield next(line for line in server.stdout if "listening on" in line).split()[-1]
        finally:
            server.terminate()
            assert server.wait(STOP_TIMEOUT) == 0


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """Where a server listens."""
    with running_server(home) as url:
        yield url


@contextmanager
def held_participants(home: Path, url: str, hold: int) -> Iterator[subprocess.Popen[str]]:
    """Yield a simulator whose three participants have joined, and are held for ``hold`` seconds."""
    with subprocess.Popen(
        command(PARTICIPANTS, "--url", url, "--count", "3", "--hold", str(hold), "--json"),
        cwd=home,
        env=SIMULATORS_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as script:
        try:
            deadline = time.monotonic() + SCRIPT_TIMEOUT
            registered = 'lesson_connections{client="participant",event="join_lesson",state="registered"} 3.0'
            while registered not in metrics(url):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(0.5)  # the server has registered them; their answers are on the way
            yield script
        finally:
            script.kill()  # a test that failed must not wait for it


def metrics(url: str) -> str:
    with urlopen(f"{url}/metrics") as answer:
        return answer.read().decode()


def seats(url: str, lesson: str) -> dict[str, str]:
    """The seat map of a lesson, from the roster API."""
    with urlopen(f"{url}/api/lessons/{lesson}") as answer:
        seats: dict[str, str] = json.load(answer)["seats"]
        return seats


def add_lesson(home: Path, *args: str) -> int:
    add = [sys.executable, "-m", "lesson_server.cli", "lesson", "add", *args]
    return subprocess.run(add, cwd=home, env=ENVIRONMENT, check=False, timeout=SCRIPT_TIMEOUT).returncode


def command(script: str, *args: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / script), *args]


def run(home: Path, script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return run_command(command(script, *args), home, SIMULATORS_ENVIRONMENT)


def run_demo(home: Path) -> subprocess.CompletedProcess[str]:
    return run_command(command("demo.py"), home, ENVIRONMENT)


def run_command(words: list[str], home: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=home, env=environ, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT)


def processes_in(directory: Path) -> list[psutil.Process]:
    """Every process that works in ``directory`` or names it on its command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(word.startswith(str(directory)) for word in words):
            found.append(process)
    return found


# Joins


def test_a_teacher_joins(home: Path, url: str) -> None:
    done = run(home, TEACHER, "--url", url, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["outcomes"] == {"SUCCESS": 1}
    assert (report["clients"], report["failed"]) == (1, 0)


@pytest.mark.parametrize("transport", ["websocket", "polling", "both"])
def test_participants_and_guests_join(home: Path, url: str, transport: str) -> None:
    done = run(home, PARTICIPANTS, "--url", url, "--guests", "3", "--transport", transport, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["outcomes"] == {"SUCCESS": 30}
    for latencies in (report["connect_ms"], report["join_ms"]):
        assert 0 < latencies["p50"] <= latencies["p95"] <= latencies["p99"]


@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_participants_take_seats_and_guests_do_not(home: Path, url: str, transport: str) -> None:
    done = run(home, PARTICIPANTS, "--url", url, "--seats", "--guests", "3", "--transport", transport, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["outcomes"] == {"SUCCESS": 30}
    assert 0 < report["seat_ms"]["p50"] <= report["seat_ms"]["p95"] <= report["seat_ms"]["p99"]
    names = {f"participant-{number}" for number in range(1, 28)}
    assert names <= set(seats(url, "1").values())  # longer than the participants stay: for the grace


def test_the_table_has_the_percentiles_of_the_seats_below_those_of_the_joins(home: Path, url: str) -> None:
    done = run(home, PARTICIPANTS, "--url", url, "--seats", "--count", "2", "--plot", str(home / "seats.png"))
    assert re.search(r"join p50 .* join p95 .* join p99.*\n.*outcome .* seat p50 .* seat p95 .* seat p99", done.stdout)
    assert re.search(r"SUCCESS .* 2 (.* [\d.]+ ms){3}.*\n(.* [\d.]+ ms){3}", done.stdout)


def test_more_clients_than_the_usual_limit_of_open_files(home: Path, url: str) -> None:
    limited = f"ulimit -Sn 64; exec {' '.join(command(PARTICIPANTS, '--url', url, '--count', '100', '--json'))}"
    done = run_command(["sh", "-c", limited], home, SIMULATORS_ENVIRONMENT)
    assert json.loads(done.stdout)["outcomes"] == {"SUCCESS": 100}


def test_a_rate_spreads_the_connections(home: Path, url: str) -> None:
    started = time.monotonic()
    done = run(home, PARTICIPANTS, "--url", url, "--count", "5", "--rate", "4")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started >= 1


def test_the_table_has_outcomes_and_percentiles(home: Path, url: str) -> None:
    done = run(home, PARTICIPANTS, "--url", url, "--count", "2")
    assert re.search(r"outcome .* clients .* join p50 .* join p95 .* join p99", done.stdout)
    assert re.search(r"SUCCESS .* 2 (.* [\d.]+ ms){3}", done.stdout)


@pytest.mark.parametrize(("suffix", "beginning"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml")])
def test_the_plot_is_a_picture(home: Path, url: str, suffix: str, beginning: bytes) -> None:
    picture = home / f"latency{suffix}"
    done = run(home, PARTICIPANTS, "--url", url, "--count", "2", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(beginning)


# Joins that fail


@pytest.mark.parametrize(
    ("args", "outcome"),
    [
        (["--lesson", "nowhere"], "lesson nowhere not found"),
        (["--lesson", "not/a/lesson"], "lesson_id is malformed"),
        (["--key", "some other key, which is as long as it must be"], "access token is invalid"),
    ],
)
def test_a_refusal_is_an_outcome_in_the_servers_words(home: Path, url: str, args: list[str], outcome: str) -> None:
    done = run(home, PARTICIPANTS, "--url", url, "--count", "3", "--json", *args)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["outcomes"] == {outcome: 3}
    assert report["join_ms"] == {"p50": None, "p95": None, "p99": None}


def test_one_failure_among_successes_is_a_failure(home: Path, url: str) -> None:
    done = run(
        home,
        PARTICIPANTS,
        "--url",
        url,
        "--count",
        "3",
        "--guests",
        "2",
        "--json",
        "--key",
        "a wrong key, of 32 bytes or more",
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["outcomes"] == {"SUCCESS": 2, "access token is invalid": 1}


def test_a_seat_that_is_refused_is_a_failure(home: Path, url: str) -> None:
    assert add_lesson(home, "small", "--seats", "2") == 0
    done = run(home, PARTICIPANTS, "--url", url, "--lesson", "small", "--seats", "--count", "5", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["outcomes"] == {"SUCCESS": 2, "the lesson is full": 3}


def test_no_server_is_one_line(home: Path, url: str) -> None:
    done = run(home, PARTICIPANTS, "--url", "http://127.0.0.1:1", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"no server at http://127\.0\.0\.1:1: .*\n", done.stderr)


def test_no_key_is_one_line(home: Path, url: str) -> None:
    done = run(home, TEACHER, "--url", url, "--data-dir", "nowhere")
    assert done.returncode == 2
    assert re.fullmatch(r"no key for access tokens .*nowhere/auth\.key'\n", done.stderr)


def test_guests_need_no_key(home: Path, url: str) -> None:
    done = run(home, PARTICIPANTS, "--url", url, "--count", "2", "--guests", "2", "--data-dir", "nowhere")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--count", "0"],
        ["--count", "many"],
        ["--guests", "-1"],
        ["--guests", "31"],
        ["--rate", "-1"],
        ["--hold", "nan"],
        ["--url", "localhost:8080"],
        ["--transport", "pigeon"],
        ["--algorithm", "none"],
        ["--plot", "picture.txt"],
        ["--plot", "nowhere/picture.png"],
    ],
)
def test_a_wrong_argument_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    """In this process: all that the script does besides is to exit with the status that ``main`` returns."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        simulate_participants.main(args)
    assert exited.value.code == 2
    assert f"error: argument {args[0]}: " in capsys.readouterr().err


def test_ctrl_c_while_held_still_reports(home: Path, url: str) -> None:
    with held_participants(home, url, hold=600) as script:
        script.send_signal(signal.SIGINT)
        stdout, stderr = script.communicate(timeout=SCRIPT_TIMEOUT)
    assert script.returncode == 130
    assert json.loads(stdout)["outcomes"] == {"SUCCESS": 3}
    assert stderr == ""


def test_a_client_that_is_dropped_while_held_has_failed(tmp_path: Path) -> None:
    with running_server(tmp_path) as url, held_participants(tmp_path, url, hold=5) as script:
        [server] = [p for p in processes_in(tmp_path) if NODE in p.cmdline()]
        server.terminate()
        stdout, _ = script.communicate(timeout=SCRIPT_TIMEOUT)
    assert script.returncode == 1
    assert json.loads(stdout)["outcomes"] == {"dropped while held": 3}


# The demo


def test_the_demo_shows_a_lesson_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in (r"SUCCESS .* 31 ", r"participant .* registered .* 27 ", r"lesson_teacher_1 .* hash", "All is well"):
        assert re.search(shown, done.stdout)
    assert len(re.findall(r"lesson_seat_1 .* hash .* 1=participant-\d+", done.stdout)) == 2  # also after all have left
    assert processes_in(tmp_path) == []


def test_a_demo_that_fails_says_why_and_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / ".lesson-server").write_text("no directory")
    done = run_demo(tmp_path)
    assert done.returncode == 1
    assert ".lesson-server" in done.stdout
    assert "The demo has failed: the server has ended without listening" in done.stdout
    assert processes_in(tmp_path) == []


def test_a_demo_that_is_told_to_stop_stops_its_server(tmp_path: Path) -> None:
    with subprocess.Popen(command("demo.py"), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as demo:
        assert any("listening on" in line for line in demo.stdout)
        demo.terminate()
        demo.communicate(timeout=SCRIPT_TIMEOUT)
    assert demo.returncode == 130
    assert processes_in(tmp_path) == []
