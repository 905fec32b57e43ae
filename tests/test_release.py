"""The sdist and the wheel of a release, and what pip makes of the wheel in an empty environment."""

import email
import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import metadata
from urllib.request import urlopen

import pytest
from cluster import KEY, ROOT
from commands import clean_environ
from distribution import packaged_files
from licences import PAGE, installed, needed
from once import made_once
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lesson_server

IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text("utf-8").splitlines()]
# What an operator may have in the checkout.
SECRETS = {".env", "conf/kubernetes/secret.yaml"}
# Under these a program of any licence may use and bring a package. psycopg2 is under the LGPL.
ACCEPTED = re.compile(r"Apache|BSD|LGPL|MIT|MPL|PSF|Python Software Foundation|ISC")
OTHER = re.compile(r"(?<!L)GPL|UNKNOWN")


def run(*command, **more):
    return subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True, **more).stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The folder with the files of the repository, without those that git ignores, and what is made of them."""
    return made_once(tmp_path_factory, "release", make_release)


def make_release(folder):
    """Builds the sdist, builds the wheel from the sdist, and installs the wheel and nothing else into ``installed``."""
    checkout, environment = folder / "checkout", folder / "installed"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(".git", *IGNORED))
    for name in SECRETS:
        (checkout / name).write_text("a secret", "utf-8")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout)
    venv.create(environment, symlinks=True)
    pip(environment, "install", "--quiet", "--no-compile", "--only-binary", ":all:", *folder.glob("*.whl"))


def pip(environment, *arguments):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", environment, *arguments)


@pytest.fixture
def wheel(release):
    [path] = release.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_sdist_is_the_whole_repository_without_secrets(release):
    [sdist] = release.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        released = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    made = {name for name in released if name.startswith("lesson_server.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    checkout = release / "checkout"
    files = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if not path.is_dir()}
    assert released - made == {name for name in files if not name.startswith("lesson_server.egg-info/")} - SECRETS


def test_the_wheel_is_both_packages_with_all_their_files_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == packaged_files()
    assert {"lesson_server/py.typed", "statecharts/py.typed", "lesson_server/schema.sql"} < names
    assert wheel.read("lesson_server/schema.sql") == (ROOT / "conf/schema.sql").read_bytes()


def test_the_wheel_says_which_version_it_is_and_under_which_licence(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    said = email.message_from_bytes(wheel.read(name))
    assert said["Version"] == lesson_server.__version__
    assert said["License"] == "MIT"
    assert name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()


def test_the_newest_release_in_the_changelog_is_this_version():
    releases = re.findall(
        r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert releases[0] == lesson_server.__version__


def test_pip_finds_no_conflict_in_an_environment_with_the_wheel_alone(release):
    assert "No broken requirements found." in pip(release / "installed", "check")


def test_the_installed_server_joins_participants(release, running_stores, tmp_path):
    environ = clean_environ(
        LESSON_RDS_DSN=running_stores.dsn, LESSON_REDIS_URL=running_stores.redis_url, LESSON_AUTH_KEY=KEY
    )
    command = [release / "installed/bin/lesson-server", "run", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(line for line in server.stdout if "listening on" in line).split()[-1]
            with urlopen(url + "/asyncapi.json") as response:
                assert json.load(response)["info"]["version"] == lesson_server.__version__
            simulator = ROOT / "scripts/simulate_participants.py"
            run(sys.executable, simulator, "--url", url, "--key", KEY, "--count", "3", cwd=tmp_path)
        finally:
            server.terminate()
    assert server.returncode == 0


def test_the_packages_that_pip_installs_are_those_that_the_page_of_licences_looks_for(release):
    assert set(installed(str(release / "installed/bin/python"))) - {"lesson-server"} == needed()


def test_each_package_that_users_install_has_a_licence_that_lets_them():
    packages = installed()
    for extra in ("", "embedded", "otel", "simulate"):
        for package in (packages[name] for name in needed(extra)):
            assert ACCEPTED.search(package.licence), package
            assert not OTHER.search(package.licence), package


def test_the_page_of_licences_has_each_direct_dependency():
    listed = {row.split(" | ")[0].removeprefix("| ") for row in PAGE.read_text("utf-8").splitlines()}
    required = {Requirement(line).name for line in metadata("lesson-server").get_all("Requires-Dist")}
    assert len(required) > 40
    assert set(map(canonicalize_name, required)) - set(map(canonicalize_name, listed)) == set()
    for path in (*ROOT.glob("tests/js/package.json"), *ROOT.glob("scripts/bench/peers/*/package.json")):
        package = json.loads(path.read_text("utf-8"))
        assert (package["dependencies"].keys() | package.get("devDependencies", {}).keys()) - listed == set()
