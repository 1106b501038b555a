"""Reads the names and types of Ray's own fields from KubeRay's CRDs, for the test of the manifests.

    python tests/cluster/read_crds.py CRDS VERSION > tests/cluster/kuberay.json

CRDS is the folder `helm-chart/kuberay-operator/crds` of a KubeRay release. Pod templates and other
parts of Kubernetes are left out ("kubernetes"): its own schemas check those.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
KUBERNETES = {
    "affinity",
    "env",
    "envFrom",
    "headService",
    "metadata",
    "networkPolicy",
    "redisPassword",
    "redisUsername",
    "resources",
    "securityContext",
    "serveService",
    "submitterPodTemplate",
    "template",
    "tolerations",
    "volumeMounts",
}


def fields(schema: dict[str, Any]) -> Any:
    """A field's type; of an object with known keys the fields below, a `*` marking those that are required."""
    if schema.get("type") == "array":
        return [fields(schema["items"])]
    if "enum" in schema:
        return {"enum": schema["enum"]}
    if "properties" not in schema:
        return "any" if schema.get("x-kubernetes-int-or-string") else schema["type"]
    required = schema.get("required", [])
    return {
        name + ("*" if name in required else ""): "kubernetes" if name in KUBERNETES else fields(below)
        for name, below in sorted(schema["properties"].items())
        if name != "status"
    }


def main(folder: Path, version: str) -> None:
    """Prints what the three kinds allow."""
    kinds = {}
    for kind, plural in KINDS.items():
        crd = yaml.safe_load((folder / f"ray.io_{plural}.yaml").read_text(encoding="utf-8"))
        (served,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        kinds[kind] = fields(served["schema"]["openAPIV3Schema"]["properties"]["spec"])
    json.dump({"kuberay": version, "apiVersion": "ray.io/v1", "kinds": kinds}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
