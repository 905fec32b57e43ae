"""A hook of MkDocs: Mermaid, which draws the sequence diagrams, is part of the site. Its wheel is ``mermaidx``."""

from importlib.resources import as_file, files

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files_of_site: Files, /, *, config: MkDocsConfig) -> Files:
    """Add ``javascripts/mermaid.js``, which theme/main.html loads."""
    with as_file(files("mermaidx") / "assets/mermaid.js") as script:
        files_of_site.append(File.generated(config, "javascripts/mermaid.js", abs_src_path=str(script)))
    return files_of_site
