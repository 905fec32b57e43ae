"""Draws the charts, as Mermaid and as SVG, into diagrams/: ``python -m statecharts.export [--check]``.

Both drawings hold every row of the chart: its trigger, its [conditions], and its steps in their order.
"""

import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from statecharts import participant, teacher

CHARTS = {"teacher": teacher, "participant": participant}
DIAGRAMS = Path(__file__).parent / "diagrams"
COMMAND = "python -m statecharts.export"

# Characters a line of a state's sentence: four states and their arrows then fit the width of a README, about 900 px.
SENTENCE_WIDTH = 40
STATE_WIDTH = 225

# The join is what a reader looks for: it stands out. The ways back and out are there to be looked up.
JOIN_STYLE = {"color": "#0550ae", "fontcolor": "#0550ae", "penwidth": "2.5", "weight": "100"}
STYLES = {
    "abandon": {"color": "#bc7a2c", "fontcolor": "#8a4f0b", "style": "dashed", "tailport": "w", "headport": "sw"},
    "disconnect": {"color": "#8c959f", "fontcolor": "#57606a", "tailport": "se"},
}


def heading(row: dict[str, Any]) -> str:
    """The trigger of a row and its conditions: ``register [has_access_token]``."""
    return " ".join([row["trigger"], *(f"[{condition}]" for condition in row.get("conditions", []))])


def steps(row: dict[str, Any]) -> list[str]:
    return row.get("before", [])


# Mermaid


def mermaid(chart: ModuleType) -> str:
    """The chart as a Mermaid state diagram, as GitHub renders it."""
    return "\n".join(_mermaid_lines(chart)) + "\n"


def _mermaid_lines(chart: ModuleType) -> Iterator[str]:
    yield "stateDiagram-v2"
    yield f"    [*] --> {chart.INITIAL}"
    for row in chart.TRANSITIONS:
        yield f"    {row['source']} --> {row['dest']} : {'<br/>'.join([heading(row), *steps(row)])}"
    for state, sentence in chart.STATES.items():
        # Not the `note … : text` of one line, which ends at a semicolon.
        yield f"    note right of {state}"
        yield from textwrap.wrap(sentence, SENTENCE_WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
        yield "    end note"


# DOT and SVG


def dot(name: str, chart: ModuleType) -> str:
    """The chart in Graphviz's language, from the top to the bottom, on a white ground that suits a dark page too."""
    return "\n".join(_dot_lines(name, chart)) + "\n"


def _dot_lines(name: str, chart: ModuleType) -> Iterator[str]:
    yield f"digraph {name} {{"
    yield '  graph [bgcolor="transparent", pad="0.05", nodesep="0.3", ranksep="0.3"]'
    # Text begins at the left everywhere, so that a viewer's font that is not ours moves no line.
    font = 'fontname="Helvetica,Arial,sans-serif"'
    yield f'  node [{font}, fontsize="10", shape="box", style="rounded,filled", margin="0.15,0.1", group="states"]'
    yield f'  edge [{font}, fontsize="9", arrowsize="0.7"]'
    yield "  subgraph cluster_ground {"
    yield '    graph [style="rounded,filled", color="#d0d7de", fillcolor="white", margin="12"]'
    yield '    start [shape="circle", style="filled", fillcolor="black", label="", width="0.16"]'
    for state, sentence in chart.STATES.items():
        label = _html(f"<b>{state}</b>", *map(escape, textwrap.wrap(sentence, SENTENCE_WIDTH)), width=STATE_WIDTH)
        yield f'    {state} [label={label}, color="#57606a", fillcolor="#f6f8fa"]'
    yield "  }"
    yield f'  start -> {chart.INITIAL} [penwidth="2"]'
    for row in chart.TRANSITIONS:
        style = JOIN_STYLE if row["trigger"] in chart.JOIN else STYLES[row["trigger"]]
        attributes = ", ".join(f'{key}="{value}"' for key, value in style.items())
        label = _html(f"<b>{row['trigger']}</b>{heading(row).removeprefix(row['trigger'])}", *steps(row))
        yield f"  {row['source']} -> {row['dest']} [label={label}, {attributes}]"
    yield "}"


def _html(*lines: str, width: int = 0, padding: int = 5) -> str:
    text = "".join(f'{line}<br align="left"/>' for line in lines)
    return f'<<table border="0" cellpadding="{padding}" width="{width}"><tr><td align="left">{text}</td></tr></table>>'


def draw(source: str) -> str:
    import pygraphviz

    return pygraphviz.AGraph(string=source).draw(format="svg", prog="dot").decode()


if __name__ == "__main__":
    for name, chart in CHARTS.items():
        Path(f"/tmp/v/{name}.svg").write_text(draw(dot(name, chart)))
        Path(f"/tmp/v/{name}.mmd").write_text(mermaid(chart))
