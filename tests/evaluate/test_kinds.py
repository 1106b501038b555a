"""Each kind of task scores as the libraries of its field do, on real and on tied vectors, by language."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from f2llm_ray.evaluate.differences import compare
from f2llm_ray.evaluate.metrics.ranking import metrics as retrieval_metrics
from f2llm_ray.evaluate.tasks.bitext import Bitext, bitext_of_pairs
from f2llm_ray.evaluate.tasks.classification import Classification
from f2llm_ray.evaluate.tasks.clustering import Clustering
from f2llm_ray.evaluate.tasks.labelled import LabelledSet
from f2llm_ray.evaluate.tasks.registry import read_task
from f2llm_ray.evaluate.tasks.reranking import Reranking, ranked
from f2llm_ray.evaluate.tasks.task import Task
from f2llm_ray.evaluate.tasks.text_pairs import PairClassification, Sts
from f2llm_ray.run.folder import Folder
from tests.evaluate.planted import Planted


def made(kind: type[LabelledSet], **columns: list[Any]) -> Any:
    return kind(name="s", instruction="Do it.", test=pa.table(columns))


def scores_of(task: Task, engine: Any) -> dict[str, Any]:
    """Scores at the whole dim."""
    found = task.measure(engine, (1,)).scores
    (dim,) = found["scores"]
    return {"all": found["scores"][dim], **found["languages"][dim]}


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def cosine(engine: Planted, one: str, other: str) -> float:
    return float(engine.vectors[one].astype(np.float64) @ engine.vectors[other].astype(np.float64))


# Bitext.


@st.composite
def bitexts(draw: st.DrawFn) -> tuple[Planted, list[tuple[str, str, str]]]:
    """Few distinct vectors, so that ties and wrong translations abound; translations repeat, queries do not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 25))
    rows = [(f"a{n}", f"b{rng.integers(0, 12)}", "deu" if rng.integers(2) else "eng") for n in range(count)]
    texts = {text for row in rows for text in row[:2]}
    return Planted({text: rng.integers(-2, 3, 3) for text in sorted(texts)}), rows


@given(bitexts())
@settings(max_examples=30)
def test_bitext_is_scikit_learns_weighted_f1_of_the_nearest(
    problem: tuple[Planted, list[tuple[str, str, str]]],
) -> None:
    engine, rows = problem
    a, b, language = map(list, zip(*rows, strict=True))
    found = scores_of(made(Bitext, text_a=a, text_b=b, language=language), engine)
    total = 0.0
    for name in set(language):
        own = [row for row in rows if row[2] == name]
        pool = sorted({row[1] for row in own})
        given_texts = [
            max(pool, key=lambda text: (cosine(engine, row[0], text), -pool.index(text))) for row in own
        ]
        gold = [row[1] for row in own]
        f1 = metrics.f1_score(gold, given_texts, average="weighted", zero_division=0)
        assert found[name]["f1"] == pytest.approx(f1, abs=1e-6)
        assert found[name]["accuracy"] == pytest.approx(metrics.accuracy_score(gold, given_texts), abs=1e-6)
        total += f1 * len(own)
    assert found["all"]["f1"] == pytest.approx(total / len(rows), abs=1e-6)


def test_any_translation_of_a_text_is_right_and_only_the_text_is_instructed() -> None:
    texts = ["Instruct: Do it.\nQuery: a", "Instruct: Do it.\nQuery: x", "b", "c", "y"]
    engine = Planted(
        dict(zip(texts, [[1, 0], [0, 1], [1, 0.1], [0.9, 0], [0, 1]], strict=True)), instructions=True
    )
    task = made(Bitext, text_a=["a", "a", "x"], text_b=["b", "c", "y"], language=["eng"] * 3)
    found = scores_of(task, engine)["all"]
    assert found["accuracy"] == found["f1"] == 1
    assert sorted(engine.asked) == sorted(texts)


