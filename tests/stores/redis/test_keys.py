"""keys.py: the only module that names keys; its page and the contract name the same."""

import ast
import re

import pytest
from cluster import ROOT

from lesson_server.stores.redis import keys

PAGE = (ROOT / "docs/operating/redis.md").read_text("utf-8")


def test_the_table_of_the_page_has_every_key_of_the_contract_and_no_other():
    table = set(re.findall(r"^\| `([^`\s]*\{\w+\}[^`\s]*)` \|", PAGE, re.MULTILINE))
    assert table == {
        keys.seat_map("{lesson_id}"),
        keys.teachers("{lesson_id}"),
        keys.teacher("{user_id}"),
        keys.client("{client_id}"),
        keys.students("{lesson_id}"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *(keys.NODE_COUNTS, keys.NODE_FIGURES, keys.LESSONS, keys.ROOMS, keys.MESSAGES),
        *(keys.node_index("{id}"), keys.claims("{field}", "key")),
        *(keys.console_session("{digest}"), keys.echoes("{name}")),
    ],
)
def test_the_server_s_own_keys_begin_with_lesson_node_and_stand_on_the_page(name):
    assert name.startswith("lesson_node")
    assert f"`{name}`" in PAGE


def test_no_other_module_names_a_key():
    for path in (ROOT / "lesson_server").rglob("*.py"):
        if path.name == "keys.py":
            continue
        tree = ast.parse(path.read_text("utf-8"))
        docstrings = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        named = {text for text in texts - docstrings if re.match(r"lesson_(seat|teacher|student|node)_", text)}
        assert named == set(), path
