"""The launcher's files against Ray's own schema, the Slurm script by a shell's parser."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

LAUNCHER = Path(__file__).parents[2] / "cluster" / "launcher"
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(LAUNCHER.glob("*.yaml")), ids=lambda path: path.stem)
def test_cluster_files_fit_rays_schema_and_keep_the_dashboard_inside(path: Path) -> None:
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(cluster, SCHEMA)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    (start,) = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    assert "RAY_AUTH_MODE=token" in start
    assert "--dashboard-host=127.0.0.1" in start
    (start,) = [line for line in cluster["worker_start_ray_commands"] if "ray start" in line]
    assert "RAY_AUTH_MODE=token" in start


def test_a_wrong_key_is_found() -> None:
    cluster = yaml.safe_load((LAUNCHER / "aws.yaml").read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 1}, SCHEMA)


def test_the_slurm_script_parses() -> None:
    subprocess.run(["/bin/bash", "-n", LAUNCHER / "slurm.sh"], check=True)
