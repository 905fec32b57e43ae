"""A hook of MkDocs: files of the repository that a page links to are on the site too, under ``source/``.

So a link such as ``../conf/nginx.conf`` works wherever the page is read: in the repository and on the site. A link to a
file that does not exist is left as it is, and fails the build.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SOURCE = "source/"
# The target of a link or of a picture, as far as it names a file.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)[^)\s#]+")
PICTURES = {".png", ".svg"}
# By the end of the name, or the whole name where it has no dot.
LANGUAGES = {
    "Dockerfile": "docker",
    ".conf": "nginx",
    ".json": "json",
    ".mjs": "js",
    ".service": "ini",
    ".sql": "sql",
    ".toml": "toml",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that the pages link to, and those that these files link to."""
    pages = [file for file in files if file.is_documentation_page()]
    while pages:
        page = pages.pop()
        for linked in _linked_files(page, page.content_string):
            if not _is_page_of_docs(linked) and files.get_file_from_path(_site_path(linked)) is None:
                added = _file(linked, config)
                files.append(added)
                pages += [added] if linked.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links to files of the repository point to the site."""
    folder = Path(page.file.src_uri).parent

    def on_site(link: re.Match[str]) -> str:
        linked = _resolve(page.file, link[0])
        return link[0] if linked is None else os.path.relpath(_site_path(linked), folder)

    return LINK.sub(on_site, markdown)


def _linked_files(page: File, markdown: str) -> Iterator[Path]:
    for target in LINK.findall(markdown):
        linked = _resolve(page, target)
        if linked is not None:
            yield linked


def _resolve(page: File, target: str) -> Path | None:
    """Return the file that a link names, relative to the repository; None if there is no such file."""
    uri = page.src_uri
    path = ROOT / (uri.removeprefix(SOURCE) if uri.startswith(SOURCE) else f"docs/{uri}")
    linked = Path(os.path.normpath(path.parent / target))
    return linked.relative_to(ROOT) if linked.is_relative_to(ROOT) and linked.is_file() else None


def _is_page_of_docs(linked: Path) -> bool:
    return linked.parts[0] == "docs"


def _site_path(linked: Path) -> str:
    """Return where the file is on the site, as the path of its source."""
    if _is_page_of_docs(linked):
        return str(linked.relative_to("docs"))
    return f"{SOURCE}{linked}" if linked.suffix in {".md", *PICTURES} else f"{SOURCE}{linked}.md"


def _file(linked: Path, config: MkDocsConfig) -> File:
    path, uri = ROOT / linked, _site_path(linked)
    if linked.suffix in PICTURES:
        return File.generated(config, uri, abs_src_path=str(path))
    text = path.read_text("utf-8")
    if linked.suffix != ".md":
        kind = linked.suffix or linked.name
        language = LANGUAGES.get(kind, kind.removeprefix("."))
        text = f"---\nsearch:\n  exclude: true\n---\n# {linked}\n\n````{language}\n{text}````\n"
    return File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
