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
    yield "---\nsearch:\n  boost: 0.2  # who searches looks for an explanation first\n---"
    yield f"# {package}\n\n::: {package}\n    options:\n      show_root_heading: false\n      members: false\n"
    for module in sorted(folder.glob("*.py")):
        if not module.name.startswith("_"):
            yield f"## {module.stem} {{ #{package}.{module.stem} }}\n\n::: {package}.{module.stem}\n"
