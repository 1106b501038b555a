"""Real clusters of several nodes (raylets of one machine) that lose a node half-way; minutes long, run by hand."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from f2llm_ray.serve.app import build
from tests.corpus import write_corpus, write_recipe
from tests.ports import free_port
from tests.tiny import tiny_model

REPO = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def cluster_of(nodes: int, *, cpus: int = 1, head_cpus: int = 1) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head and some more nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=cpus) for _ in range(nodes)]
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill(node: Any) -> None:
    """Takes a node away without a word: its raylet is killed, and its workers end with it."""
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


def job(name: str, recipe: Path, root: Path, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPO / "jobs" / f"{name}.py"), "--recipe", str(recipe), "--root", str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"},
    )


def finished(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


def digest(folder: Path) -> str:
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()]
    assert sums
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def wait_for(root: Path, pattern: str, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many files of the run are written."""
    until = time.monotonic() + 300
    while len(list(root.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


def test_data_steps_lose_a_node_and_write_the_same_bytes(tmp_path: Path) -> None:
    recipe = write_corpus(tmp_path, rows=20_000)
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    for part in range(40):
        (tmp_path / f"pairs-{part:02}.jsonl").write_text("".join(lines[part::40]))
    recipe["sources"]["pairs"]["paths"] = [str(tmp_path / "pairs-*.jsonl")]
    recipe["data"]["near_dedup"] = {}
    path = write_recipe(tmp_path, recipe)
    seconds = {}
    for name, lost in (("whole", False), ("lost", True)):
        with cluster_of(2) as (cluster, nodes):
            started = time.monotonic()
            process = job("prepare", path, tmp_path / name, cluster.address)
            if lost:
                wait_for(tmp_path / name, "prepare-*/rows/[0-9]*.parquet", 10, process)
                kill(nodes[0])
            finished(process)
            seconds[name] = time.monotonic() - started
    print(f"data steps: {seconds['whole']:.1f} s undisturbed, {seconds['lost']:.1f} s with a node lost")
    for part in ("rows", "near/groups", "table", "removed", "tokenizer", "tokens"):
        (whole,), (disturbed,) = ((tmp_path / name).glob(f"prepare-*/{part}") for name in ("whole", "lost"))
        assert digest(whole) == digest(disturbed), part


def test_training_loses_a_node_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    recipe = write_corpus(tmp_path)
    recipe["stages"]["stage1"] |= {"epochs": 6, "checkpoint_every": 16}
    recipe["compute"] = {"workers": 2, "cpus_per_worker": 0.6}  # two do not fit on a node
    for section in ("prune", "distill", "evaluation"):
        del recipe[section]
    path = write_recipe(tmp_path, recipe)
    seconds = {}
    for name, lost in (("whole", False), ("lost", True)):
        # The third node stands in for the one that an autoscaler would bring.
        with cluster_of(3, head_cpus=0) as (cluster, nodes):
            started = time.monotonic()
            process = job("pipeline", path, tmp_path / name, cluster.address)
            if lost:
                seal = "stage1-*/ray_train/checkpoint_*/part-00001-of-00002.json"
                wait_for(tmp_path / name, seal, 1, process)
                kill(next(node for node in nodes if trains_on(node)))
            output = finished(process)
            seconds[name] = time.monotonic() - started
    assert "stage1: goes on from step" in output
    print(f"training: {seconds['whole']:.1f} s undisturbed, {seconds['lost']:.1f} s with a node lost\n{output}")
    weights = [next((tmp_path / name).glob("stage1-*/model/model.safetensors")) for name in ("whole", "lost")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def trains_on(node: Any) -> bool:
    """Whether a training worker runs below the node's raylet."""
    raylet = node.all_processes["raylet"][0].process.pid
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == raylet and "RayTrainWorker" in (folder / "cmdline").read_text():
                return True
        except OSError:
            continue
    return False


class Load:
    """Clients that ask one after the other until they are told to stop; counts the answers by status."""

    def __init__(self, port: int, clients: int = 4) -> None:
        self.port, self.seen, self.going = port, Counter[Any](), True
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        body = json.dumps({"inputs": ["a short text"]})
        while self.going:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.request("POST", "/embed", body, {"Content-Type": "application/json"})
                self.seen[connection.getresponse().status] += 1
            except OSError as error:
                self.seen[type(error).__name__] += 1
            finally:
                connection.close()

    def stop(self) -> Counter[Any]:
        self.going = False
        for thread in self.threads:
            thread.join()
        return self.seen


def deploy(model: Path, port: int, replicas: int) -> None:
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    app = build({"model": str(model)})
    options = {"num_replicas": replicas, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 1}}
    app._bound_deployment = app._bound_deployment.options(**options)  # noqa: SLF001
    serve.run(app)


def running_replicas() -> int:
    (application,) = serve.status().applications.values()
    (deployment,) = application.deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def test_serving_loses_a_node_under_load(tmp_path: Path) -> None:
    model, port = tiny_model(tmp_path / "model"), free_port()
    with cluster_of(2, head_cpus=0) as (cluster, nodes):  # a replica on each
        cluster.connect()
        deploy(model, port, replicas=2)
        load = Load(port)
        time.sleep(5)
        kill(nodes[0])
        cluster.add_node(num_cpus=1)  # what an autoscaler does
        started = time.monotonic()
        while running_replicas() == 2 and time.monotonic() - started < 60:
            time.sleep(0.1)
        while running_replicas() < 2:
            assert time.monotonic() - started < 120
            time.sleep(0.2)
        back = time.monotonic() - started
        time.sleep(3)
        seen = load.stop()
    print(f"serving: {dict(seen)}, both replicas again after {back:.1f} s")
    assert seen[200] > 100
    assert sum(seen.values()) - seen[200] <= 8, seen  # at most what the lost replica held: two rounds of clients


def test_the_control_plane_restarts_while_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "gcs"
    state.mkdir()
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(state))
    model, port = tiny_model(tmp_path / "model"), free_port()
    with cluster_of(2, head_cpus=0) as (cluster, _):
        cluster.connect()
        deploy(model, port, replicas=1)
        load = Load(port)
        time.sleep(3)
        cluster.head_node.kill_gcs_server()
        time.sleep(5)
        cluster.head_node.start_gcs_server()
        time.sleep(5)
        seen = load.stop()
        assert running_replicas() == 1
        assert ray.get(ray.remote(lambda: 1).options(num_cpus=1).remote(), timeout=60) == 1
    print(f"control plane gone for 5 s: {dict(seen)}")
    assert set(seen) == {200}, seen
