"""What to try next: each line by the facts that it is for, and none without them."""

from __future__ import annotations

from typing import Any

from f2llm_ray.report.advice import MOST, advice, cut_sentence

MODELS = [
    {"name": "untrained", "kind": "untrained", "made_from": None},
    {"name": "tuned", "kind": "train", "made_from": "untrained"},
    {"name": "small", "kind": "prune", "made_from": "tuned"},
]


def below(kind: str, high: float) -> dict[str, Any]:
    row = {
        "set": "manual",
        "kind": kind,
        "against": kind,
        "difference": high - 0.1,
        "low": high - 0.2,
        "high": high,
    }
    return {"standing": [row], "sets": {"manual": {"kind": "retrieval", "queries": 100}}}


def of_languages(scores: dict[str, float]) -> list[dict[str, Any]]:
    found = {name: {"queries": 50, "ndcg@10": score} for name, score in scores.items()}
    return [{"name": "m", "scores": {"manual": {"8": {"ndcg@10": 0.5}}}, "languages": {"manual": {"8": found}}}]


def test_nothing_is_said_of_nothing() -> None:
    assert advice({}) == []
    assert advice({"models": MODELS, "training": {"tuned": {}}, "languages": {"deu": 3}, "texts": 0}) == []
    assert cut_sentence({"texts": 5, "cut_texts": {"web": 0}}) == ""


def test_below_bm25() -> None:
    (line,) = advice(below("bm25", -0.01))
    assert line == "Below BM25 on manual: start from a ready backbone, as the recipe adapt-e5-small does."
    (line,) = advice({**below("bm25", -0.01), "backbone": "models/e5"})
    assert "adapt-e5-small" not in line
    assert "models/e5" in line
    assert advice(below("bm25", 0.01)) == [], "not surely"
    assert advice(below("model", -0.01)) == []


def test_below_the_backbone() -> None:
    (line,) = advice(below("backbone", -0.01))
    assert line == "Below its backbone on manual: a lower lr, or fewer steps."


def test_a_loss_that_was_still_falling() -> None:
    def told(*losses: float | None) -> list[str]:
        curve = [[100 * number, loss] for number, loss in enumerate(losses, 1)]
        return advice({"models": MODELS, "training": {"tuned": {"validation": curve}}})

    (line,) = told(3.0, 2.0, 1.5)
    assert line == (
        "The validation loss of tuned was still falling at its end (2.000 at step 200, 1.500 at step 300): "
        "more steps (stages.tuned.max_steps or epochs)."
    )
    assert told(3.0, 2.0, None, 1.5) != []
    assert told(3.0, 2.0, 2.5, 1.99) == [], "not lower than before"
    assert told(3.0, 2.0, 1.99) == told(1.0, 2.0) == told(1.0) == told() == []


def test_texts_that_were_cut() -> None:
    facts = {"texts": 1000, "cut_texts": {"web": 4, "books": 96}, "max_tokens": 48}
    (line,) = advice(facts)
    assert line == "10.0 % of the texts were cut at 48 tokens, most of books: a larger data.max_tokens."
    assert advice({**facts, "texts": 10_000}) == []
    assert cut_sentence({**facts, "texts": 10_000}) == (
        "100 of 10,000 distinct texts (1.0 %) are longer than data.max_tokens (48) and were cut: books 96 · web 4."
    )


def test_languages_far_below_the_mean_with_few_rows() -> None:
    scores = {"deu": 0.9, "fra": 0.8, "amh": 0.1, "mya": 0.2, "rus": 0.85}
    trained = {"deu": 900, "fra": 800, "mya": 2000, "rus": 700, "amh": 1}
    (line,) = advice({"models": of_languages(scores), "languages": trained})
    assert "amh (Amharic) 0.100 with 1 row: more data of these languages." in line
    assert "mya" not in line, "it has many rows"
    assert advice({"models": of_languages({**scores, "amh": 0.5}), "languages": trained}) == []
    assert advice({"models": of_languages(scores), "languages": dict.fromkeys(scores, 5)}) == []


def test_no_search_was_measured() -> None:
    assert advice({"sets": {"names": {"kind": "bitext"}}})[0].startswith("No retrieval set was measured")
    assert advice({"sets": {}})[0].startswith("No retrieval set was measured")
    assert advice({"sets": {"manual": {"kind": "retrieval"}}}) == []


def test_there_are_few_lines() -> None:
    facts = {
        **below("bm25", -0.1),
        "models": [{**MODELS[1], **of_languages({"deu": 0.9, "fra": 0.9, "amh": 0.1})[0], "name": "tuned"}],
        "languages": {"deu": 9, "fra": 9},
        "training": {"tuned": {"validation": [[1, 2.0], [2, 1.0]]}},
        "texts": 10,
        "cut_texts": {"web": 9},
        "max_tokens": 8,
    }
    assert len(advice(facts)) == MOST
    facts["standing"] = []
    assert len(advice(facts)) == 3
