"""Looks whether there is a wheel of every dependency for each Python that setup.py declares, on x86-64 and ARM64.

    python scripts/release/wheels.py

pip resolves the dependencies of the server and of the extras that users install; it installs nothing. It evaluates the
markers of dependencies, such as ``python_version < "3.13"``, for the Python that runs it. The exit status is 1 if a
wheel is missing.
"""

import json
import subprocess
import sys
from importlib.metadata import metadata

from packaging.requirements import Requirement

EXTRAS = ("embedded", "otel", "simulate")
ARCHITECTURES = ("x86_64", "aarch64")
GLIBC = 28  # 2.28: Debian 10, Ubuntu 20.04, RHEL 8


def requirements() -> list[str]:
    """Return the direct dependencies, such as ``redis[hiredis]<9,>=8.0.1``."""
    required = map(Requirement, metadata("lesson-server").get_all("Requires-Dist") or ())
    return [
        str(requirement).partition(";")[0].strip()
        for requirement in required
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS))
    ]


def pythons() -> list[str]:
    """Return the versions of Python that setup.py declares, such as 3.11."""
    topic = "Programming Language :: Python :: 3."
    classifiers = metadata("lesson-server").get_all("Classifier") or ()
    return ["3." + classifier.removeprefix(topic) for classifier in classifiers if classifier.startswith(topic)]


def wheels(python: str, architecture: str) -> list[str]:
    """Return the names and versions of what pip would install there.

    Args:
        python: the version of Python.
        architecture: the name of the processor in the tags of wheels.

    Raises:
        subprocess.CalledProcessError: there is no wheel of one of the dependencies; pip has said of which.
    """
    tags = [*(f"manylinux_2_{minor}_{architecture}" for minor in range(17, GLIBC + 1)), f"manylinux2014_{architecture}"]
    command = [
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--target", "nowhere"),
        *("--quiet", "--disable-pip-version-check", "--report", "-"),
        *("--only-binary", ":all:", "--python-version", python),
        *(word for tag in tags for word in ("--platform", tag)),
        *requirements(),
    ]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return [f"{package['metadata']['name']} {package['metadata']['version']}" for package in report["install"]]


def main() -> int:
    for python in pythons():
        for architecture in ARCHITECTURES:
            print(f"Python {python}, {architecture}: ", end="", flush=True)
            try:
                print(f"{len(wheels(python, architecture))} wheels")
            except subprocess.CalledProcessError:
                print("a wheel is missing")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
