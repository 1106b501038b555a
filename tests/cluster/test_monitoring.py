"""Dashboards and alerts name only metrics that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from f2llm_ray.train.displays import GAUGES

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OURS = {
    *(f"ray_f2llm_train_{name}" for name in GAUGES),
    "ray_f2llm_progress",
    "ray_f2llm_progress_rate",
    *(
        f"ray_{name}"
        for name in re.findall(r'"(f2llm_\w+)"', (ROOT / "f2llm_ray" / "serve" / "metrics.py").read_text())
    ),
}
RAYS = {
    "ray_object_store_memory",
    "ray_node_mem_used",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts",
}
"""Metrics of Ray's own that we use; the slow test sees them in a real run."""
SUFFIX = re.compile(r"_(total|bucket|count|sum)$")


def queries() -> Iterator[tuple[str, str]]:
    """Place and text of every query."""
    for path in sorted((CLUSTER / "grafana").glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.name}: ${variable['name']}", variable["query"]["query"]
    for group in rules():
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def rules() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load((CLUSTER / "prometheus" / "rules.yaml").read_text())["groups"]
    return groups


@pytest.mark.parametrize(("place", "query"), list(queries()))
def test_queries_name_metrics_that_exist(place: str, query: str) -> None:
    named = set(re.findall(r"\bray_\w+", query))
    assert named, place
    assert {SUFFIX.sub("", name) for name in named} <= {*OURS, *RAYS}
    assert query.count("(") == query.count(")")
    assert query.count("{") == query.count("}")


def test_every_metric_of_ours_is_on_a_dashboard() -> None:
    shown = {SUFFIX.sub("", name) for _, query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert shown >= OURS


def test_every_alert_is_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for group in rules():
        for rule in group["rules"]:
            assert f"\n## {rule['alert']}\n" in runbook
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_panels_do_not_overlap() -> None:
    for path in (CLUSTER / "grafana").glob("*.json"):
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))
        assert len({panel["id"] for panel in panels}) == len(panels)
