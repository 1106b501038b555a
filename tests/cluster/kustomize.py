"""What our overlays use of kustomize: resources, namespace, images, patches (JSON 6902 or a deletion)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "resources", "namespace", "images", "patches"}


def build(folder: Path) -> list[Manifest]:
    """The manifests that `kubectl kustomize FOLDER` prints.

    Raises:
        ValueError: it uses more of kustomize than this knows, or a patch hits nothing.
    """
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if set(settings) - KNOWN:
        raise ValueError(f"{folder}: {set(settings) - KNOWN} is not known here")
    manifests: list[Manifest] = []
    for resource in settings["resources"]:
        path = folder / resource
        manifests += build(path) if path.is_dir() else yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for patch in settings.get("patches", []):
        manifests = _patched(folder, manifests, patch)
    for manifest in manifests:
        for image in settings.get("images", []):
            _rename(manifest, image)
        if "namespace" in settings:
            manifest["metadata"]["namespace"] = settings["namespace"]
    return manifests


def _patched(folder: Path, manifests: list[Manifest], patch: Manifest) -> list[Manifest]:
    target = patch["target"]
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text(encoding="utf-8")
    change = yaml.safe_load(text)
    hits = [m for m in manifests if m["kind"] == target["kind"] and m["metadata"]["name"] == target["name"]]
    if len(hits) != 1:
        raise ValueError(f"{folder}: {target} hits {len(hits)} manifests")
    if isinstance(change, dict):
        if change.get("$patch") != "delete":
            raise ValueError(f"{folder}: a merge patch is not known here")
        return [m for m in manifests if m is not hits[0]]
    return [jsonpatch.apply_patch(m, change) if m is hits[0] else m for m in manifests]


def _rename(part: Any, image: Manifest) -> None:
    """Containers are found at any depth, as kustomize does."""
    if isinstance(part, list):
        for item in part:
            _rename(item, image)
    if isinstance(part, dict):
        for key, value in part.items():
            if key in {"containers", "initContainers"}:
                for container in value:
                    name, _, tag = container["image"].partition(":")
                    if name == image["name"]:
                        container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
            else:
                _rename(value, image)
