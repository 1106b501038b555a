"""`serve deploy` of the production config on a head with a token: both locks are asked, and vectors come back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from f2llm_ray.serve.keys import new_key
from tests.ports import free_port
from tests.serve.conftest import calibrated
from tests.tiny import LINES, tiny_model

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def serve(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "serve", *command, "--address", environment["HEAD"]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=REPO,
    )


def test_the_production_config_deploys(head: dict[str, str], tmp_path: Path) -> None:
    engine = calibrated(tiny_model(tmp_path / "model"))
    key, port = new_key(tmp_path / "keys.txt", "tests"), free_port()
    config = yaml.safe_load((REPO / "serve_configs" / "production.yaml").read_text())
    # What a user changes, and what a machine of two cores without a GPU has.
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] |= {"model": str(tmp_path / "model"), "keys": str(tmp_path / "keys.txt"), "max_tokens": 64}
    del application["args"]["root"]
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"] = {"num_cpus": 0.5}
    path = tmp_path / "production.yaml"
    path.write_text(yaml.safe_dump(config))
    stranger = serve({**head, "RAY_AUTH_TOKEN": "0" * 32}, "deploy", str(path))
    assert stranger.returncode != 0
    deployed = serve(head, "deploy", str(path))
    assert deployed.returncode == 0, deployed.stderr
    until = time.monotonic() + 300
    while True:
        status = yaml.safe_load(serve(head, "status").stdout or "{}") or {}
        found = status.get("applications", {}).get("embeddings", {})
        if found.get("status") == "RUNNING":
            break
        assert found.get("status") not in {"DEPLOY_FAILED", "UNHEALTHY"}, found
        assert time.monotonic() < until, status
        time.sleep(2)
    assert found["deployments"]["ModelServer"]["replica_states"] == {"RUNNING": 2}
    ask = {"model": "text-embedding-3-small", "input": LINES, "encoding_format": "float"}
    url = f"http://127.0.0.1:{port}/v1/embeddings"
    assert httpx.post(url, json=ask).status_code == 401
    answer = httpx.post(url, json=ask, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    assert answer.status_code == 200, answer.text
    vectors = np.array([row["embedding"] for row in answer.json()["data"]])
    np.testing.assert_allclose(vectors, engine.embed(LINES), atol=1e-5)
    assert serve(head, "shutdown", "-y").returncode == 0
