"""The drawings are those of the charts, wherever they were drawn; docs/arrows.md names what the charts name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from statecharts import export

ROOT = Path(__file__).parents[2]
DRAWINGS = ["participant.mmd", "participant.svg", "teacher.mmd", "teacher.svg"]

every_chart = pytest.mark.parametrize("name", export.CHARTS)
every_drawing = pytest.mark.parametrize("drawing", DRAWINGS)


@pytest.fixture
def diagrams(tmp_path, monkeypatch) -> Path:
    """A copy of the committed drawings, in place of them."""
    copy = tmp_path / "diagrams"
    shutil.copytree(export.DIAGRAMS, copy)
    monkeypatch.setattr(export, "DIAGRAMS", copy)
    return copy


def names(chart: ModuleType, *lists: str) -> set[str]:
    return {name for row in chart.TRANSITIONS for kind in lists for name in row.get(kind, [])}


# Fresh


def test_the_committed_drawings_are_fresh(capsys):
    assert export.main(["--check"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_command_of_the_message_is_a_command():
    command = [sys.executable, *export.COMMAND.split()[1:], "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_drawing_again_changes_nothing_but_the_layout(diagrams, capsys):
    """The Graphviz of this machine need not be the one of the machine that the drawings were made on."""
    pytest.importorskip("pygraphviz")
    committed = {path: path.read_bytes() for path in diagrams.glob("*.mmd")}
    for path in diagrams.iterdir():
        path.unlink()
    assert export.main([]) == 0
    assert sorted(capsys.readouterr().out.split()) == [str(diagrams / drawing) for drawing in DRAWINGS]
    assert {path: path.read_bytes() for path in diagrams.glob("*.mmd")} == committed
    assert export.main(["--check"]) == 0


def test_another_layout_of_the_same_chart_is_fresh(diagrams):
    source = export.dot("teacher", export.CHARTS["teacher"])
    (diagrams / "teacher.svg").write_text(export.seal(source, "<svg/>\n"))
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
        lambda text: text.replace("take_seat", "take_a_seat"),
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
def test_a_chart_that_changed_makes_both_its_drawings_stale(diagrams, capsys, monkeypatch, name, change):
    chart = export.CHARTS[name]
    for attribute, value in change(chart).items():
        monkeypatch.setattr(chart, attribute, value)
    assert_check_fails(capsys, f"{diagrams / name}.mmd is stale", f"{diagrams / name}.svg is stale")


# Complete


def words(row: dict) -> list[str]:
    """The lines that stand at a row's arrow."""
    conditions = [f"[{condition}]" for condition in row.get("conditions", [])]
    return [" ".join([row["trigger"], *conditions]), *row.get("before", [])]


@every_chart
def test_mermaid_has_an_arrow_for_each_row_and_a_note_for_each_state(name):
    chart = export.CHARTS[name]
    lines = [line.strip() for line in export.mermaid(chart).splitlines()]
    assert lines[:2] == ["stateDiagram-v2", f"[*] --> {chart.INITIAL}"]
    for row in chart.TRANSITIONS:
        assert lines.count(f"{row['source']} --> {row['dest']} : {'<br/>'.join(words(row))}") == 1
    for state, sentence in chart.STATES.items():
        note = lines.index(f"note right of {state}")
        assert lines[note + 1 : note + 3] == [sentence, "end note"]


@every_chart
def test_the_picture_has_every_row_with_its_words_in_order(name):
    """Read from the committed SVG: what Graphviz was given is one thing, what a reader sees another."""
    chart = export.CHARTS[name]
    svg = "{http://www.w3.org/2000/svg}"
    drawn: dict[str, list[list[str]]] = {}
    for group in ElementTree.parse(export.DIAGRAMS / f"{name}.svg").iter(f"{svg}g"):
        title = re.sub(r":\w+", "", group.find(f"{svg}title").text)  # without the sides: ``seated:w->connected:sw``
        drawn.setdefault(title, []).append([text.text.strip() for text in group.findall(f"{svg}text")])
    for row in chart.TRANSITIONS:
        assert words(row) in drawn[f"{row['source']}->{row['dest']}"]
    for state, sentence in chart.STATES.items():
        ((bold, *lines),) = drawn[state]
        assert (bold, " ".join(lines)) == (state, sentence)
    assert len(drawn[f"start->{chart.INITIAL}"]) == 1


# docs/arrows.md


def documented(section: str) -> set[str]:
    """The names in the column "Step" of a section's table."""
    text = (ROOT / "docs" / "arrows.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    header, _, *rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    column = header.index(next(title for title in header if title.strip() == "Step"))
    return {name for row in rows for name in re.findall(r"`(\w+)`", row[column])}


@pytest.mark.parametrize(("name", "section"), [("teacher", "Teacher App"), ("participant", "Participant")])
def test_the_table_of_arrows_names_what_the_chart_names(name, section):
    assert documented(section) | documented("Steps that are no arrow") == names(
        export.CHARTS[name], "before", "conditions"
    )
