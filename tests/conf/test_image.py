"""Dockerfile and .dockerignore: what goes into the image, and the commands that Docker runs in it."""

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading

import pytest
from cluster import ROOT, free_port
from commands import running
from deployments import SETTINGS
from distribution import packaged_files

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
# Keyword → the rest of each of its lines, continued lines joined; of both stages.
INSTRUCTIONS = re.findall(r"^([A-Z]+) (.+)$", TEXT.replace("\\\n", " "), re.MULTILINE)


def of(keyword):
    return [rest for name, rest in INSTRUCTIONS if name == keyword]


def sources():
    """The files and folders that the stages copy from the repository."""
    return [source.rstrip("/") for rest in of("COPY") if not rest.startswith("--from") for source in rest.split()[:-1]]


HEALTHCHECK = json.loads(of("HEALTHCHECK")[0].split("CMD ", 1)[1])


def healthcheck(**environ):
    """Runs the command as Docker does, with the Python of the tests, which has an http.client of its own."""
    command = [sys.executable, *HEALTHCHECK[1:]]
    return subprocess.run(command, env=environ, capture_output=True, timeout=10, check=False).returncode


# What goes in


def test_both_stages_have_the_base_that_can_be_replaced():
    assert {rest.split()[0] for rest in of("FROM")} == {"${BASE}"}
    base, extras = of("ARG")
    assert extras == "EXTRAS="
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.\d+-slim-[a-z]+", base)


def test_the_context_is_what_is_copied_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(sources())
    for source in sources():
        assert (ROOT / source).exists()


def test_what_is_copied_makes_a_complete_package(tmp_path):
    context, built = tmp_path / "context", tmp_path / "built"
    for source in sources():
        target = context / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", built]
    subprocess.run(command, cwd=context, check=True, timeout=120)
    assert (built / "lesson_server/schema.sql").read_text("utf-8") == (ROOT / "conf/schema.sql").read_text("utf-8")
    assert {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()} == packaged_files()


def test_no_extra_is_installed_unless_the_build_asks_for_one():
    [install] = [rest for rest in of("RUN") if " install " in rest]
    assert install.endswith('"$(echo /wheels/*.whl)${EXTRAS}"')


# How it runs


def test_it_is_not_root_and_says_so_by_number():
    user, group = of("USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0
    [made] = [rest for rest in of("RUN") if "useradd" in rest]
    assert f"--uid {user} --gid {group} " in made
    manifest = (ROOT / "conf/kubernetes/deployment.yaml").read_text("utf-8")
    assert f"runAsUser: {user}\n        runAsGroup: {group}\n" in manifest


def test_the_server_is_process_1():
    assert json.loads(of("ENTRYPOINT")[0]) == ["lesson-server"]
    command, option, config = json.loads(of("CMD")[-1])
    assert (command, option) == ("run", "--config")
    folder, name = config.rsplit("/", 1)
    assert f"conf/{name} {folder}/" in of("COPY")


def test_what_it_sets_are_settings():
    named = set(re.findall(r"\bLESSON_[A-Z_]+", TEXT))
    assert named
    assert named <= SETTINGS


def test_the_health_check_passes_while_the_server_answers(environ):
    with running(**environ) as server:
        port = server.url.rsplit(":", 1)[1]
        assert healthcheck(LESSON_SERVER_PORT=port) == 0
        assert healthcheck(LESSON_SERVER_PORT=port, http_proxy="http://127.0.0.1:1") == 0


def test_the_health_check_fails_without_a_server():
    assert healthcheck(LESSON_SERVER_PORT=str(free_port())) == 1


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1)])
def test_the_health_check_looks_at_the_status(status, expected):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/healthz"
            self.send_response_only(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert healthcheck(LESSON_SERVER_PORT=str(server.server_port)) == expected
