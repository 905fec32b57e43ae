"""What a PromQL expression names: its metrics with their label matchers, and the labels that it groups by.

Finds names only; promtool checks the syntax.
"""

import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import ROOT

from lesson_server import errors
from lesson_server.gateway.handlers import DISCONNECTED, SUCCESS

# Metric → its labels → their values, of a scrape.
Export = dict[str, Mapping[str, Collection[str]]]

RULES = ROOT / "conf/prometheus/alerts.yaml"
RUNBOOK = ROOT / "docs/operating/alerts.md"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not there"
)

# What Prometheus itself adds.
TARGET_LABELS = {"job", "instance"}
OF_PROMETHEUS = {"up": TARGET_LABELS, "ALERTS": {"alertname", "alertstate", "severity", "store", "outcome", "event"}}

TEXT = re.compile(r'"((?:\\.|[^"\\])*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([\w\s,]*)\)")
NO_METRIC = re.compile(r"\[[^\]]*\]|\boffset\s+\w+|\b(?:and|or|unless|bool|group_left|group_right)\b")
# A name that is no function, with its matchers. Texts have been replaced by numbers.
SELECTOR = re.compile(r"(?<![\w.:])([A-Za-z_:][\w:]*)\b(?!\s*\()\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"(\d+)"')
COUNTED = re.compile(r"\b(?:rate|increase)\(\s*([\w:]+)")
MADE = re.compile(r'\),\s*"(\w+)",\s*"[^"]*",\s*"\w+",')


@dataclass(frozen=True)
class Selector:
    """A metric and its label matchers: label, operator, value."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Names:
    """The names in an expression.

    Attributes:
        selectors: every selector of a metric.
        labels: the labels of ``by``, ``on`` and so on.
        made: the labels that ``label_replace`` makes.
        counted: the metrics of which a rate or an increase is taken.
    """

    selectors: tuple[Selector, ...]
    labels: frozenset[str]
    made: frozenset[str]
    counted: frozenset[str]

    @property
    def metrics(self) -> set[str]:
        return {selector.metric for selector in self.selectors}


def names_in(expression: str) -> Names:
    """Return the names in an expression."""
    texts: list[str] = []

    def number(match: re.Match[str]) -> str:
        texts.append(match[1])
        return f'"{len(texts) - 1}"'

    masked = TEXT.sub(number, expression)
    labels = {label for group in GROUPING.findall(masked) for label in re.findall(r"\w+", group)}
    bare = NO_METRIC.sub(" ", GROUPING.sub(" ", masked))
    selectors = (
        Selector(name, tuple((label, operator, texts[int(text)]) for label, operator, text in MATCHER.findall(inside)))
        for name, inside in SELECTOR.findall(bare)
    )
    return Names(
        tuple(selectors),
        frozenset(labels),
        frozenset(MADE.findall(expression)),
        frozenset(COUNTED.findall(expression)),
    )


def promtool(*arguments: str | Path) -> None:
    """Run promtool, which must find no fault."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def all_outcomes() -> set[str]:
    """Return the outcomes of every refusal, whether or not it has happened."""

    def below(refusal: type[errors.Refusal]) -> Iterable[type[errors.Refusal]]:
        for each in refusal.__subclasses__():
            yield each
            yield from below(each)

    return {SUCCESS, DISCONNECTED, *(refusal.outcome for refusal in below(errors.Refusal))}


def faults_of(expression: str, export: Export, recorded: Mapping[str, str]) -> list[str]:
    """Return what an expression names and no server exports.

    Args:
        expression: any expression.
        export: what a server exports.
        recorded: the recording rules: name → expression.
    """
    names = names_in(expression)
    if not names.metrics:
        return [f"no metric in {expression}"]
    faults = [
        fault
        for selector in names.selectors
        if selector.metric not in recorded
        for fault in _faults_of(selector, export)
    ]
    known = (
        TARGET_LABELS | names.made | {label for name in names.metrics for label in _labels_of(name, export, recorded)}
    )
    faults += [f"no metric in it has the label {label}" for label in names.labels - known]
    faults += [
        f"{name} is no counter"
        for name in names.counted
        if not name.endswith(("_total", "_bucket", "_count", "_sum")) and name not in recorded
    ]
    return faults


def _labels_of(metric: str, export: Export, recorded: Mapping[str, str]) -> Set[str]:
    if metric in recorded:
        names = names_in(recorded[metric])
        return names.labels | {
            label for name in names.metrics & recorded.keys() for label in _labels_of(name, export, recorded)
        }
    if metric in OF_PROMETHEUS:
        return OF_PROMETHEUS[metric]
    return export.get(metric, {}).keys()


def _faults_of(selector: Selector, export: Export) -> Iterable[str]:
    if selector.metric in OF_PROMETHEUS:
        return
    if selector.metric not in export:
        yield f"no server exports {selector.metric}"
        return
    labels = export[selector.metric]
    for label, operator, value in selector.matchers:
        if label in TARGET_LABELS:
            continue
        if label not in labels:
            yield f"{selector.metric} has no label {label}"
            continue
        known = {*labels[label], *(all_outcomes() if label in ("outcome", "reason") else ())}
        for each in value.split("|") if "~" in operator else [value]:
            if each not in known:
                yield f"{selector.metric} has no {label} {each}"
