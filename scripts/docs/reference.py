"""A hook of MkDocs: a page for each package, with the public names of its modules by mkdocstrings."""

from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``api/<package>.md``. The navigation must name each: a package that it lacks fails the build."""
    for init in sorted((ROOT / "lesson_server").rglob("__init__.py")):
        uri = f"api/{'.'.join(init.parent.relative_to(ROOT).parts)}.md"
        files.append(File.generated(config, uri, content="\n".join(_page(init.parent))))
    return files


def _page(folder: Path) -> Iterator[str]:
    package = ".".join(folder.relative_to(ROOT).parts)
    # Who searches looks for an explanation first.
    yield f"---\ntitle: {package}\nsearch:\n  boost: 0.2\n---"
    yield f"::: {package}\n    options: {{heading_level: 1, members: false, show_root_full_path: true}}\n"
    for module in sorted(folder.glob("*.py")):
        if not module.name.startswith("_"):
            yield f"::: {package}.{module.stem}\n"