def test_a_source_becomes_bitext_whatever_the_order_of_its_rows() -> None:
    rows = [(f"q{n % 20}", f"p{n % 30}", ["deu", None][n % 2]) for n in range(60)] + [("OK", "OK", "deu")]
    names = ("query", "passage", "language")
    whole, drawn, whole_too, drawn_too = (
        bitext_of_pairs(
            pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in order]),
            name="p",
            instruction="",
            max_queries=limit,
        )
        for order in (rows, rows[::-1])
        for limit in (None, 8)
    )
    assert whole.test.equals(whole_too.test)
    assert drawn.test.equals(drawn_too.test)
    assert drawn.others is not None
    assert drawn.others.equals(drawn_too.others)
    assert len(whole.test) == 60
    assert whole.others is None
    assert set(whole.languages()) == {"deu", "und"}
    assert len(set(drawn.values("text_a"))) == 8
    assert len(drawn.test) == 24, "with all their translations"
    assert (
        whole.pools()
        == drawn.pools()
        == {language: sorted(f"p{n}" for n in range(first, 30, 2)) for language, first in (("deu", 0), ("und", 1))}
    )
    assert drawn.screened() == (
        drawn.values("text_a"),
        [*drawn.values("text_b"), *drawn.others["text_b"].to_pylist()],
    )


def test_translations_that_are_not_asked_for_are_found_all_the_same() -> None:
    others = pa.table({"text_b": ["other", "far"], "language": ["eng", "deu"]})
    test = pa.table({"text_a": ["a", "x"], "text_b": ["b", "y"], "language": ["eng", "eng"]})
    engine = Planted({"a": [1, 0], "b": [0.8, 0.6], "other": [1, 0], "x": [0, 1], "y": [0, 1], "far": [0, 1]})
    task = Bitext(name="s", instruction="", test=test, others=others)
    found = scores_of(task, engine)
    assert found["all"]["f1"] == found["eng"]["accuracy"] == 0.5
    assert set(found) == {"all", "eng"}


# Classification.


def labelled(rng: np.random.Generator, count: int, spread: float) -> tuple[Planted, dict[str, list[str]]]:
    """Texts around the centres of three labels, in two languages."""
    label = rng.integers(0, 3, count)
    centres = unit(rng, 3, 6)
    vectors = centres[label] + spread * unit(rng, count, 6)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [f"t{n}" for n in range(count)]
    columns = {
        "text": texts,
        "label": [f"label {n}" for n in label],
        "language": [["deu", "eng"][n] for n in rng.integers(0, 2, count)],
    }
    return Planted(dict(zip(texts, vectors, strict=True))), columns


def test_probes_are_scikit_learns() -> None:
    engine, columns = labelled(np.random.default_rng(0), 400, 1.2)
    table = pa.table(columns)
    task = Classification(name="s", instruction="", test=table.slice(0, 150), train=table.slice(150))
    found = scores_of(task, engine)
    vectors = np.stack([engine.vectors[text] for text in columns["text"]])
    label, language = np.array(columns["label"]), np.array(columns["language"][:150])
    probes = {"": LogisticRegression(max_iter=1000), "knn_": KNeighborsClassifier(5, metric="cosine")}
    for prefix, probe in probes.items():
        given_n = probe.fit(vectors[150:], label[150:]).predict(vectors[:150])
        right = given_n == label[:150]
        assert 0.5 < right.mean() < 1
        assert found["all"][f"{prefix}accuracy"] == pytest.approx(right.mean(), abs=1e-6)
        for name in ("deu", "eng"):
            own = language == name
            assert found[name][f"{prefix}accuracy"] == pytest.approx(right[own].mean(), abs=1e-6)
            macro = metrics.f1_score(label[:150][own], given_n[own], average="macro")
            assert found[name][f"{prefix}macro_f1"] == pytest.approx(macro, abs=1e-6)


# Clustering.


