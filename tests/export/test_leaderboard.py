"""A submission to mteb's leaderboard: an entry that is Python and complete, and results under the hub's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel

from f2llm_ray.base.errors import RunError
from f2llm_ray.evaluate.mteb_model import model_meta, prompts_of
from f2llm_ray.export.leaderboard import ENTRY, META, Submitted, check_tasks, submission_meta, write_submission
from tests.tiny import tiny_model

SAID = Submitted(
    repo="team/tiny",
    revision="c0ffee",
    licence="mit",
    released="2026-01-02",
    open_weights=True,
    trained_on=["STS12"],
    code="https://example.org/code",
    data="https://example.org/data",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_model(tmp_path / "model")
    (folder / "README.md").write_text("---\nlanguage: [de, ja]\nlicense: other\n---\n# tiny\n")
    return folder


def test_the_entry_is_python_that_makes_itself(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "out" / "results" / "f2llm_ray__tiny" / str(model_meta(model).revision)
    own.mkdir(parents=True)
    for name in ("STS12.json", META):
        (own / name).write_text("{}")
    place = write_submission(model, tmp_path / "out", SAID)
    made: dict[str, Any] = {}
    exec((place / ENTRY).read_text(), made)  # noqa: S102 - it is for mteb's source
    entry = made["model"]
    assert entry == submission_meta(model, SAID)
    assert (entry.name, entry.revision, entry.license) == ("team/tiny", "c0ffee", "mit")
    assert (entry.languages, entry.embed_dim) == (["deu-Latn", "jpn-Jpan"], [8, 16, 32])
    assert (entry.training_datasets, entry.loader) == ({"STS12"}, InstructSentenceTransformerModel)
    empty = {name for name, value in entry.to_dict().items() if value is None}
    assert empty <= {"adapted_from", "superseded_by", "citation", "contacts"} | {
        "n_active_parameters_override",
        "experiment_kwargs",
        "extra_requirements_groups",
    }
    sent = place / "results" / "team__tiny" / "c0ffee"
    assert {path.name for path in sent.iterdir()} == {"STS12.json", META}
    assert json.loads((sent / META).read_text())["name"] == "team/tiny"


def test_the_entry_has_the_instructions_that_were_measured_with(model: Path) -> None:
    assert submission_meta(model, SAID, "f2llm-v2").loader_kwargs["prompts_dict"] == prompts_of("f2llm-v2")
    own = submission_meta(model, SAID).loader_kwargs
    assert own["prompts_dict"]["BitextMining"] == "Retrieve translations of the following text."
    with pytest.raises(RunError, match=r"prompts: found 'other', expected one of \['f2llm-v2'\]"):
        prompts_of("other")


def test_what_cannot_be_submitted_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no results of this model"):
        write_submission(model, tmp_path, SAID)
    with pytest.raises(RunError, match=r"--trained-on: .*NoSuchTask"):
        check_tasks(["STS12", "NoSuchTask"])
