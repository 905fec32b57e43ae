"""Fixtures of the tests in this folder."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from embedded_stores import processes_of, quiet

from lesson_server.embedded.processes import end
from lesson_server.embedded.stores import EmbeddedStores


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
