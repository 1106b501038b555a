"""The KubeRay manifests: every field is one that KubeRay or Kubernetes knows, and all of them fit together."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from f2llm_ray.serve.router import RouterArguments
from f2llm_ray.serve.served_model import Arguments
from tests.cluster.kustomize import Manifest, build

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
CRDS = json.loads((Path(__file__).parent / "kuberay.json").read_text(encoding="utf-8"))
BUILT = {
    folder.name: folder
    for folder in (KUBERAY / "base", *sorted((KUBERAY / "overlays").iterdir()), KUBERAY / "serving")
}
JOBS = sorted((KUBERAY / "jobs").glob("*.yaml"))
KUBERNETES_VERSION = "1.31"
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "any": (str, int),
    "kubernetes": (dict, list),
}


def problems(value: Any, fields: Any, place: str = "spec") -> Iterator[str]:
    """Where a value is not what the CRD's fields allow."""
    if isinstance(fields, str):
        if not isinstance(value, TYPES[fields]) or (fields == "integer" and isinstance(value, bool)):
            yield f"{place}: {value!r} is no {fields}"
    elif isinstance(fields, list):
        if not isinstance(value, list):
            yield f"{place}: {value!r} is no list"
            return
        for number, item in enumerate(value):
            yield from problems(item, fields[0], f"{place}[{number}]")
    elif set(fields) == {"enum"}:
        if value not in fields["enum"]:
            yield f"{place}: {value!r} is not one of {fields['enum']}"
    else:
        known = {name.rstrip("*"): below for name, below in fields.items()}
        if not isinstance(value, dict):
            yield f"{place}: {value!r} is no mapping"
            return
        yield from (f"{place}.{name}: unknown" for name in value if name not in known)
        yield from (
            f"{place}.{name[:-1]}: missing" for name in fields if name[-1] == "*" and name[:-1] not in value
        )
        for name in set(value) & set(known):
            yield from problems(value[name], known[name], f"{place}.{name}")


def pod_templates(part: Any) -> Iterator[Manifest]:
    """The pod templates anywhere in a manifest."""
    if isinstance(part, list):
        for item in part:
            yield from pod_templates(item)
    if isinstance(part, dict):
        for key, value in part.items():
            if key in {"template", "submitterPodTemplate"}:
                yield value
            else:
                yield from pod_templates(value)


def check(manifest: Manifest) -> list[str]:
    """All that is wrong with a manifest."""
    if manifest["apiVersion"] != CRDS["apiVersion"]:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [error.message]
        return []
    found = list(problems(manifest["spec"], CRDS["kinds"][manifest["kind"]]))
    for template in pod_templates(manifest["spec"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "p"}, "template": template}
        try:
            kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(error.message)
    return found


def load(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", BUILT)
def test_what_kustomize_builds_fits_the_schemas(name: str) -> None:
    for manifest in build(BUILT[name]):
        assert check(manifest) == [], manifest["metadata"]["name"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_fit_the_schemas_and_run_on_the_cluster(path: Path) -> None:
    (job,) = load(path)
    assert check(job) == []
    (cluster,) = [m for m in build(KUBERAY / "base") if m["kind"] == "RayCluster"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_call_a_script_with_flags_it_has(path: Path) -> None:
    (job,) = load(path)
    python, script, *flags = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
    )
    assert all(flag in done.stdout for flag in flags if flag.startswith("--"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda spec: spec.update(headGroupSpecs={}), "unknown"),
        (lambda spec: spec.pop("headGroupSpec"), "missing"),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "not one of"),
        (lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="4"), "no integer"),
        (lambda spec: spec["headGroupSpec"]["template"]["spec"].update(container=[]), "container"),
    ],
)
def test_a_wrong_field_is_found(change: Any, told: str) -> None:
    (cluster,) = [m for m in build(KUBERAY / "base") if m["kind"] == "RayCluster"]
    broken = copy.deepcopy(cluster)
    change(broken["spec"])
    assert any(told in line for line in check(broken))


@pytest.mark.parametrize("name", BUILT)
def test_pods_are_contained(name: str) -> None:
    for manifest in build(BUILT[name]):
        for template in pod_templates(manifest.get("spec")):
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True
            for container in template["spec"]["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert {"requests", "limits"} <= set(container["resources"])


@pytest.mark.parametrize("name", BUILT)
def test_clusters_ask_for_a_token_and_pods_find_their_volumes_and_policy(name: str) -> None:
    manifests = build(BUILT[name])
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    accounts = {m["metadata"]["name"] for m in manifests if m["kind"] == "ServiceAccount"}
    (policy,) = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    clusters = [m["spec"] for m in manifests if m["kind"] == "RayCluster"]
    clusters += [m["spec"]["rayClusterConfig"] for m in manifests if m["kind"] == "RayService"]
    assert clusters
    for cluster in clusters:
        assert cluster["authOptions"]["mode"] == "token"
        for template in pod_templates(cluster):
            assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
            spec = template["spec"]
            assert spec["serviceAccountName"] in accounts
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            assert {m["name"] for c in spec["containers"] for m in c["volumeMounts"]} == set(volumes)
            for volume in volumes.values():
                claim = volume.get("persistentVolumeClaim")
                assert claim is None or claim["claimName"] in claims


def test_the_service_fits_serves_schema_and_our_arguments() -> None:
    from ray.serve.schema import ServeDeploySchema

    (service,) = load(KUBERAY / "serving" / "rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    apps = {app.name: app for app in config.applications}
    router = RouterArguments.model_validate(apps["router"].args)
    assert set(router.models) == set(apps) - {"router"}
    for name, arguments in router.models.items():
        assert Arguments.model_validate(apps[name].args) == arguments
        assert apps[name].route_prefix is None, "it would answer without a key"
    secret = next(v for v in pod_volumes(service) if "secret" in v)
    assert str(router.keys).startswith("/etc/f2llm/")
    assert secret["secret"]["secretName"] == "f2llm-keys"


def pod_volumes(service: Manifest) -> list[Manifest]:
    template = next(iter(pod_templates(service["spec"])))
    return list(template["spec"]["volumes"])


def test_the_submitter_passes_the_network_policy() -> None:
    (policy,) = load(KUBERAY / "base" / "network-policy.yaml")
    allowed = [
        peer["podSelector"]["matchLabels"]
        for rule in policy["spec"]["ingress"]
        if {"port": 8265} in rule.get("ports", [])
        for peer in rule["from"]
        if "podSelector" in peer
    ]
    for path in JOBS:
        (job,) = load(path)
        assert job["spec"]["submitterPodTemplate"]["metadata"]["labels"] in allowed
