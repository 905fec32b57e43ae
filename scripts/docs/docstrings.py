"""An extension of griffe: what docstrings have of reStructuredText becomes Markdown."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):`~?([\w.]+)`")
RULE = r"=+(?: +=+)+"
TABLE = re.compile(rf"^{RULE}\n.*?^{RULE}$", re.MULTILINE | re.DOTALL)
# A term, and the first line of its definition. What ends with a colon is a section, such as "Args:".
DEFINITION = re.compile(r"^(\S[^\n]*[^\n:])\n {4}(?=\S)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring when it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace roles by links, a table by its text as it is, and lists of definitions by those of Markdown."""
        if obj.docstring is not None:
            text = ROLE.sub(_link, obj.docstring.value)
            text = TABLE.sub(r"```text\n\g<0>\n```", text)
            obj.docstring.value = DEFINITION.sub(r"\n\1\n:   ", text)


def _link(role: re.Match[str]) -> str:
    """Return a link for the full name of something in the package, and the name alone otherwise."""
    name = role[1].rpartition(".")[2]
    return f"[`{name}`][{role[1]}]" if role[1].startswith("lesson_server.") else f"`{name}`"
