"""Settings of a test, and what is said of wrong ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lesson_server.settings.schema import SettingsError
from lesson_server.settings.sources import load

# Writes a file of settings.
WriteToml = Callable[[str], Path]

STORES = {"LESSON_RDS_DSN": "dbname=lesson", "LESSON_REDIS_URL": "redis://localhost", "LESSON_AUTH_KEY": "key-" * 8}


def fault(environ: dict[str, str], config: Path | None = None) -> str:
    """The text of the refusal, which is one line."""
    with pytest.raises(SettingsError) as refused:
        load(config, environ=environ).require_complete()
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    assert "\n" not in str(refused.value)
    return str(refused.value)
