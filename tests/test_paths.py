"""Files that the documents and comments name are where they say."""

import re
from pathlib import Path

import pytest
from cluster import ROOT

TEXTS = [ROOT / "README.md", ROOT / "mkdocs.yml", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", ROOT / "setup.py"]
for folder in ("docs", "lesson_server", "statecharts", "scripts", "tests"):
    TEXTS += [
        path for kind in ("py", "md") for path in (ROOT / folder).rglob(f"*.{kind}") if "node_modules" not in path.parts
    ]
# Not in the middle of a longer path.
NAMED = re.compile(
    r"(?<![\w/*.])(?:lesson_server|tests|scripts|statecharts|docs|conf)/[\w/]+\.(?:py|md|toml|sql|conf|yaml)\b"
)
# `secret.yaml` is a copy of secret.example.yaml that an operator makes.
EXAMPLES = {"tests/a/test_x.py", "lesson_server/a/x.py", "conf/kubernetes/secret.yaml"}


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_that_is_named_exists(text: Path) -> None:
    named = set(NAMED.findall(text.read_text("utf-8"))) - EXAMPLES
    assert {name for name in named if not (ROOT / name).exists()} == set()