def test_clusters_are_of_a_language_and_scored_by_v_measure() -> None:
    engine, columns = labelled(np.random.default_rng(1), 300, 0.9)
    task = made(Clustering, **columns)
    measured = task.measure(engine, (1, 2))
    label, language = np.array(columns["label"]), np.array(columns["language"])
    for dim in ("6", "3"):
        cluster = np.array(measured.units[dim].to_pylist())
        for name in ("deu", "eng"):
            own = language == name
            assert len(np.unique(cluster[own])) == 3
            expected = metrics.v_measure_score(label[own], cluster[own])
            assert measured.scores["languages"][dim][name]["v_measure"] == pytest.approx(expected, abs=1e-6)
    assert scores_of(made(Clustering, **labelled(np.random.default_rng(1), 300, 0.1)[1]), engine) == {
        "all": measured.scores["scores"]["6"],
        **measured.scores["languages"]["6"],
    }, "the same again"
    easy, columns = labelled(np.random.default_rng(2), 100, 0.05)
    assert scores_of(made(Clustering, **columns), easy)["all"]["v_measure"] == 1


def test_a_model_that_sets_languages_apart_is_scored_within_each() -> None:
    """Two labels, two languages: all texts together would fall into two clusters by language."""
    rng = np.random.default_rng(0)
    texts, label, language = ([f"t{n}" for n in range(80)], [n % 2 for n in range(80)], ["deu", "eng"] * 20)
    language = sorted(language * 2)
    centres = {
        (0, "deu"): [1, 0, 0.3],
        (1, "deu"): [1, 0, -0.3],
        (0, "eng"): [0, 1, 0.3],
        (1, "eng"): [0, 1, -0.3],
    }
    vectors = [np.array(centres[key]) + rng.normal(0, 0.02, 3) for key in zip(label, language, strict=True)]
    engine = Planted(dict(zip(texts, vectors, strict=True)))
    task = made(Clustering, text=texts, label=[str(n) for n in label], language=language)
    assert scores_of(task, engine)["all"]["v_measure"] == 1


def test_a_model_of_one_vector_is_clustered_without_complaint() -> None:
    columns = labelled(np.random.default_rng(0), 30, 1)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores_of(made(Clustering, **columns), Planted({text: [1, 0] for text in columns["text"]}))
    assert found["all"]["v_measure"] == 0


# Pairs of texts.


@pytest.mark.parametrize("tied", [False, True])
def test_pairs_score_as_scipy_and_scikit_learn_say(tied: bool) -> None:
    rng = np.random.default_rng(5)
    texts = [f"t{n}" for n in range(80)]
    vectors = rng.integers(-1, 2, (80, 3)) if tied else unit(rng, 80, 6)
    engine = Planted(dict(zip(texts, vectors, strict=True)))
    a, b = rng.choice(texts, (2, 200))
    cosine_n = np.array([cosine(engine, *pair) for pair in zip(a, b, strict=True)])
    grade_n = np.round(cosine_n * 3 + rng.standard_normal(200))
    language = np.array([["deu", "eng"][n] for n in rng.integers(0, 2, 200)])
    columns = {"text_a": a.tolist(), "text_b": b.tolist(), "language": language.tolist()}
    found = scores_of(made(Sts, **columns, score=grade_n.tolist()), engine)
    for name in ("deu", "eng"):
        own = language == name
        assert found[name]["spearman"] == pytest.approx(stats.spearmanr(grade_n[own], cosine_n[own])[0], abs=1e-5)
        assert found[name]["pearson"] == pytest.approx(stats.pearsonr(grade_n[own], cosine_n[own])[0], abs=1e-5)
    label_n = (grade_n > 0).astype(float)
    found = scores_of(made(PairClassification, **columns, label=label_n.tolist()), engine)
    for name in ("deu", "eng"):
        own = language == name
        expected = metrics.average_precision_score(label_n[own], cosine_n[own])
        assert found[name]["ap"] == pytest.approx(expected, abs=1e-5 if tied else 1e-6)
        right = [np.mean((cosine_n[own] >= least) == label_n[own]) for least in [*cosine_n[own], 2]]
        assert found[name]["accuracy"] == pytest.approx(max(right), abs=1e-6)
        f1 = [metrics.f1_score(label_n[own], cosine_n[own] >= least) for least in cosine_n[own]]
        assert found[name]["f1"] == pytest.approx(max(f1), abs=1e-6)


