"""An extension of griffe: the roles of Sphinx in docstrings, such as ``:class:`~lesson_server.x.Y```, become links."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites each docstring when it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the roles by Markdown: a link to a full name of the package, the name alone otherwise."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_markdown, obj.docstring.value)


def _markdown(role: re.Match[str]) -> str:
    name = role[1].rpartition(".")[2]
    return f"[`{name}`][{role[1]}]" if role[1].startswith("lesson_server.") else f"`{name}`"
