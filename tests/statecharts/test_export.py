"""The drawings are those of the charts, wherever they were drawn; the pages of the events name what the charts name."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from statecharts import export

ROOT = Path(__file__).parents[2]
CHARTS = export.find_charts()
EVENTS = sorted({chart.EVENT for chart in CHARTS})
DRAWINGS = sorted(f"{chart.EVENT}/{chart.CLIENT}.{ending}" for chart in CHARTS for ending in ("mmd", "svg"))

every_chart = pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: f"{chart.EVENT}-{chart.CLIENT}")
every_drawing = pytest.mark.parametrize("drawing", DRAWINGS)


@pytest.fixture
def diagrams(tmp_path, monkeypatch) -> Path:
    """A copy of the committed drawings, in place of them."""
    copy = tmp_path / "diagrams"
    shutil.copytree(export.DIAGRAMS, copy)
    monkeypatch.setattr(export, "DIAGRAMS", copy)
    return copy


def names(charts: Iterable[ModuleType]) -> set[str]:
    """The steps and conditions that the charts name."""
    rows = [row for chart in charts for row in chart.TRANSITIONS]
    return {name for row in rows for kind in ("before", "conditions") for name in row.get(kind, [])}


def test_the_charts_are_those_of_the_contract():
    assert DRAWINGS[:4] == [
        "join_lesson/participant.mmd",
        "join_lesson/participant.svg",
        "join_lesson/teacher.mmd",
        "join_lesson/teacher.svg",
    ]


# Fresh


def test_the_committed_drawings_are_fresh(capsys):
    assert export.main(["--check"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_command_of_the_message_is_a_command():
    command = [sys.executable, *export.COMMAND.split()[1:], "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_drawing_again_changes_nothing_but_the_layout(diagrams, capsys):
    """The Graphviz of this machine need not be the one of the machine that the drawings were made on."""
    pytest.importorskip("pygraphviz", exc_type=ImportError)
    committed = {path: path.read_bytes() for path in diagrams.rglob("*.mmd")}
    shutil.rmtree(diagrams)
    assert export.main([]) == 0
    assert sorted(capsys.readouterr().out.split()) == [str(diagrams / drawing) for drawing in DRAWINGS]
    assert {path: path.read_bytes() for path in diagrams.rglob("*.mmd")} == committed
    assert export.main(["--check"]) == 0


def test_another_layout_of_the_same_chart_is_fresh(diagrams):
    (chart, *_) = CHARTS
    source = export.dot(chart)
    (diagrams / chart.EVENT / f"{chart.CLIENT}.svg").write_text(export.seal(source, "<svg/>\n"))
    assert export.main(["--check"]) == 0


def test_check_needs_no_pygraphviz_and_drawing_says_how_to_get_it(diagrams, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    assert export.main(["--check"]) == 0
    with pytest.raises(SystemExit, match=re.escape("pip install 'lesson-server[dev]'")):
        export.main([])


# Stale


def assert_check_fails(capsys, *complaints: str) -> None:
    assert export.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [*complaints, f"to draw the charts again, run: {export.COMMAND}"]


@every_drawing
def test_a_missing_drawing_is_told(diagrams, capsys, drawing):
    (diagrams / drawing).unlink()
    assert_check_fails(capsys, f"{diagrams / drawing} is missing")


@every_drawing
@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("disconnected", "gone"),
        lambda text: text + "\n",
        lambda text: text[: len(text) // 2],
        lambda text: "",
    ],
    ids=["reworded", "longer", "cut", "empty"],
)
def test_an_edited_drawing_is_stale(diagrams, capsys, drawing, edit):
    path = diagrams / drawing
    path.write_text(edit(path.read_text()))
    assert_check_fails(capsys, f"{path} is stale")


def without_last_row(chart: ModuleType) -> dict[str, object]:
    return {"TRANSITIONS": chart.TRANSITIONS[:-1]}


def with_steps_reversed(chart: ModuleType) -> dict[str, object]:
    first, *rest = chart.TRANSITIONS
    return {"TRANSITIONS": [first | {"before": first["before"][::-1]}, *rest]}


def with_a_condition(chart: ModuleType) -> dict[str, object]:
    first, *rest = chart.TRANSITIONS
    return {"TRANSITIONS": [first | {"conditions": ["has_paid"]}, *rest]}


def with_another_sentence(chart: ModuleType) -> dict[str, object]:
    return {"STATES": chart.STATES | {"seated": "Sits."}}


@every_chart
@pytest.mark.parametrize("change", [without_last_row, with_steps_reversed, with_a_condition, with_another_sentence])
def test_a_chart_that_changed_makes_both_its_drawings_stale(diagrams, capsys, monkeypatch, chart, change):
    for attribute, value in change(chart).items():
        monkeypatch.setattr(chart, attribute, value)
    stem = diagrams / chart.EVENT / chart.CLIENT
    assert_check_fails(capsys, f"{stem}.mmd is stale", f"{stem}.svg is stale")


def test_a_drawing_of_no_chart_is_told(diagrams, capsys):
    stray = diagrams / "join_lesson" / "hub.svg"
    stray.write_text("<svg/>")
    assert_check_fails(capsys, f"{stray} is of no chart")


# Complete


def words(row: dict) -> list[str]:
    """The lines that stand at a row's arrow."""
    conditions = [f"[{condition}]" for condition in row.get("conditions", [])]
    return [" ".join([row["trigger"], *conditions]), *row.get("before", [])]