# Reranking and retrieval against trec_eval, which puts equal scores in the descending order of their ids.


def document(place: int) -> str:
    return f"d{9999 - place}"


def trec(runs: list[np.ndarray], relevant: list[np.ndarray], measures: set[str]) -> list[dict[str, float]]:
    """What trec_eval says of each query, from the scores of its documents and how relevant each is."""
    judged = {
        f"q{q}": {document(c): int(grade) for c, grade in enumerate(grades)} for q, grades in enumerate(relevant)
    }
    run = {f"q{q}": {document(c): float(score) for c, score in enumerate(row)} for q, row in enumerate(runs)}
    found = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    return [found[f"q{q}"] for q in range(len(runs))]


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores of each query's candidates, tied or not, and which are relevant, at least one of each query."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tied, queries = draw(st.booleans()), draw(st.integers(1, 5))
    sizes = rng.integers(1, 30, queries)
    scores = [rng.integers(0, 4, size).astype(float) if tied else rng.standard_normal(size) for size in sizes]
    relevant = [rng.random(size) < 0.3 for size in sizes]
    for hits in relevant:
        hits[rng.integers(len(hits))] = True
    return scores, relevant


@given(rankings())
@settings(max_examples=100)
def test_reranking_is_trec_evals(problem: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    scores, relevant = problem
    sizes = [len(row) for row in scores]
    found = ranked(np.repeat(np.arange(len(sizes)), sizes), np.concatenate(scores), np.concatenate(relevant))
    for q, expected in enumerate(trec(scores, relevant, {"map", "recip_rank", "ndcg_cut"})):
        assert found["map"][q] == pytest.approx(expected["map"], abs=1e-6)
        assert found["ndcg@10"][q] == pytest.approx(expected["ndcg_cut_10"], abs=1e-6)
        reciprocal = expected["recip_rank"] if expected["recip_rank"] > 1 / 10.5 else 0
        assert found["mrr@10"][q] == pytest.approx(reciprocal, abs=1e-6)


@given(rankings(), st.integers(1, 4))
@settings(max_examples=100)
def test_retrieval_is_trec_evals(problem: tuple[list[np.ndarray], list[np.ndarray]], grades: int) -> None:
    """Also where passages answer a query to several grades."""
    scores, relevant = problem
    for row, hits in zip(scores, relevant, strict=True):
        grade_c = hits * np.random.default_rng(len(row)).integers(1, grades + 1, len(row))
        top_1k = np.argsort(-row, kind="stable")[None, :10]
        pairs_r2 = np.array([(0, c) for c in np.flatnonzero(hits)])
        found = retrieval_metrics(top_1k, pairs_r2, len(row), grade_c[hits].astype(np.float64))
        (expected,) = trec([row], [grade_c], {"ndcg_cut", "success", "recall"})
        assert found["ndcg@10"][0] == pytest.approx(expected["ndcg_cut_10"], abs=1e-6)
        assert found["acc@1"][0] == expected["success_1"]
        assert found["recall@10"][0] == pytest.approx(expected["recall_10"], abs=1e-6)


def test_reranking_orders_each_querys_own_candidates() -> None:
    engine = Planted({"q": [1, 0], "r": [0, 1], "p1": [1, 0], "p2": [0.6, 0.8], "n1": [0.8, 0.6], "n2": [0, 1]})
    columns = {
        "query": ["q", "r"],
        "positive": [["p1", "p2", "p1"], ["p1"]],
        "negative": [["n1"], ["n1", "n2"]],
        "language": ["eng", "deu"],
    }
    found = scores_of(made(Reranking, **columns), engine)
    assert found["eng"]["map"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert found["eng"]["mrr@10"] == 1
    assert found["deu"]["map"] == found["deu"]["mrr@10"] == pytest.approx(1 / 3, abs=1e-6)
    ideal = 1 + 1 / math.log2(3)
    assert found["eng"]["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / ideal, abs=1e-6)


def test_a_model_of_one_vector_reranks_as_chance_does() -> None:
    texts = [f"{side}{n}" for n in range(400) for side in "pn"]
    columns = {
        "query": ["q"] * 400,
        "positive": [[f"p{n}"] for n in range(400)],
        "negative": [[f"n{n}"] for n in range(400)],
        "language": ["eng"] * 400,
    }
    found = scores_of(made(Reranking, **columns), Planted({text: [1, 0] for text in ["q", *texts]}))
    assert found["all"]["map"] == pytest.approx(0.75, abs=0.05), "first or second, each half of the time"


# All kinds.


def every_kind() -> list[Any]:
    texts, languages = [f"t{n}" for n in range(12)], ["deu", "eng", "eng"] * 4
    labels = [str(n // 3 % 2) for n in range(12)]
    pairs = {"text_a": texts, "text_b": texts[::-1], "language": languages}
    labelled_texts = pa.table({"text": texts, "label": labels, "language": languages})
    return [
        Bitext(
            name="s",
            instruction="Do it.",
            test=pa.table(pairs),
            others=pa.table({"text_b": ["x", "y"], "language": ["deu", "eng"]}),
        ),
        Classification(name="s", instruction="Do it.", test=labelled_texts, train=labelled_texts),
        made(Clustering, text=texts, label=labels, language=languages),
        made(Sts, **pairs, score=[float(n) for n in range(12)]),
        made(PairClassification, **pairs, label=[float(label) for label in labels]),
        made(Reranking, query=texts, positive=[["x"]] * 12, negative=[["y", "z"]] * 12, language=languages),
    ]


@pytest.mark.parametrize("task", every_kind(), ids=lambda task: task.kind)
def test_every_kind_survives_a_round_trip_and_can_be_compared(task: Any, tmp_path: Path) -> None:
    task.write(Folder.at(str(tmp_path)))
    again = read_task(Folder.at(str(tmp_path)))
    assert (again.name, again.kind) == ("s", task.kind)
    rng = np.random.default_rng(0)
    instructed = [f"Instruct: Do it.\nQuery: t{n}" for n in range(12)]
    texts = [*instructed, *(f"t{n}" for n in range(12)), "x", "y", "z"]
    engine: Any = Planted(dict(zip(texts, unit(rng, len(texts), 8), strict=True)), instructions=True)
    one, other = (found.measure(engine, (1, 2)) for found in (task, again))
    assert one.scores == other.scores
    assert one.units.equals(other.units)
    assert list(one.scores["scores"]) == ["8", "4"]
    assert one.scores["queries"] == len(one.units) == 12
    assert one.scores["kind"] == task.kind
    assert [texts[0] for texts in task.unit_texts()] == [f"t{n}" for n in range(12)]
    assert again.unit_texts() == task.unit_texts()
    assert {text for texts in task.unit_texts() for text in texts} <= set().union(*task.screened())
    main = one.scores["metric"]
    for dim, found in one.scores["scores"].items():
        assert found["ci"][0] <= found[main] + 1e-6
        assert found["ci"][0] < found["ci"][1]
        assert {"deu", "eng"} == set(one.scores["languages"][dim])
    difference = compare(task.kind, one.units, other.units, (8, 4))
    expected = one.scores["scores"]["8"][main] - one.scores["scores"]["4"][main]
    assert difference.all.difference == pytest.approx(expected, abs=1e-6), "the main metric comes from the units"
    expected = one.scores["scores"]["8"]["macro"] - one.scores["scores"]["4"]["macro"]
    assert difference.macro.difference == pytest.approx(expected, abs=1e-6)
