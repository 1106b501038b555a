"""Where a run lives: a root, one folder per stage, and a manifest that says that a stage is finished."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata

from pyarrow import fs

from f2llm_ray import __version__
from f2llm_ray.base.errors import RunError
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.stage import Facts, Stage

LIBRARIES = ("ray", "torch", "transformers", "deepspeed", "tokenizers", "pyarrow", "numpy")
MANIFEST = "manifest.json"
REPORT = "report.json"
"""In the root of a finished run."""
EARLIER = "earlier.json"
"""In the folder of a stage that is not finished: the seconds of tries that an error or Ctrl-C ended."""


class Run:
    """A run's root: finds finished stages and writes manifests."""

    def __init__(self, root: str) -> None:
        self.root = Folder.at(root)

    def folder(self, stage: Stage) -> Folder:
        """Where a stage's output is or will be."""
        return self.root / stage.folder_name

    def manifest(self, stage: Stage) -> Facts | None:
        """The manifest of a finished stage, or None: whatever its folder holds, it is not finished then."""
        folder = self.folder(stage)
        return dict(folder.read_json(MANIFEST)) if folder.exists(MANIFEST) else None

    def manifests(self, name: str) -> Iterator[Facts]:
        """The manifests of all finished stages of a name, whatever went into them, the latest first."""
        entries = self.root.filesystem.get_file_info(fs.FileSelector(self.root.path, allow_not_found=True))
        # The hash is the last part: "evaluate-x" is not a stage "evaluate".
        folders = [e.base_name for e in entries if e.base_name.rpartition("-")[0] == name]
        found = [
            (self.root / folder).read_json(MANIFEST)
            for folder in folders
            if self.root.exists(f"{folder}/{MANIFEST}")
        ]
        yield from sorted(found, key=lambda manifest: float(manifest.get("finished", 0)), reverse=True)

    def require(self, stage: Stage) -> Folder:
        """Folder of a stage that must be finished.

        Raises:
            RunError: it is not; the message names the command that makes it.
        """
        if self.manifest(stage) is None:
            raise RunError(
                f"{self.folder(stage).uri}: stage {stage.name!r} is not finished; run `f2llm {stage.job}` first"
            )
        return self.folder(stage)

    def earlier(self, stage: Stage) -> float:
        """Seconds of the tries of a stage that an error or Ctrl-C ended; of one that was killed nobody knows."""
        folder = self.folder(stage)
        return float(folder.read_json(EARLIER)["seconds"]) if folder.exists(EARLIER) else 0.0

    def cut_off(self, stage: Stage, *, started: float) -> None:
        """Keeps the seconds of a try that an error or Ctrl-C has ended, for the manifest of a later one."""
        seconds = self.earlier(stage) + time.time() - started
        with suppress(OSError):  # as of a full disk: the error that ended the try is the one to tell
            self.folder(stage).write_json(EARLIER, {"seconds": round(seconds, 2)})

    def finish(self, stage: Stage, *, started: float, **facts: object) -> Facts:
        """Writes the manifest, the last file of a stage.

        Args:
            stage: the stage whose output is complete.
            started: `time.time()` when this try of its work began.
            facts: what the stage counted and measured, as JSON values; `seconds` among them where the stage took
                less than the time since it began.
        """
        earlier = self.earlier(stage)
        manifest = {
            "stage": stage.name,
            "hash": stage.hash,
            "settings": stage.settings,
            "inputs": {name: [asdict(entry) for entry in entries] for name, entries in stage.inputs.items()},
            "places": stage.places,
            "parents": {role: parent.folder_name for role, parent in stage.parents.items()},
            "code_version": __version__,
            "libraries": _library_versions(),
            "device": device_name(),
            "finished": round(time.time(), 2),
            "seconds": round(earlier + time.time() - started, 2),
            **facts,
        }
        folder = self.folder(stage)
        folder.write_json(MANIFEST, manifest)
        if folder.exists(EARLIER):
            folder.filesystem.delete_file(f"{folder.path}/{EARLIER}")
        return manifest


def device_name() -> str:
    """What computes here, in words."""
    try:
        import torch
    except ImportError:
        return platform.machine()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **versions}
