"""data_dir.py: who owns the data directory, and where its sockets are; with the real servers."""

import os
from pathlib import Path

import pytest
from embedded_stores import kill_owner, lessons, mode, quiet
from psycopg2.extensions import parse_dsn

from lesson_server.embedded.data_dir import read_owner
from lesson_server.embedded.errors import DataDirInUseError, EmbeddedError
from lesson_server.embedded.stores import EmbeddedStores, lesson_database

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


def test_the_dsn_is_published_until_the_stop(stores: EmbeddedStores, data_dir: Path) -> None:
    assert read_owner(data_dir) == [str(os.getpid()), stores.dsn]
    stores.stop()
    assert read_owner(data_dir) == []


# The directory and its sockets


def test_a_data_dir_that_cannot_be_made_is_an_embedded_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match=r"can't start the stores in .*file"):
        EmbeddedStores(tmp_path / "file").start(quiet)


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
