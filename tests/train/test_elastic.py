"""Elastic training on a cluster that loses a node goes on with the workers that are left, to the same result."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe
from tests.corpus import write_corpus, write_recipe


def training(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(root.glob("stage1-*/training.json")).read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_loses_a_node_goes_on_with_one_worker(tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    corpus = write_corpus(tmp_path)
    corpus["stages"]["stage1"] |= {"epochs": 6, "checkpoint_every": 8}
    corpus["compute"] = {"workers": 2, "workers_min": 1, "cpus_per_worker": 1}
    recipe = load_recipe(str(write_recipe(tmp_path, corpus)))
    roots = [tmp_path / "undisturbed", tmp_path / "lost"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)

    def lose() -> None:
        while not list(roots[1].glob("stage1-*/ray_train/checkpoint_*/part-00001-of-00002.json")):
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)

    loser = threading.Thread(target=lose, daemon=True)
    try:
        for root in roots:
            pipeline = Pipeline(recipe, str(root))
            pipeline.stage(pipeline.graph.prepare)
            pipeline.model("untrained")
            if root is roots[1]:
                loser.start()
            pipeline.model("stage1")
    finally:
        ray.shutdown()
        cluster.shutdown()
    whole, lost = map(training, roots)
    assert (whole["workers"], lost["workers"]) == (2, 1)
    assert [step for step, _ in lost["loss"]] == [step for step, _ in whole["loss"]]
    # The one worker sums gradients in another order.
    np.testing.assert_allclose([loss for _, loss in lost["loss"]], [loss for _, loss in whole["loss"]], rtol=1e-2)
    assert [step for step, _ in lost["score"]] == [step for step, _ in whole["score"]]
