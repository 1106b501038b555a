"""Sets survive a round trip, do not depend on the order of rows, and say what is wrong with a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm_ray.base.errors import DataError, F2LLMError
from f2llm_ray.data.schema import text_key
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet, from_pairs, read_beir
from f2llm_ray.run.folder import Folder
from tests.evaluate.planted import Planted

PAIRS = [
    ("Wie geht das?", "So geht das.", "deu"),
    ("Wie geht das?", "Oder so.", "deu"),
    ("Taxi", "A car with a driver.", "eng"),
    ("Taxi", "Ein Wagen mit Fahrer.", "deu"),
    ("OK", "OK", "eng"),
    ("Wie geht das?", "So geht das.", "deu"),
    ("?", "So geht das.", None),
]


def pairs_table(rows: list[tuple[str, str, str | None]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    names = ("query", "passage", "language")
    return pa.table({n: pa.array(c, pa.string()) for n, c in zip(names, columns, strict=True)})


def same(one: RetrievalSet, other: RetrievalSet) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def related(found: RetrievalSet) -> set[tuple[str, str, str]]:
    """(query, language, passage) of every relevant pair."""
    return {
        (found.query_texts[q], found.query_languages[q], found.corpus_texts[c]) for q, c in found.relevant.tolist()
    }


def test_pairs_become_distinct_queries_and_passages() -> None:
    found = from_pairs(pairs_table(PAIRS), name="p", instruction="i")
    assert related(found) == {(q, lang or "und", p) for q, p, lang in PAIRS if q != p}
    assert len(found.query_ids) == 4, "the same text in two languages is two queries"
    assert len(set(found.corpus_texts)) == len(found.corpus_ids) == 4
    assert found.corpus_ids == sorted(text_key(text).hex() for text in found.corpus_texts)
    assert found.relevant.tolist() == sorted(found.relevant.tolist())


def test_the_order_of_rows_does_not_matter() -> None:
    rows = [(f"q{i % 40}", f"p{i % 70}", "eng" if i % 3 else "deu") for i in range(300)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    for limit in (None, 7):
        one, other = (
            from_pairs(pairs_table(r), name="p", instruction="", max_queries=limit) for r in (rows, shuffled)
        )
        assert same(one, other)


def test_a_draw_keeps_the_corpus_and_grows_with_its_size() -> None:
    table = pairs_table([(f"q{i}", f"p{i}", "eng") for i in range(50)])
    small, large, whole = (from_pairs(table, name="p", instruction="", max_queries=n) for n in (10, 20, 100))
    assert [len(s.query_ids) for s in (small, large, whole)] == [10, 20, 50]
    assert [len(s.corpus_ids) for s in (small, large, whole)] == [50, 50, 50]
    assert related(small) < related(large) < related(whole)


def test_round_trip(tmp_path: Path) -> None:
    found = from_pairs(pairs_table(PAIRS), name="päirs", instruction="Find it.")
    folder = Folder.at(str(tmp_path / "sets" / "pairs"))
    found.write(folder)
    assert same(RetrievalSet.read(folder), found)
    assert folder.files() == ["corpus.parquet", "qrels.parquet", "queries.parquet", "set.json"]


QUERIES = [
    {"_id": "1", "text": "one", "lang": "eng", "metadata": {}},
    {"_id": "2", "text": "two\u2028lines", "lang": None},
]
CORPUS = [{"_id": 7, "title": "Title", "text": "seven"}, {"_id": "8", "title": "", "text": "eight"}]
QRELS = [("1", "7", 1), ("2", "8", 2), ("2", "7", 0), ("1", "8", -1)]


def write_jsonl(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def write_tsv(folder: Path, rows: list[tuple[str, str, int]]) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
    (folder / "qrels/test.tsv").write_text("\r\n".join(lines), encoding="utf-8")


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    write_jsonl(tmp_path, "queries.jsonl", QUERIES)
    write_jsonl(tmp_path, "corpus.jsonl", CORPUS)
    write_tsv(tmp_path, QRELS)
    return tmp_path


def test_reads_beir(beir: Path) -> None:
    found = read_beir(str(beir), name="mine", instruction="Find.")
    assert (found.name, found.instruction) == ("mine", "Find.")
    assert found.query_texts == ["one", "two\u2028lines"]
    assert found.query_languages == ["eng", "und"]
    assert found.corpus_texts == ["Title seven", "eight"]
    assert found.relevant.tolist() == [[0, 0], [1, 1]]
    drawn = read_beir(str(beir), name="mine", instruction="", max_queries=1)
    assert (len(drawn.query_ids), len(drawn.corpus_ids)) == (1, 2)


def test_grades_are_kept_and_a_query_does_not_find_itself(tmp_path: Path) -> None:
    """A passage with the query's id is the query, unless it is judged to answer it."""
    write_jsonl(tmp_path, "queries.jsonl", [{"_id": key, "text": key} for key in ("a", "b", "c")])
    write_jsonl(tmp_path, "corpus.jsonl", [{"_id": key, "text": f"text of {key}"} for key in ("c", "b", "x", "a")])
    judged = [("a", "x", 1), ("a", "b", 2), ("b", "b", 1), ("c", "a", 3), ("c", "x", 0), ("a", "x", 3)]
    write_jsonl(tmp_path, "qrels.jsonl", [dict(zip(("qid", "pid", "score"), row, strict=True)) for row in judged])
    found = read_beir(str(tmp_path), name="graded", instruction="")
    found.write(Folder.at(str(tmp_path / "written")))
    for one in (found, RetrievalSet.read(Folder.at(str(tmp_path / "written")))):
        assert one.relevant.tolist() == [[0, 1], [0, 2], [1, 1], [2, 3]]
        assert one.judgements.grade_r.tolist() == [2, 3, 1, 3]
        assert one.judgements.own_q.tolist() == [3, -1, 0], "b answers b"
    near = Planted({**{key: [1.0, 0.0] for key in "abc"}, **{f"text of {key}": [1.0, 0.0] for key in "abcx"}})
    scores = found.measure(near, (1,)).scores["scores"]["2"]
    # In the order of the corpus: a finds c, b, x; b finds c, b, x, a; c finds b, x, a.
    gains = [(2 / np.log2(3) + 3 / 2) / (3 + 2 / np.log2(3)), 1 / np.log2(3), 1 / 2]
    assert scores["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-5)


def test_languages_are_one_code_each(beir: Path) -> None:
    said = ["en", "eng", "en-US", "English", " ", "code:Python", "de-en"]
    queries = [{"_id": str(n), "text": f"{n}?", "language": language} for n, language in enumerate(said)]
    write_jsonl(beir, "queries.jsonl", queries)
    write_jsonl(beir, "qrels.jsonl", [{"qid": query["_id"], "pid": "7", "relevance": 1} for query in queries])
    found = read_beir(str(beir), name="mine", instruction="").query_languages
    assert found == [*["eng"] * 4, "und", "code:python", "de-en"]
    write_jsonl(beir, "queries.jsonl", [{**queries[0], "language": "klingonisch"}, *queries[1:]])
    with pytest.raises(
        DataError, match=r"queries\.jsonl:1: language: found 'klingonisch', expected an ISO 639 code"
    ):
        read_beir(str(beir), name="mine", instruction="")


def test_a_judgement_of_0_is_none_whatever_its_column_is_called(beir: Path) -> None:
    judged = [{"qid": "1", "pid": "7", "label": 1}, {"qid": "2", "pid": "7", "label": 0}]
    write_jsonl(beir, "qrels.jsonl", [*judged, {"qid": "2", "pid": "8", "label": 2}])
    assert read_beir(str(beir), name="mine", instruction="").relevant.tolist() == [[0, 0], [1, 1]]


def test_queries_outside_the_split_are_left_out(beir: Path) -> None:
    write_tsv(beir, QRELS[:1])
    assert read_beir(str(beir), name="mine", instruction="").query_ids == ["1"]


@pytest.mark.parametrize(
    ("query", "passage", "judged"),
    [
        (("_id", "text"), ("_id", "text"), ("query-id", "corpus-id")),
        (("id", "text"), ("id", "text"), ("query_id", "corpus_id")),
        (("qid", "query"), ("pid", "passage"), ("qid", "pid")),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_reads_the_usual_spellings(
    tmp_path: Path, kind: str, query: tuple[str, str], passage: tuple[str, str], judged: tuple[str, str]
) -> None:
    tables = {
        "queries": {query[0]: ["a", "b"], query[1]: ["A?", "B?"], "language": ["eng", "deu"]},
        "corpus": {passage[0]: ["x", "y"], passage[1]: ["X", "Y"]},
        "qrels": {judged[0]: ["a", "b", "b"], judged[1]: ["y", "x", "y"]},
    }
    for name, columns in tables.items():
        table = pa.table(columns)
        if kind == "parquet":
            pq.write_table(table, tmp_path / f"{name}.parquet")
        elif kind == "jsonl":
            write_jsonl(tmp_path, f"{name}.jsonl", table.to_pylist())
        else:
            lines = map(
                ("," if kind == "csv" else "\t").join, [table.column_names, *zip(*columns.values(), strict=True)]
            )
            (tmp_path / f"{name}.{kind}").write_text("\n".join(lines), encoding="utf-8-sig")
    found = read_beir(str(tmp_path), name="s", instruction="")
    assert related(found) == {("A?", "eng", "Y"), ("B?", "deu", "X"), ("B?", "deu", "Y")}


def broken_lines(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "corpus.jsonl").unlink(), "no file corpus.parquet or corpus.jsonl"),
        (
            lambda f: (f / "qrels/test.tsv").unlink(),
            "no file qrels.parquet or qrels.jsonl or qrels.csv or qrels.tsv or qrels/test.tsv",
        ),
        (lambda f: write_jsonl(f, "queries.jsonl", [{"_id": "1"}]), "queries.jsonl: no column text or query"),
        (lambda f: write_jsonl(f, "corpus.jsonl", [{"text": "x"}]), "corpus.jsonl: no column _id or id"),
        (lambda f: write_tsv(f, [*QRELS, ("9", "7", 1)]), "query '9' is not among the 2 queries"),
        (lambda f: write_tsv(f, [*QRELS, ("1", "9", 1)]), "passage '9' is not in the corpus of 2"),
        (lambda f: write_tsv(f, QRELS[:1] + QRELS[2:]), "1 of 2 queries have no relevant passage.*'2'"),
        (lambda f: write_jsonl(f, "qrels.jsonl", [{"qid": "2", "pid": "8"}]), "1 of 2 queries have no .*'1'"),
        (lambda f: write_tsv(f, []), "an empty set: 0 queries against 2 passages"),
        (lambda f: write_jsonl(f, "queries.jsonl", QUERIES * 2), "id '1' appears twice"),
        (
            lambda f: write_jsonl(f, "corpus.jsonl", [*CORPUS, {"_id": "3"}]),
            "corpus.jsonl:3: text: found null, expected text",
        ),
        (
            lambda f: write_jsonl(f, "corpus.jsonl", [{"_id": None, "text": ""}]),
            "corpus.jsonl:1: _id: found null, expected text or a whole number",
        ),
        (
            lambda f: write_jsonl(f, "qrels.jsonl", [{"qid": "1", "pid": "7", "score": "x"}]),
            "qrels.jsonl:1: score: found str 'x', expected a number",
        ),
        (lambda f: broken_lines(f, "corpus.jsonl", "{}\n{,}"), "corpus.jsonl:2: found a line that is not JSON"),
        (lambda f: broken_lines(f, "corpus.jsonl", "7"), "corpus.jsonl:1: found int, expected a JSON object"),
        (
            lambda f: broken_lines(f, "queries.parquet", "text"),
            "queries.parquet: found a damaged file or another format, expected Parquet",
        ),
        (
            lambda f: (f / "corpus.jsonl").write_bytes(b'{"_id": "\xff"}'),
            "corpus.jsonl:1: found byte 0xff at byte 10 of the line, expected UTF-8",
        ),
    ],
)
def test_what_is_wrong_is_named(beir: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(beir)
    with pytest.raises(DataError, match=message):
        read_beir(str(beir), name="mine", instruction="")


def test_pairs_that_make_no_set() -> None:
    with pytest.raises(DataError, match="pairs: an empty set"):
        from_pairs(pairs_table([("OK", "OK", "eng")]), name="pairs", instruction="")
    with pytest.raises(DataError, match="pairs: no column 'passage'"):
        from_pairs(pa.table({"query": ["q"]}), name="pairs", instruction="")


def test_a_folder_that_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(F2LLMError, match=r"set\.json: no such file"):
        RetrievalSet.read(Folder.at(str(tmp_path)))
