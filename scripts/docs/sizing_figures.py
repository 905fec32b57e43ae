"""A hook of MkDocs: the figures that the page of sizing calculates with come from the files of the measurements."""

import json
import statistics
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parents[2] / "docs"
MARK = "<!-- the figures of scripts/docs/sizing_figures.py -->"
RUN = "<!-- the run of docs/sizing.json -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the marks by the figures, and by when and where they were measured."""
    if MARK not in markdown:
        return markdown
    figures = f'<script type="application/json" id="sizing-measured">{json.dumps(measured())}</script>'
    about = json.loads((DOCS / "sizing.json").read_text("utf-8"))["about"]
    run = "{date}, {cpu}, {cores} cores; other processes used {others_percent:.0f} % of its CPU meanwhile".format(
        **about
    )
    return markdown.replace(MARK, figures).replace(RUN, run)


def measured() -> dict[str, Any]:
    """Return the figures: those of the stores from sizing.json, those of the server from benchmarks.json."""
    sizing = json.loads((DOCS / "sizing.json").read_text("utf-8"))
    server = json.loads((DOCS / "benchmarks.json").read_text("utf-8"))["contestants"]["lesson_server"]
    arrivals = sizing["arrivals"]
    for rate, rounds in server["steady"].items():
        arrivals[rate]["server_us"] = statistics.median(figures["life_us"] for figures in rounds)
    fewest, most = server["hold"][0], server["hold"][-1]
    memory = {"process_kb": fewest["rss_kb"], "connection_kb": most["rss_kb_per_held"]}
    return {"arrivals": arrivals, "held": sizing["held"], "memory": memory}
