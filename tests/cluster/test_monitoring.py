"""Dashboards and alerts name only metrics that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from f2llm_ray.train.trackers import GAUGES
from tests.corpus import write_corpus, write_recipe
from tests.ports import free_port
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OURS = {
    *(f"ray_f2llm_train_{name}" for name in GAUGES),
    "ray_f2llm_progress",
    "ray_f2llm_progress_rate",
    *(
        f"ray_{name}"
        for name in re.findall(r'"(f2llm_\w+)"', (ROOT / "f2llm_ray" / "serve" / "middleware.py").read_text())
    ),
}
RAYS = {
    "ray_object_store_memory",
    "ray_node_mem_used",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts",
}
"""Metrics of Ray's own that we use; the slow test sees them in a real run."""
ON_GPUS = "ray_f2llm_train_mfu"
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ", re.MULTILINE)
LABEL = re.compile(r'(\w+)="')
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


class Scraped:
    """Names of metrics with the labels they were seen with."""

    def __init__(self) -> None:
        self.labels: dict[str, set[str]] = defaultdict(set)

    def scrape(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            for name, labels in SAMPLE.findall(answer.read().decode()):
                self.labels[name] |= set(LABEL.findall(labels))


def labels_in(query: str) -> set[str]:
    """The labels that a query selects, groups or names by."""
    grouped = [label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")]
    chosen = re.findall(r"(\w+)(?:=~|!=|=)\"", query)
    return {*grouped, *chosen, *re.findall(r"label_values\(\w+, (\w+)\)", query)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_exports_every_metric_and_label_that_is_asked_for(tmp_path: Path) -> None:
    import ray
    from ray import serve

    from f2llm_ray.serve.app import build

    recipe = write_corpus(tmp_path)
    recipe["stages"]["stage1"] |= {"epochs": 3, "checkpoint_every": 8}
    for section in ("prune", "distill", "evaluation"):
        del recipe[section]
    arguments = ["--recipe", str(write_recipe(tmp_path, recipe)), "--root", str(tmp_path / "root")]
    context = ray.init("local", num_cpus=4)
    port, seen = int(ray.nodes()[0]["MetricsExportPort"]), Scraped()
    try:
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *arguments],
            env={**os.environ, "RAY_ADDRESS": context.address_info["gcs_address"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while run.poll() is None:
            seen.scrape(port)
            time.sleep(1)
        assert run.returncode == 0, run.communicate()[0]
        http = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": http})
        serve.run(build({"model": str(tiny_model(tmp_path / "model"))}))
        for _ in range(20):
            httpx.post(f"http://127.0.0.1:{http}/embed", json={"inputs": "a text"}, timeout=60).raise_for_status()
            time.sleep(1)
            seen.scrape(port)
    finally:
        serve.shutdown()
        ray.shutdown()
    for place, query in queries():
        for name in set(re.findall(r"\bray_\w+", query)) - {ON_GPUS}:
            assert name in seen.labels, f"{place}: {name} was not exported"
            assert labels_in(query) <= seen.labels[name], f"{place}: {name} has {sorted(seen.labels[name])}"
