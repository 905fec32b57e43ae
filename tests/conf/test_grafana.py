"""conf/grafana/lesson-server.json: a dashboard that Grafana can show, of what servers export."""

import json
import re
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from promql import RULES, RUNBOOK, Export, faults_of, needs_promtool, promtool

DASHBOARD = json.loads((ROOT / "conf/grafana/lesson-server.json").read_text("utf-8"))
PANELS = DASHBOARD["panels"]
SHOWN = [panel for panel in PANELS if panel["type"] != "row"]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RECORDED = {
    rule["record"]: rule["expr"]
    for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    for rule in group["rules"]
    if "record" in rule
}
# What Grafana puts in their place.
VARIABLES = {"$__rate_interval": "1m", "$__range": "3h", "$job": ".*", "$instance": ".*"}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in SHOWN:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


EXPRESSIONS = dict(expressions())


def filled_in(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = re.sub(re.escape(variable) + r"\b", value, expression)
    assert "$" not in expression.replace('"$1"', "")
    return expression


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_panel_shows_what_servers_export(name: str, export: Export):
    assert faults_of(EXPRESSIONS[name], export, RECORDED) == []


@needs_promtool
def test_prometheus_understands_every_expression(tmp_path: Path):
    rules = [
        {"record": f"panel:{number}", "expr": filled_in(expression)}
        for number, expression in enumerate(EXPRESSIONS.values())
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", path)


def test_ids_and_titles_are_unique():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in SHOWN}) == len(SHOWN)


def test_the_runbook_names_panels_that_exist():
    """What stands there in italics with a capital is the title of a panel, of a row, or of the dashboard."""
    named = re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", RUNBOOK.read_text("utf-8"))
    assert {" ".join(name.split()) for name in named} <= {DASHBOARD["title"], *(panel["title"] for panel in PANELS)}
    assert len(named) > 20


def test_panels_lie_side_by_side_within_24_columns():
    areas = {
        (panel["id"], panel["title"]): {
            (column, line)
            for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for line in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        }
        for panel in PANELS
    }
    for (one, area), (other, area_of_other) in combinations(areas.items(), 2):
        assert not area & area_of_other, f"{one} lies on {other}"
    everywhere = set().union(*areas.values())
    assert everywhere == {(column, line) for column in range(24) for line in range(max(y for _, y in everywhere) + 1)}


def test_panels_stand_in_the_file_as_on_the_page():
    for one, other in pairwise(PANELS):
        assert (one["gridPos"]["y"], one["gridPos"]["x"]) < (other["gridPos"]["y"], other["gridPos"]["x"])


@pytest.mark.parametrize("panel", SHOWN, ids=lambda panel: panel["title"])
def test_a_panel_has_a_unit_a_description_and_the_datasource_that_is_chosen(panel: dict[str, Any]):
    assert panel["type"] in ("stat", "timeseries", "state-timeline", "table")
    assert panel["fieldConfig"]["defaults"]["unit"] in ("none", "ops", "s", "bytes", "percentunit")
    assert panel["description"].endswith(".")
    assert panel["datasource"] == DATASOURCE
    assert all(target["datasource"] == DATASOURCE for target in panel["targets"])
    assert [target["refId"] for target in panel["targets"]] == list("ABCDEFG")[: len(panel["targets"])]


def test_the_variables_are_those_that_are_used():
    text = json.dumps(DASHBOARD)
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == defined == {"datasource", "job", "instance"}
    for panel in SHOWN:
        if panel["title"] != "Alerts":  # an alert on a whole job has no instance
            assert all("$job" in target["expr"] for target in panel["targets"]), panel["title"]


def test_a_metric_of_the_server_that_no_panel_shows_is_one_that_need_not_be_shown(export: Export):
    shown = " ".join(EXPRESSIONS.values()) + " ".join(RECORDED.values())
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in export if name.startswith("lesson_")}
    assert {family for family in families if family not in shown} == set()
