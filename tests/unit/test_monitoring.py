"""Alert rules and dashboard: well formed, and about series that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml

from cluster.metrics import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((ROOT / "deploy/grafana/drover.json").read_text(encoding="utf-8"))

RULE_FILE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["groups"],
    "properties": {
        "groups": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "rules"],
                "properties": {
                    "name": {"type": "string"},
                    "interval": {"$ref": "#/$defs/duration"},
                    "rules": {"type": "array", "items": {"$ref": "#/$defs/alert"}, "minItems": 1},
                },
            },
        }
    },
    "$defs": {
        "duration": {"type": "string", "pattern": "^([0-9]+(ms|[smhdwy]))+$"},
        "texts": {"type": "object", "additionalProperties": {"type": "string"}},
        "alert": {
            "type": "object",
            "additionalProperties": False,
            "required": ["alert", "expr", "labels", "annotations"],
            "properties": {
                "alert": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
                "expr": {"type": "string"},
                "for": {"$ref": "#/$defs/duration"},
                "keep_firing_for": {"$ref": "#/$defs/duration"},
                "labels": {"$ref": "#/$defs/texts"},
                "annotations": {"$ref": "#/$defs/texts"},
            },
        },
    },
}
"""What Prometheus takes as a file of alerting rules."""


def alerts() -> Iterator[dict[str, Any]]:
    for group in ALERTS["groups"]:
        yield from group["rules"]


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            yield panel


def expressions() -> dict[str, str]:
    """PromQL by where it stands, Grafana's variables replaced by values."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "5m").replace("$engine", ".*")
            found[f"{panel['title']} {target['refId']}"] = text
    return found


def selectors(expression: str) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        match node:
            case promql_parser.VectorSelector():
                found.append(node)
            case promql_parser.MatrixSelector():
                visit(node.vector_selector)
            case promql_parser.AggregateExpr() | promql_parser.UnaryExpr():
                visit(node.expr)
            case promql_parser.ParenExpr() | promql_parser.SubqueryExpr():
                visit(node.expr)
            case promql_parser.BinaryExpr():
                visit(node.lhs)
                visit(node.rhs)
            case promql_parser.Call():
                for argument in node.args:
                    visit(argument)

    visit(promql_parser.parse(expression))
    return found


def series_of(selector: Any) -> tuple[str, frozenset[str]]:
    """The declared series that is selected, and the labels it has."""
    name = selector.name
    for suffix in ("_bucket", "_sum", "_count"):
        base = name.removesuffix(suffix)
        if base != name and base in CATALOGUE and CATALOGUE[base].kind == "histogram":
            more = {"le"} if suffix == "_bucket" else set()
            return base, frozenset({*CATALOGUE[base].labels, *more})
    assert CATALOGUE[name].kind != "histogram", f"{name} has no values of its own"
    return name, frozenset(CATALOGUE[name].labels)


@pytest.mark.parametrize("where", expressions())
def test_expressions_are_about_series_and_labels_that_exist(where: str) -> None:
    expression = expressions()[where]
    known: set[str] = set()
    found = selectors(expression)
    assert found
    for selector in found:
        _, labels = series_of(selector)
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= labels
        known |= labels
    for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        assert {name.strip() for name in grouped.split(",")} <= known


@pytest.mark.parametrize("where", expressions())
def test_counters_are_shown_as_rates(where: str) -> None:
    text = re.sub(r"\s+", "", expressions()[where])
    for selector in selectors(expressions()[where]):
        name, _ = series_of(selector)
        if CATALOGUE[name].kind in ("counter", "histogram"):
            assert f"rate({selector.name}" in text


def test_the_alerts_are_a_file_of_rules() -> None:
    jsonschema.validate(ALERTS, RULE_FILE)
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    assert all(rule["labels"]["severity"] in ("warning", "critical") for rule in alerts())
    assert all(rule["annotations"]["summary"] for rule in alerts())


def test_a_mistake_in_a_rule_is_found() -> None:
    spoiled = json.loads(json.dumps(ALERTS))
    spoiled["groups"][0]["rules"][0]["expression"] = "1"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoiled, RULE_FILE)
    with pytest.raises(KeyError):
        series_of(selectors("rate(drover_request_total[5m])")[0])


def test_commands_and_flags_named_in_alerts_exist() -> None:
    from cluster.cli import build_parser
    from cluster.config import ServeConfig
    from cluster.flags import flags_of

    texts = " ".join(text for rule in alerts() for text in rule["annotations"].values())
    flags = {f"--{name.replace('_', '-')}" for name in flags_of(ServeConfig)}
    named = set(re.findall(r"--[a-z-]+", texts))
    assert named
    assert named <= flags
    commands = set(re.findall(r"`drover (\w+)", texts))
    help_text = build_parser().format_help()
    assert commands
    assert all(re.search(rf"^\s+{command}\s", help_text, re.MULTILINE) for command in commands)


def test_the_dashboard_is_laid_out() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert cells.isdisjoint(own)
        cells |= own
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)\}?", json.dumps(DASHBOARD["panels"])))
    assert used <= variables
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
        assert panel["description"]
