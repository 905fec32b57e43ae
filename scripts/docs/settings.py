"""A hook of MkDocs: the lists of settings are made from the schema, so that the page can't drift from the server."""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import griffe
from annotated_types import Ge, Gt, Le
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

from lesson_server.settings.schema import Settings
from lesson_server.settings.sources import ENV_PREFIX

MARK = "<!-- the settings of lesson_server/settings/schema.py -->"
# The schema cites the contract, which readers of the page don't have.
CITATION = re.compile(r"\s*\(contract, sections? [^)]*\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the mark by a list of settings for each section."""
    return markdown.replace(MARK, "\n".join(_lists()))


def _lists() -> Iterator[str]:
    for name, section in Settings.model_fields.items():
        schema: Any = section.annotation
        text, attributes = griffe.Docstring(CITATION.sub("", schema.__doc__), lineno=1).parse("google")
        yield f"## {name}\n\n{text.value}\n"
        for attribute in attributes.value:
            field = schema.model_fields[attribute.name]
            meaning = " ".join(f"{attribute.description} {_bounds(field)}".split()).replace("``", "`")
            variable = f"{ENV_PREFIX}{name}_{attribute.name}".upper()
            yield f"`{name}.{attribute.name}`, `{variable}`{_default(field)}"
            yield f":   {meaning[0].upper()}{meaning[1:]}\n"


def _default(field: FieldInfo) -> str:
    match field.default:
        case None | () | "":
            return ""
        case bool():
            return f", default `{str(field.default).lower()}`"  # as in TOML
        case _:
            return f", default `{field.default}`"


def _bounds(field: FieldInfo) -> str:
    """Return a sentence with the values that the setting may have, if the schema limits them."""
    if get_origin(field.annotation) is Literal:
        return f"One of {', '.join(f'`{choice}`' for choice in get_args(field.annotation))}."
    limits = [
        *(f"at least {limit.ge:,}" for limit in field.metadata if isinstance(limit, Ge)),
        *(f"more than {limit.gt:,}" for limit in field.metadata if isinstance(limit, Gt)),
        *(f"at most {limit.le:,}" for limit in field.metadata if isinstance(limit, Le)),
    ]
    return f"{' and '.join(limits).capitalize()}." if limits else ""
