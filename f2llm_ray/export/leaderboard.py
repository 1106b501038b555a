"""What mteb's leaderboard takes of a published model: its entry for mteb's registry, and its results.

Both go to mteb's repositories as pull requests; nothing is sent from here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.evaluate.mteb_run import OWN, PROMPTS_FILE
from f2llm_ray.model.checkpoint import fingerprint, load_info
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

META, ENTRY, RESULTS = "model_meta.json", "model_meta.py", "results"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submission says beside what the model folder says."""

    repo: str
    """OWNER/NAME on the hub."""
    revision: str
    """The commit there."""
    licence: str
    released: str
    """The day, as YYYY-MM-DD."""
    open_weights: bool
    trained_on: Sequence[str] | None = None
    """mteb's tasks whose data the model was trained on; None where nobody says."""
    code: str | None = None
    """Address of the training's code."""
    data: str | None = None
    """Address of the training's data."""


def results_of(model: Path, results: Path) -> list[Path]:
    """The result files of exactly these weights, below the output folder of `f2llm evaluate --mteb`.

    Raises:
        RunError: there are none.
    """
    revision = fingerprint(Folder.at(str(model)))
    found = sorted(path for path in (results / RESULTS).glob(f"*/{revision}/*.json") if path.name != META)
    if not found:
        raise RunError(
            f"{results}: no results of this model (revision {revision}); run `f2llm evaluate --mteb` first"
        )
    return found


def check_tasks(names: Sequence[str] | None) -> None:
    """Refuses names of tasks that mteb does not have.

    Raises:
        DataError: mteb is not installed.
        RunError: mteb does not know a name.
    """
    mteb = require("mteb", extra="mteb")
    for name in names or ():
        try:
            mteb.get_task(name)
        except KeyError as error:
            raise RunError(f"--trained-on: {error.args[0] if error.args else name}") from None


def submission_meta(model: Path, said: Submitted, prompts: str = OWN) -> ModelMeta:
    """The model's entry for mteb's registry: it loads from the hub, with the instructions it was measured with.

    `prompts` is the name of their table, or `mteb_run.OWN`.
    """
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    from f2llm_ray.evaluate.mteb_model import BY_TYPE, SIMILAR, model_meta, prompts_of

    info = load_info(model)
    others = dict.fromkeys(("STS", "PairClassification", "Summarization"), SIMILAR)
    if info.instructions:
        loader: type = InstructSentenceTransformerModel
        arguments: dict[str, Any] = {
            "instruction_template": "Instruct: {instruction}\nQuery: ",
            "prompts_dict": dict(prompts_of(prompts))
            if prompts != OWN
            else {**BY_TYPE, **others, "query": SIMILAR},
            "apply_instruction_to_passages": False,
            "max_seq_length": info.max_tokens,
        }
        if prompts == OWN:  # as `mteb_model.instruction_of`: a task's own instruction first
            order = ("custom_prompt", "default_task_prompt", "task_type_prompt", "encode_type_prompt")
            arguments["prompt_priority"] = list(order)
    else:
        loader = SentenceTransformerEncoderWrapper
        arguments = {"model_prompts": {side: text for side, text in info.prompts.items() if text}}
    changed = {
        "loader": loader,
        "loader_kwargs": arguments,
        "name": said.repo,
        "revision": said.revision,
        "release_date": said.released,
        "license": said.licence,
        "open_weights": said.open_weights,
        "reference": f"https://huggingface.co/{said.repo}",
        "public_training_code": said.code,
        "public_training_data": said.data,
        "training_datasets": None if said.trained_on is None else set(said.trained_on),
    }
    own = model_meta(model)
    entry: ModelMeta = type(own).model_validate({**own.model_dump(), **changed})
    return entry


def write_submission(model: Path, results: Path, said: Submitted) -> Path:
    """Writes `submission/` into the folder of results, anew.

    Args:
        model: the model folder that was published.
        results: output folder of `f2llm evaluate --mteb`.
        said: what the folder does not say.

    Returns:
        The folder. It has `model_meta.py`, and `results/OWNER__NAME/REVISION/` with mteb's files.

    Raises:
        RunError: there are no results of this model.
    """
    file, place = results / PROMPTS_FILE, results / "submission"
    prompts = json.loads(file.read_text())["prompts"] if file.is_file() else OWN
    found, entry = results_of(model, results), submission_meta(model, said, prompts)
    shutil.rmtree(place, ignore_errors=True)
    own = place / RESULTS / said.repo.replace("/", "__") / said.revision
    own.mkdir(parents=True)
    for path in found:
        shutil.copyfile(path, own / path.name)
    (own / META).write_text(json.dumps(entry.to_dict(), default=str, indent=4), encoding="utf-8")
    loader = entry.loader
    head = [
        "from mteb.models.model_meta import ModelMeta, ScoringFunction",
        "from mteb.types import OutputDType",
        f"from {loader.__module__} import {loader.__name__}",
    ]
    text = "\n".join([*head, "", f"model = {entry.to_python()}", ""])
    (place / ENTRY).write_text(text, encoding="utf-8")
    return place