@every_chart
def test_mermaid_has_an_arrow_for_each_row_and_a_note_for_each_state(chart):
    lines = [line.strip() for line in export.mermaid(chart).splitlines()]
    assert lines[:2] == ["stateDiagram-v2", f"[*] --> {chart.INITIAL}"]
    for row in chart.TRANSITIONS:
        assert lines.count(f"{row['source']} --> {row['dest']} : {'<br/>'.join(words(row))}") == 1
    for state, sentence in chart.STATES.items():
        note = lines.index(f"note right of {state}")
        assert lines[note + 1 : note + 3] == [sentence, "end note"]


@every_chart
def test_the_picture_has_every_row_with_its_words_in_order(chart):
    """Read from the committed SVG: what Graphviz was given is one thing, what a reader sees another."""
    svg = "{http://www.w3.org/2000/svg}"
    drawn: dict[str, list[list[str]]] = {}
    for group in ElementTree.parse(export.DIAGRAMS / chart.EVENT / f"{chart.CLIENT}.svg").iter(f"{svg}g"):
        title = re.sub(r":\w+", "", group.find(f"{svg}title").text)  # without the sides: ``seated:w->connected:sw``
        drawn.setdefault(title, []).append([text.text.strip() for text in group.findall(f"{svg}text")])
    for row in chart.TRANSITIONS:
        assert words(row) in drawn[f"{row['source']}->{row['dest']}"]
    for state, sentence in chart.STATES.items():
        ((bold, *lines),) = drawn[state]
        assert (bold, " ".join(lines)) == (state, sentence)
    assert len(drawn[f"start->{chart.INITIAL}"]) == 1


@every_chart
def test_the_words_of_the_path_are_on_the_white_card(chart):
    """They are dark, and the page around the card may be dark too."""
    svg = "{http://www.w3.org/2000/svg}"
    groups = list(ElementTree.parse(export.DIAGRAMS / chart.EVENT / f"{chart.CLIENT}.svg").iter(f"{svg}g"))
    (card,) = [group for group in groups if group.get("class") == "cluster"]
    edges = [float(x) for x in re.findall(r"(-?[\d.]+),", card.find(f"{svg}path").get("d"))]
    beginnings = [
        float(text.get("x"))
        for group in groups
        if group.get("class") == "edge"
        for text in group.findall(f"{svg}text")
        if text.get("fill") == export.PATH_STYLE["fontcolor"]
    ]
    assert beginnings
    assert all(min(edges) < x < max(edges) - 40 for x in beginnings)  # a word is 40 points long at least


# docs/events/


@pytest.mark.parametrize("event", EVENTS)
def test_the_page_of_an_event_names_what_its_charts_name(event):
    """Every step stands in a table with a column "Step"; a name that no chart has is a step that was renamed."""
    text = (ROOT / "docs" / "events" / f"{event}.md").read_text()
    documented: set[str] = set()
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "Step" in cells:
            column = cells.index("Step")
        elif not cells:
            column = None
        elif column is not None:
            documented |= set(re.findall(r"`(\w+)`", cells[column]))
    assert documented == names(chart for chart in CHARTS if event == chart.EVENT)
