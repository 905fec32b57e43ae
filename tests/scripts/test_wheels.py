"""Before a release, a dependency without a wheel is found."""

import subprocess

import pytest
import wheels

HERE = ("3.14", "x86_64")


def test_what_setup_py_requires_is_looked_for():
    assert wheels.pythons() == ["3.11", "3.12", "3.13", "3.14"]
    names = wheels.requirements()
    assert {"uvloop>=0.21", "redis[hiredis]<9,>=8.0.1", "psutil>=5.9", "rich>=13"} < set(names)
    assert not [name for name in names if name.startswith(("pytest", "uvicorn"))]


def test_a_dependency_without_a_wheel_is_found(monkeypatch):
    monkeypatch.setattr(wheels, "requirements", lambda: ["typing-extensions==4.12.2"])
    assert wheels.wheels(*HERE) == ["typing_extensions 4.12.2"]
    monkeypatch.setattr(wheels, "requirements", lambda: ["psycopg2==2.9.10"])  # an sdist, and wheels for Windows
    with pytest.raises(subprocess.CalledProcessError):
        wheels.wheels(*HERE)
