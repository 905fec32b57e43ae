"""Draw the charts into diagrams/, as Mermaid and as SVG: ``python -m statecharts.export [--check]``.

Every row of a chart is one arrow of its drawings, with its trigger, its [conditions] and its steps in their order.
"""

import argparse
import hashlib
import importlib
import pkgutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import statecharts

DIAGRAMS = Path(__file__).parent / "diagrams"
COMMAND = "python -m statecharts.export"

# Characters per line of a state's sentence. With the arrows on both sides, the drawing fills the width of a README,
# about 900 px.
SENTENCE_WIDTH = 40

# Points. Helvetica needs about 185 for such a line; a viewer without Helvetica may use Verdana, a fifth wider.
STATE_WIDTH = 225

# The path of the event is highlighted, because readers look for it first. The other transitions are for reference.
PATH_STYLE = {"color": "#0550ae", "fontcolor": "#0550ae", "penwidth": "2.5"}
STYLES = {
    "abandon": {"color": "#bc7a2c", "fontcolor": "#8a4f0b", "style": "dashed"},
    "restore": {"color": "#57ab5a", "fontcolor": "#1a7f37"},
    "remove": {"color": "#cf222e", "fontcolor": "#a40e26"},
    "disconnect": {"color": "#8c959f", "fontcolor": "#57606a"},
}

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the drawings, or with ``--check`` compare them with the charts; return the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Draw the statecharts into statecharts/diagrams.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a drawing is stale or missing")
    if parser.parse_args(argv).check:
        return check(find_charts(), DIAGRAMS)
    write(find_charts(), DIAGRAMS)
    return 0


def find_charts() -> list[ModuleType]:
    """Return every chart: the modules of the folders in ``statecharts``."""
    names = (module.name for module in pkgutil.walk_packages(statecharts.__path__, "statecharts."))
    return [importlib.import_module(name) for name in names if name.count(".") == 2]


def write(charts: Iterable[ModuleType], folder: Path) -> None:
    """Draw the charts into ``folder``, as ``<event>/<client>.mmd`` and ``.svg``."""
    for chart in charts:
        mmd, svg = _paths(chart, folder)
        mmd.parent.mkdir(parents=True, exist_ok=True)
        source = dot(chart)
        for path, text in ((mmd, mermaid(chart)), (svg, seal(source, draw(source)))):
            path.write_text(text, encoding="utf-8", newline="\n")
            print(path)


def check(charts: Iterable[ModuleType], folder: Path) -> int:
    """Print which drawings in ``folder`` are stale, missing or of no chart; return 1 if there are any, else 0."""
    charts = list(charts)
    paths = {path for chart in charts for path in _paths(chart, folder)}
    wrong = [
        f"{path} is {'stale' if path.exists() else 'missing'}" for chart in charts for path in _stale(chart, folder)
    ]
    wrong += [f"{path} is of no chart" for path in sorted(folder.rglob("*.*")) if path not in paths]
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(f"to draw the charts again, run: {COMMAND}", file=sys.stderr)
    return 1 if wrong else 0


def _stale(chart: ModuleType, folder: Path) -> Iterator[Path]:
    mmd, svg = _paths(chart, folder)
    if _read(mmd) != mermaid(chart):
        yield mmd
    drawing, _, _ = _read(svg).rpartition("<!--")
    if _read(svg) != seal(dot(chart), drawing):
        yield svg


def _paths(chart: ModuleType, folder: Path) -> tuple[Path, Path]:
    stem = folder / chart.EVENT / chart.CLIENT
    return stem.with_suffix(".mmd"), stem.with_suffix(".svg")


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


# Mermaid


def mermaid(chart: ModuleType) -> str:
    """Return the chart as a Mermaid state diagram, in the syntax that GitHub renders."""
    return "\n".join(_mermaid_lines(chart)) + "\n"


def _mermaid_lines(chart: ModuleType) -> Iterator[str]:
    yield "stateDiagram-v2"
    yield f"    [*] --> {chart.INITIAL}"
    for row in chart.TRANSITIONS:
        label = "<br/>".join([_heading(row), *_steps(row)])
        yield f"    {row['source']} --> {row['dest']} : {label}"
    for state, sentence in chart.STATES.items():
        # Not the short form `note right of … : text`: that form ends at the first semicolon of the sentence.
        yield f"    note right of {state}\n        {sentence}\n    end note"


