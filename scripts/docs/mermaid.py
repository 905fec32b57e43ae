"""A hook of MkDocs: Mermaid, which draws the sequence diagrams, is part of the site. Its wheel is ``mermaidx``."""

import importlib.resources
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``javascripts/mermaid.js``, which theme/main.html loads."""
    with importlib.resources.as_file(importlib.resources.files("mermaidx") / "assets/mermaid.js") as script:
        files.append(File.generated(config, "javascripts/mermaid.js", abs_src_path=str(script)))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put each diagram into a box that scrolls where the page is narrow: the theme itself would shrink it."""
    return re.sub(r'<pre class="mermaid">.*?</pre>', r'<div class="diagram">\g<0></div>', html, flags=re.DOTALL)
