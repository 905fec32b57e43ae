"""conf/prometheus: rules that promtool accepts, that name what servers export, and that are explained."""

import re
from typing import Any

import pytest
import yaml
from cluster import ROOT
from promql import RULES, RUNBOOK, Export, all_outcomes, faults_of, names_in, needs_promtool, promtool

from lesson_server.errors import OUR_FAULTS

TESTS = [RULES.with_name("alerts_test.yaml"), RULES.with_name("alerts_days_test.yaml")]

GROUPS = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
EXPRESSIONS = {rule.get("alert") or rule["record"]: rule["expr"] for group in GROUPS for rule in group["rules"]}
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDED = {name: expression for name, expression in EXPRESSIONS.items() if name not in ALERTS}
CASES = [case for path in TESTS for case in yaml.safe_load(path.read_text("utf-8"))["tests"]]


@needs_promtool
def test_promtool_accepts_the_rules():
    promtool("check", "rules", RULES)


@needs_promtool
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_the_rules_pass_their_tests(path):
    promtool("test", "rules", path)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_rule_names_what_servers_export(name: str, export: Export):
    assert faults_of(EXPRESSIONS[name], export, RECORDED) == []


def test_a_name_is_used_once():
    assert len(EXPRESSIONS) == sum(len(group["rules"]) for group in GROUPS)


def test_a_series_of_a_test_is_one_that_servers_export(export: Export):
    """A rule that names a metric which was renamed passes its test if the test names it too."""
    for case in CASES:
        for series in case["input_series"]:
            assert faults_of(series["series"], export, RECORDED) == []


@pytest.mark.parametrize(
    "expression",
    [
        "lesson_nothing_total",
        "sum by (nothing) (lesson_nodes)",
        'lesson_store_up{nothing="RDS"}',
        'lesson_store_up{store="MySQL"}',
        'lesson_events_total{outcome=~"success|nothing"}',
        "rate(lesson_nodes[5m])",
        "sum by (le) (job:lesson_joins:rate5m)",
        "1 + 1",
    ],
)
def test_a_name_that_no_server_exports_is_found(expression: str, export: Export):
    assert len(faults_of(expression, export, RECORDED)) == 1


# What counts against the error budget


def outcomes_in(expression: str, operator: str) -> list[set[str]]:
    matchers = [matcher for selector in names_in(expression).selectors for matcher in selector.matchers]
    return [set(value.split("|")) for label, each, value in matchers if (label, each) == ("outcome", operator)]


def test_the_budget_counts_every_fault_of_ours():
    ours = {refusal.outcome for refusal in OUR_FAULTS}
    assert outcomes_in(RECORDED["job:lesson_joins_failed:rate5m"], "=~") == [ours]
    (others,) = outcomes_in(RECORDED["job_outcome:lesson_joins_refused:rate10m"], "!~")
    assert others == ours | {"success", "disconnected"}
    assert ours < all_outcomes()


# The alerts


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS.keys())
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_it_is_explained(alert: dict[str, Any]):
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["description"].endswith(".")
    assert alert["annotations"]["runbook_url"] == f"{RUNBOOK.relative_to(ROOT)}#{alert['alert'].lower()}"


def sections() -> dict[str, str]:
    """The sections of the runbook about an alert: name → text."""
    _, *parts = re.split(r"^### ", RUNBOOK.read_text("utf-8"), flags=re.MULTILINE)
    return {name: text for name, _, text in (part.partition("\n") for part in parts)}


def test_the_runbook_has_a_section_for_each_alert_and_no_other():
    assert list(sections()) == list(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_a_section_tells_what_it_means_what_clients_feel_what_to_look_at_and_what_to_do(alert: str):
    text = sections()[alert]
    assert re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE) == ["Means.", "Clients.", "Look.", "Do."]
    severity = ALERTS[alert]["labels"]["severity"]
    assert f"| [{alert}](#{alert.lower()}) | {severity} |" in RUNBOOK.read_text("utf-8")


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_tested_where_it_fires_and_where_it_does_not(alert: str):
    fires, is_quiet = 0, 0
    for case in CASES:
        for check in case.get("alert_rule_test", []):
            if check["alertname"] == alert:
                fires += len(check["exp_alerts"])
                # Of the series' jobs and instances, those that are not expected to fire.
                is_quiet += not check["exp_alerts"]
                is_quiet += _cases_of(case) > len(check["exp_alerts"]) > 0
    assert fires
    assert is_quiet


def _cases_of(case: dict[str, Any]) -> int:
    series = [names_in(each["series"]).selectors[0] for each in case["input_series"]]
    targets = {
        tuple(value for label, _, value in each.matchers if label in ("job", "instance", "outcome")) for each in series
    }
    return len(targets)


@pytest.mark.parametrize("metric", sorted({name for text in EXPRESSIONS.values() for name in names_in(text).metrics}))
def test_a_recorded_metric_has_the_name_of_a_level_a_metric_and_an_operation(metric: str):
    if ":" in metric:
        assert re.fullmatch(r"job(_outcome)?:lesson_\w+:\w+", metric)
        assert metric in RECORDED
