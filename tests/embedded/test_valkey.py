"""valkey.py: its failures."""

from pathlib import Path

import pytest
from embedded_stores import processes_of, quiet

from lesson_server.embedded.errors import EmbeddedError
from lesson_server.embedded.stores import EmbeddedStores


def test_the_error_shows_valkeys_last_words_and_postgresql_is_stopped(data_dir: Path) -> None:
    (data_dir / "valkey/appendonlydir/appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(EmbeddedError, match=r"(?s)^Valkey did not start; .*valkey\.log:\n.*manifest"):
        EmbeddedStores(data_dir).start(quiet)
    assert processes_of(data_dir) == []
