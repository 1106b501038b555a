"""Laws of what docs/extending.md adds; `test_extending` runs them where its diffs are applied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading import Source
from f2llm_ray.data.reading.base import BadRow
from f2llm_ray.evaluate.settings import Evaluation
from f2llm_ray.evaluate.tasks.registry import LABELLED, read_task, task_of
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.losses import TextPlaces
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.terms import TermInputs, added_terms
from tests.evaluate.planted import Planted


def weighted(alignment: float) -> TrainStage:
    return TrainStage.model_validate({"alignment_weight": alignment})


def test_the_loss_is_the_mean_squared_distance_and_weighted() -> None:
    v_nd = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], requires_grad=True)
    query, passage, negative = torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([[2], [-1]])
    places = TextPlaces(query, passage, negative, passage, query)
    loss, terms = added_terms(TermInputs(v_nd=v_nd, places=places, settings=weighted(0.5)))
    expected = ((0.6**2 + 0.2**2) + (1 + 1)) / 2
    assert terms["alignment"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected / 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert v_nd.grad is not None
    assert v_nd.grad.abs().sum() > 0
    assert not added_terms(TermInputs(v_nd=v_nd, places=places, settings=weighted(0.0)))[1]


def squad(folder: Path, questions: list[str | None]) -> Path:
    file = folder / "train.json"
    asked = [{"question": question} for question in questions]
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "noon", "qas": asked}]}]}))
    return file


def rows(file: Path, bad_row: BadRow = "error") -> list[tuple[str, str, str | None]]:
    source = TypeAdapter(Source).validate_python({"format": "squad", "path": str(file), "language": "eng"})
    tables = [table for piece in source.pieces("s") for table in source.read("s", piece, bad_row)]
    return [(row["query"], row["passage"], row["drop"]) for table in tables for row in table.to_pylist()]


def test_the_source_gives_rows_and_names_what_is_wrong(tmp_path: Path) -> None:
    assert rows(squad(tmp_path, ["when", "at what time"])) == [
        ("when", "noon", None),
        ("at what time", "noon", None),
    ]
    file = squad(tmp_path, ["when", None])
    assert [drop for *_, drop in rows(file, "skip")] == [None, "read: empty query"]
    with pytest.raises(DataError, match=r"train\.json: row 1 .*query"):
        rows(file)
    file.write_text("[]")
    with pytest.raises(DataError, match=r"train\.json: expected SQuAD's JSON"):
        rows(file)


def test_the_task_is_read_kept_and_scored(tmp_path: Path) -> None:
    file = tmp_path / "triplets.jsonl"
    lines = [{"anchor": "a", "positive": "p", "negative": "n"}, {"anchor": "a", "positive": "n", "negative": "p"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    entry = {"kind": "triplets", "test": str(file), "instruction": ""}
    section = Evaluation.model_validate({"sets": {"t": entry}}).sets["t"]
    assert isinstance(section, LABELLED["triplets"].section)
    task = task_of("t", section)
    assert set(task.screened().asked) == {"a", "p", "n"}
    task.write(Folder.at(str(tmp_path / "kept")))
    measured = read_task(Folder.at(str(tmp_path / "kept"))).measure(
        Planted({"a": [1, 0], "p": [0.8, 0.6], "n": [0, 1]}), [1]
    )
    assert measured.units["2"].to_pylist() == [1.0, 0.0]
