"""What the report says of a model between chance, BM25, its backbone and baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from f2llm_ray.evaluate.differences import differences
from f2llm_ray.evaluate.metrics.scores import Measured
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet, from_pairs
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.report.headline import headline
from f2llm_ray.report.languages import named
from f2llm_ray.report.model_card import model_card
from f2llm_ray.report.standing import standing_sentences
from f2llm_ray.report.terminal import terminal_table
from tests.evaluate.planted import Planted
from tests.tiny import tiny_model

COUNT = 64
PRAISE = ("keeps", "strongest", "above BM25", "above its backbone")


@pytest.fixture(scope="module")
def words() -> RetrievalSet:
    """Half of the queries share a word with their passage, so that BM25 is half right."""
    table = {
        "query": [f"q{n} {'s' if n % 2 else 't'}{n}" for n in range(COUNT)],
        "passage": [f"p{n} s{n}" for n in range(COUNT)],
        "language": [("deu", "jpn")[n // 2 % 2] for n in range(COUNT)],
    }
    return from_pairs(pa.table(table), name="words", instruction="")


def planted(found: RetrievalSet, right: float) -> Measured:
    """A model that finds the share `right` of the passages at once, and for the others ranks it last."""
    vectors: dict[str, np.ndarray] = {}
    for number, text in enumerate(found.corpus_texts):
        vectors[text] = np.eye(COUNT, dtype=np.float32)[number]
    for place, (query, passage) in enumerate(found.relevant.tolist()):
        own = np.eye(COUNT, dtype=np.float32)[passage]
        vectors[found.query_texts[query]] = own if place < right * COUNT else -own
    return found.measure(Planted(vectors), (1,))


def entry(name: str, measured: Measured, **more: Any) -> dict[str, Any]:
    found = measured.scores
    return {"name": name, **more, **{key: {"words": found[key]} for key in ("scores", "languages")}}


def report_of(found: RetrievalSet, *, served: float, backbone: float | None = None) -> dict[str, Any]:
    """What `pipeline.collect` gives of a run with such models."""
    units = {"served": planted(found, served), "bm25": found.measure_bm25()}
    models, against = [entry("served", units["served"], kind="train", made_from="untrained")], {"bm25": "bm25"}
    if backbone is not None:
        units["untrained"] = planted(found, backbone)
        models.insert(0, entry("untrained", units["untrained"], kind="untrained"))
        against["untrained"] = "backbone"
    standing = []
    for other, kind in against.items():
        tables = {name: {"words": units[name].units} for name in (other, "served")}
        (row,) = differences({"words": "retrieval"}, tables)
        standing.append({**row, "kind": kind})
    return {
        "models": models,
        "baselines": [entry("bm25", units["bm25"], kind="bm25", model=None)],
        "standing": standing,
        "chance": {"words": found.chance()},
        "sets": {"words": {"kind": "retrieval", "queries": COUNT, "corpus": COUNT}},
        "serving": {"model": "served"},
    }


def test_a_perfect_model_is_above_all_and_one_that_finds_nothing_is_below_all(words: RetrievalSet) -> None:
    (best,) = standing_sentences(report_of(words, served=1.0, backbone=0.8))
    bm25 = words.measure_bm25().scores["scores"]["0"]["ndcg@10"]
    assert best.startswith("On words the served model served has ndcg@10 1.000: above BM25 (")
    assert f"above BM25 ({bm25:.3f}) by {1 - bm25:.3f} (95 % interval " in best
    assert "above its backbone (0.7" in best or "above its backbone (0.8" in best
    assert best.endswith(f"above chance ({words.chance():.3f}).")
    (worst,) = standing_sentences(report_of(words, served=0.0, backbone=0.8))
    assert "below BM25 (" in worst
    assert "below its backbone (" in worst
    assert "not clearly above chance" in worst
    assert not any(word in worst for word in PRAISE)


def test_what_is_not_sure_is_called_so(words: RetrievalSet) -> None:
    (same,) = standing_sentences(report_of(words, served=0.8, backbone=0.8))
    assert "neither surely above nor below its backbone" in same
    report = report_of(words, served=1.0)
    report["sets"]["words"]["queries"] = 5
    assert "neither surely above nor below BM25" in standing_sentences(report)[0], "five queries say little"


@pytest.mark.parametrize(("served", "backbone"), [(0.1, None), (0.7, 0.9), (0.0, 0.9)])
def test_a_model_below_bm25_or_its_backbone_is_never_praised(
    words: RetrievalSet, served: float, backbone: float | None
) -> None:
    report = report_of(words, served=served, backbone=backbone)
    # Enough languages for the sentence on weak and strong ones, and a pruned model beside its reference.
    full = max(report["models"][-1]["languages"]["words"])
    report["models"][-1]["languages"]["words"][full] = {
        f"l{n}": {"queries": 20, "ndcg@10": n / 100} for n in range(12)
    }
    report["models"].insert(1, {**report["models"][-1], "name": "whole"})
    report["models"][-1] |= {"kind": "prune", "made_from": "whole", "parameters": 1}
    report["reference"] = "whole"
    lines = [*headline(report), *terminal_table(report).splitlines()]
    told = " ".join(line for line in lines if "On words the served model" not in line)
    assert not any(word in told for word in PRAISE), told
    (sentence,) = standing_sentences(report)
    assert "below" in sentence
    good = report_of(words, served=1.0, backbone=0.2)
    good["models"][-1]["languages"] = report["models"][-1]["languages"]
    assert "strongest in l11 0.110" in " ".join(headline(good))


def test_the_headline_the_terminal_and_the_card_say_the_same(words: RetrievalSet, tmp_path: Path) -> None:
    report = report_of(words, served=0.1, backbone=0.9)
    (sentence,) = standing_sentences(report)
    assert sentence in headline(report)
    assert sentence in terminal_table(report).splitlines()
    assert terminal_table(report).splitlines()[-1].startswith("What to try next: Below BM25 on words: ")
    rows = [line.split()[0] for line in terminal_table(report).splitlines() if line.strip()]
    assert rows[2:5] == ["bm25", "untrained", "served"]
    info = load_info(tiny_model(tmp_path / "m"))
    card = model_card(report, report["models"][-1], info)
    assert sentence in card
    assert "| words | bm25 | – | ndcg@10 |" in card
    assert sentence not in model_card(report, report["models"][0], info), "it is of another model"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("deu", "deu (German)"),
        ("zho-Hans", "zho-Hans (Chinese)"),
        ("nep", "nep (Nepali)"),
        ("code:python", "code:python"),
        ("und", "und (not known)"),
    ],
)
def test_languages_have_names(code: str, expected: str) -> None:
    assert named(code) == expected
