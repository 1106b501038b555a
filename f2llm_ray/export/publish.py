"""Publishing a model folder on the Hugging Face hub: what is checked before, and what is sent.

Nothing is sent that cannot be read back: the folder loads, its vectors are those it was made with, its card is
complete, and none of its files can hold code.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.report.model_card import CARD, NO_LICENCE, PLACEHOLDER, read_card

FIELDS = ("language", "license", "library_name", "pipeline_tag", "tags")
"""The fields by which the hub lists models."""
SAFE = (".safetensors", ".json", ".md", ".txt", ".jinja")
"""Endings of files that hold no code: weights come as safetensors, never pickled."""
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


class Address(NamedTuple):
    """Where something was sent."""

    url: str
    revision: str
    """The commit."""


Upload = Callable[[Path, str], Address]
"""Sends a folder to a repository."""


class Published(NamedTuple):
    """What was sent, or would be."""

    files: dict[str, int]
    """Bytes by path within the folder."""
    address: Address | None
    """Where it is on the hub; None after a dry run."""


def publish(folder: Path, repo: str, licence: str, upload: Upload | None = None) -> Published:
    """Checks a model folder and sends a copy of it; the folder itself stays as it is.

    Args:
        folder: a local model folder.
        repo: OWNER/NAME on the hub.
        licence: the hub's identifier of the licence, such as apache-2.0.
        upload: what sends it (`hub_upload`); None for a dry run.

    Raises:
        RunError: something that must not be published, or that the hub would not take.
    """
    if not REPO.fullmatch(repo):
        raise RunError(f"repo: found {repo!r}, expected OWNER/NAME")
    if not LICENCE.fullmatch(licence) or licence == "other":
        raise RunError(
            f"licence: found {licence!r}, expected an identifier of the hub's, such as apache-2.0 or mit"
        )
    files = safe_files(folder)
    card = finished_card(folder, repo, licence)
    check_vectors(folder)
    address = None
    if upload is not None:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "model"
            for name in files:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, copy / name)
            (copy / CARD).write_text(card, encoding="utf-8")
            address = upload(copy, repo)
    return Published(files | {CARD: len(card.encode())}, address)


def safe_files(folder: Path) -> dict[str, int]:
    """Sizes of the folder's files by path.

    Raises:
        RunError: a file that may hold code, or a link that leads out of the folder.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{path}: a link that leads out of the folder; nothing was sent")
        if path.is_file():
            if path.suffix not in SAFE:
                raise RunError(f"{path}: found a file ending in {path.suffix!r}, expected only {', '.join(SAFE)}")
            files[name] = path.stat().st_size
    return files


def finished_card(folder: Path, repo: str, licence: str) -> str:
    """The folder's card with its licence and its name on the hub.

    Raises:
        RunError: there is no card, or it lacks a field, or it states another licence.
    """
    path = folder / CARD
    card = read_card(path)
    for field in FIELDS:
        if not card.data.get(field):
            raise RunError(f"{path}: the front matter has no {field}")
    stated = card.data["license"]
    if stated == "other" and card.data.pop("license_name") == NO_LICENCE:
        stated = licence
    if stated != licence:
        raise RunError(f"{path}: the card says licence {stated!r}, not {licence!r}")
    card.data["license"] = licence
    card.text = card.text.replace(PLACEHOLDER, repo)
    return str(card)


def check_vectors(folder: Path) -> None:
    """Loads the model and compares its vectors with those of when it was made.

    Raises:
        RunError: it does not load, has no stored vectors, or returns other vectors.
    """
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.engine.text_engine import self_check
    from f2llm_ray.model.checkpoint import CALIBRATION_FILE

    engine = Engine(folder)
    if engine.calibration is None:
        raise RunError(f"{folder}: it has no {CALIBRATION_FILE}, so its vectors cannot be checked")
    self_check(engine, engine.calibration, str(folder))


def hub_upload(*, private: bool) -> Upload:
    """Sends to the hub as one commit, by the token of `HF_TOKEN` or of `hf auth login`.

    Raises:
        RunError: from the upload, where the hub cannot be reached or refuses.
    """
    hub = require("huggingface_hub", extra="datasets")

    def upload(folder: Path, repo: str) -> Address:
        try:
            hub.create_repo(repo, private=private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Model made with f2llm_ray"
            )
        except Exception as error:  # noqa: BLE001 - the client raises errors of several libraries
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"{repo}: the hub did not take it: {cause}") from None
        return Address(f"https://huggingface.co/{repo}", commit.oid)

    return upload
