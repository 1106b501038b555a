"""A model's queries against another model's passages: the scores of a brute force, and how reports say them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.engine import Engine
from f2llm_ray.evaluate.measure import measure_mixed
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet
from f2llm_ray.model.checkpoint import Space, load_backbone, load_info, save_model
from f2llm_ray.model.dense import end_in
from f2llm_ray.report.model_card import model_card
from f2llm_ray.report.read_scores import mixed_entry, mixed_sentences
from f2llm_ray.report.terminal import terminal_table
from f2llm_ray.run.folder import Folder
from tests.encoders import encoder_folder
from tests.tiny import LINES, tiny_model

QUERIES = ["cat", "fox", "perro", "улицу", "猫", "add", "rain", "hund"]
RELEVANT = [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 0], [6, 3], [7, 1]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A student of 24 dims that ends in 32, its teacher, and a set of more passages than are ranked."""
    folder = tmp_path_factory.mktemp("mixed")
    teacher = encoder_folder(folder / "teacher", "bert", prompts={"query": "q: ", "passage": "p: "})
    plain = tiny_model(folder / "plain", hidden=24)
    backbone = load_backbone(plain)
    end_in(backbone, 32, "here", np.linspace(-1, 1, 32, dtype=np.float32))
    space = Space(model="teacher", checksum="0123456789abcdef")
    info = replace(load_info(plain), dims=(16, 32), space=space)
    save_model(folder / "student", backbone, load_tokenizer(plain), info)
    passages = [*LINES, *(f"{line} {number}" for line in LINES for number in range(3))]
    RetrievalSet(
        name="set",
        instruction="Find it.",
        query_ids=[f"q{place}" for place in range(len(QUERIES))],
        query_texts=QUERIES,
        query_languages=["eng"] * len(QUERIES),
        corpus_ids=[f"p{place}" for place in range(len(passages))],
        corpus_texts=passages,
        relevant=np.array(RELEVANT),
    ).write(Folder.at(str(folder / "set")))
    return folder / "student", teacher, folder / "set"


def brute_force(student: Path, teacher: Path, found: Path, dim: int, document: str) -> float:
    """nDCG@10 by comparing every query with every passage in float64, one after the other."""
    task = RetrievalSet.read(Folder.at(str(found)))
    asks, holds = Engine(student), Engine(teacher)
    prompt = "Instruct: Find it.\nQuery: "  # the student was trained with instructions
    query_qd = asks.embed([prompt + text for text in QUERIES])[:, :dim].astype(np.float64)
    passage_cd = holds.embed([document + text for text in task.corpus_texts])[:, :dim].astype(np.float64)
    gains = []
    for place, query_d in enumerate(query_qd):
        cosines = [
            float(query_d @ passage_d / np.linalg.norm(query_d) / np.linalg.norm(passage_d))
            for passage_d in passage_cd
        ]
        top = sorted(range(len(cosines)), key=lambda passage: -cosines[passage])[:10]
        right = {passage for query, passage in RELEVANT if query == place}
        gained = sum(1 / np.log2(at + 2) for at, passage in enumerate(top) if passage in right)
        gains.append(gained / sum(1 / np.log2(at + 2) for at in range(len(right))))
    return float(np.mean(gains))


@pytest.mark.parametrize(("document", "said"), [(None, "p: "), ("other: ", "other: ")])
def test_mixed_scores_are_those_of_a_brute_force(
    folders: tuple[Path, Path, Path], tmp_path: Path, document: str | None, said: str
) -> None:
    student, teacher, found = folders
    places = [Folder.at(str(path)) for path in folders]
    result = measure_mixed(*places, (1, 2), document, Folder.at(str(tmp_path)))
    assert list(result["scores"]) == ["32", "16"]
    for dim in (32, 16):
        expected = brute_force(student, teacher, found, dim, said)
        assert result["scores"][str(dim)]["ndcg@10"] == pytest.approx(expected, abs=1e-4)
    assert 0 < result["scores"]["32"]["ndcg@10"] < 1
    assert (result["queries"], result["corpus"]) == (len(QUERIES), 24)
    assert (tmp_path / "units.parquet").is_file()


def test_vectors_of_other_dims_are_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plain = folders[0].with_name("plain")
    places = [Folder.at(str(path)) for path in (plain, *folders[1:])]
    with pytest.raises(RunError, match="tiny: its vectors have 24 dims, those of teacher 32"):
        measure_mixed(*places, (1,), None, Folder.at(str(tmp_path)))


def test_reports_say_whose_queries_and_whose_passages(folders: tuple[Path, Path, Path]) -> None:
    scores = {"set": {"32": {"ndcg@10": 0.4}}}
    model = {
        "name": "distilled",
        "parameters": 10,
        "scores": {"set": {"32": {"ndcg@10": 0.3}}},
        "mixed": {"teacher": "e5", "scores": scores},
    }
    report: dict[str, Any] = {"name": "r", "models": [{"name": "untrained", "scores": scores}, model]}
    name = "queries of distilled, passages of e5"
    assert mixed_entry(model) == {"name": name, "scores": scores}
    assert mixed_entry(report["models"][0]) is None
    assert mixed_sentences(report) == [f"{name}: ndcg@10 0.400 on set."]
    assert terminal_table(report).endswith(f"{name}: ndcg@10 0.400 on set.")
    card = model_card(report, model, load_info(folders[0]), mapped=True)
    assert "| set | its queries, passages of e5 | 32 | ndcg@10 | 0.400 |" in card
    assert "the space of teacher (checksum 0123456789abcdef): its queries may search" in card
    assert "AutoModel.from_pretrained" not in card
    assert "AutoModel.from_pretrained" in model_card(report, model, load_info(folders[0]))