# DOT and SVG


def dot(chart: ModuleType) -> str:
    """Return the chart in Graphviz's language: top to bottom, on a white card that suits a light and a dark page."""
    return "\n".join(_dot_lines(chart)) + "\n"


def _dot_lines(chart: ModuleType) -> Iterator[str]:
    font = 'fontname="Helvetica,Arial,sans-serif"'
    yield f"digraph {chart.CLIENT} {{"
    yield '  graph [bgcolor="transparent", pad="0.05", nodesep="0.3", ranksep="0.3"]'
    yield f'  node [{font}, fontsize="10", shape="box", style="rounded,filled", margin="0.15,0.1", group="states"]'
    yield f'  edge [{font}, fontsize="9", arrowsize="0.7"]'
    # A cluster, because a graph's own background can't have round corners.
    yield "  subgraph cluster_card {"
    yield '    graph [style="rounded,filled", color="#d0d7de", fillcolor="white", margin="12"]'
    yield '    start [shape="circle", style="filled", fillcolor="black", label="", width="0.16"]'
    for state, sentence in chart.STATES.items():
        lines = [f"<b>{state}</b>", *map(escape, textwrap.wrap(sentence, SENTENCE_WIDTH))]
        yield f'    {state} [label={_label(lines, width=STATE_WIDTH)}, color="#57606a", fillcolor="#f6f8fa"]'
    yield "  }"
    yield f'  start -> {chart.INITIAL} [penwidth="2"]'
    for row in chart.TRANSITIONS:
        style = PATH_STYLE if row["trigger"] in chart.PATH else STYLES.get(row["trigger"], {})
        attributes = ", ".join(f'{key}="{value}"' for key, value in (style | _route(chart, row)).items())
        label = _label([f"<b>{_heading(row)}</b>", *_steps(row)])
        yield f"  {row['source']} -> {row['dest']} [label={label}, {attributes}]"
    yield "}"


def _route(chart: ModuleType, row: Row) -> dict[str, str]:
    """Route an arrow straight down to the next state, down on the right past other states, or back up on the left.

    A loop of the path has no ports: Graphviz puts it on the right, and keeps room for its label on the card.
    """
    states = list(chart.STATES)
    distance = states.index(row["dest"]) - states.index(row["source"])
    if distance == 1:
        return {"weight": "100"}
    if distance == 0 and row["trigger"] in chart.PATH:
        return {}
    return {"tailport": "e"} if distance > 1 else {"tailport": "w", "headport": "sw"}


def _label(lines: list[str], width: int = 0) -> str:
    # Every line is left-aligned: if a viewer's font differs from the measured font, only the line ends move.
    text = "".join(f'{line}<br align="left"/>' for line in lines)
    return f'<<table border="0" cellpadding="5" width="{width}"><tr><td align="left">{text}</td></tr></table>>'


def draw(source: str) -> str:
    """Return the SVG of a DOT source.

    Only this function needs pygraphviz: ``--check`` runs without it.
    """
    try:
        import pygraphviz
    except ImportError as error:  # its wheel brings Graphviz, but not glib
        sys.exit(f"drawing needs pygraphviz (pip install 'lesson-server[dev]') and glib: {error}")
    svg: bytes = pygraphviz.AGraph(string=source).draw(format="svg", prog="dot")
    return svg.decode()


def seal(source: str, drawing: str) -> str:
    """Return the drawing with a digest of the drawing and its source as the last line.

    Graphviz's layout depends on its version and on the machine's fonts, so ``--check`` can't redraw and compare. The
    digest shows on any machine, without Graphviz, whether the chart (or how it is drawn) has changed since the drawing
    was made, and whether the drawing was edited.
    """
    digest = hashlib.sha256(f"{source}{drawing}".encode()).hexdigest()
    return f"{drawing}<!-- sha256 of the DOT source and this drawing: {digest} -->\n"


# The labels of both formats


def _heading(row: Row) -> str:
    return " ".join([row["trigger"], *(f"[{condition}]" for condition in row.get("conditions", ()))])


def _steps(row: Row) -> Sequence[str]:
    steps: Sequence[str] = row.get("before", ())
    return steps


if __name__ == "__main__":
    sys.exit(main())
