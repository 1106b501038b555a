"""Retrieval sets: queries, a corpus, and which passages answer which query.

A set comes from a user's folder in the BEIR layout (`read_beir`) or from pairs of a source (`from_pairs`), and
lies in a run as parquet (`RetrievalSet.write`, `RetrievalSet.read`).
Shapes: q queries, c passages of the corpus, r relevant (query, passage) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION
from f2llm_ray.data.reading.judged import SCORES
from f2llm_ray.data.schema import text_key
from f2llm_ray.evaluate.bm25 import top_passages
from f2llm_ray.evaluate.failures import Failure, find_failures
from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.metrics.by_type import by_type
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.ranking import METRICS, Judgements, K, chance, metrics
from f2llm_ray.evaluate.metrics.scores import NO_DIM, Measured, measured, rounded, units_table
from f2llm_ray.evaluate.tables import LANGUAGE, SCORE, TITLE, UNKNOWN_LANGUAGE, by_id, read_table
from f2llm_ray.evaluate.tasks.task import SetSection
from f2llm_ray.evaluate.vectors import DistinctVectors, Embedder, as_documents, as_queries, embed_distinct, joined
from f2llm_ray.run.folder import Folder

# How the layouts in use spell a column, most usual first.
QUERY_ID = ("_id", "id", "query-id", "query_id", "qid")
CORPUS_ID = ("_id", "id", "corpus-id", "corpus_id", "pid")
SPLIT = "qrels/test.tsv"
JUDGED_QUERY = ("query-id", "query_id", "qid")
JUDGED_PASSAGE = ("corpus-id", "corpus_id", "pid")
QUERY_TEXT = ("text", "query")
CORPUS_TEXT = ("text", "passage")
SHOWN = 300
"""Characters of a text that is shown as an example."""
KNOWN = {*QUERY_ID, *CORPUS_ID, *QUERY_TEXT, *CORPUS_TEXT, *LANGUAGE, TITLE, *SCORES}


class FolderSet(SetSection):
    """A retrieval set on disk in the BEIR layout: queries, corpus and qrels, as .parquet, .jsonl, .csv or .tsv."""

    kind: Output[Literal["retrieval"]] = "retrieval"
    folder: Content[str]
    """Its folder, in BEIR's layout; docs/evaluation.md."""
    instruction: Output[str] = DEFAULT_INSTRUCTION["retrieval"]
    """Said before each query to models trained with instructions."""
    max_queries: Output[int | None] = Field(default=None, ge=1)
    """At most this many queries, drawn by content hash; the corpus stays whole."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalSet:
    """A retrieval set in memory. Every query has a relevant passage, and ids are unique."""

    name: str
    instruction: str
    """Said before each query to models trained with instructions; "" for none."""
    query_ids: list[str]
    query_texts: list[str]
    query_languages: list[str]
    """ISO 639-3 of each query, `UNKNOWN_LANGUAGE` where it is not known."""
    corpus_ids: list[str]
    corpus_texts: list[str]
    relevant: Ints
    """[r, 2]: (query, passage) as positions in the lists above, distinct and sorted: one array that whole
    result tables are looked up in at once."""
    grades: Values | None = None
    """[r], above 0: how relevant each pair is; None where all are alike."""
    kind: ClassVar[str] = "retrieval"
    metrics: ClassVar[weighted_metrics.Metrics] = dict.fromkeys(METRICS, weighted_metrics.mean)

    def write(self, folder: Folder) -> None:
        """As `Task.write`: queries, corpus and qrels as parquet."""
        query_r, passage_r = self.relevant.T
        query_ids, corpus_ids = pa.array(self.query_ids), pa.array(self.corpus_ids)
        tables = {
            "queries": {"id": query_ids, "text": self.query_texts, "language": self.query_languages},
            "corpus": {"id": corpus_ids, "text": self.corpus_texts},
            "qrels": {
                "query_id": query_ids.take(pa.array(query_r)),
                "corpus_id": corpus_ids.take(pa.array(passage_r)),
                SCORE: self.judgements.grade_r,
            },
        }
        for name, columns in tables.items():
            table = pa.table(columns)
            folder.write_table(f"{name}.parquet", [table], table.schema)
        folder.write_json("set.json", {"kind": self.kind, "name": self.name, "instruction": self.instruction})

    @property
    def judgements(self) -> Judgements:
        """What answers the queries. A passage with a query's id that does not answer it is the query itself."""
        at = {passage_id: position for position, passage_id in enumerate(self.corpus_ids)}
        own_q = np.array([at.get(query_id, -1) for query_id in self.query_ids], dtype=np.int64)
        query_r, passage_r = self.relevant.T
        own_q[query_r[own_q[query_r] == passage_r]] = -1
        grade_r = np.ones(len(query_r)) if self.grades is None else self.grades
        return Judgements(self.relevant, grade_r, own_q)

    def screened(self) -> Screened:
        """Queries, and the passages as their answers."""
        return Screened(self.query_texts, self.corpus_texts)

    def unit_texts(self) -> list[tuple[str, ...]]:
        """The queries."""
        return [(text,) for text in self.query_texts]

    def measure(self, encoder: Embedder, divisors: Sequence[int]) -> Measured:
        """As `Task.measure`: exact search. Queries carry the instruction."""
        queries = as_queries(encoder, self.query_texts, self.instruction)
        passages = as_documents(encoder, self.corpus_texts)
        encoded = embed_distinct(encoder, [*queries, *passages])
        query_q, corpus_c = encoded.of(queries), encoded.of(passages)
        judged, full_ud = self.judgements, next(encoded.at_dims(divisors))[1]
        found = _found(encoded, query_q, corpus_c, judged, divisors, encoder.device)
        scored = self._scored(found, encoded.tokens)
        scored.scores["types"] = by_type(
            encoded.vectors_ud, query_q, corpus_c, judged, encoder.info.dims, encoder.ranges, encoder.device
        )
        top_qk = next(iter(found.values()))
        failed = find_failures(full_ud, query_q, corpus_c, top_qk, judged, self.query_languages)
        return scored._replace(failures=[self._told(failure) for failure in failed])

    def measure_mixed(
        self, encoder: Embedder, teacher: Embedder, divisors: Sequence[int], document: str | None = None
    ) -> Measured:
        """Scores a model's queries against the passages of the model in whose space it ends; exact search.

        Args:
            encoder: what embeds the queries.
            teacher: what embeds the passages.
            divisors: the dims that are measured, as d divided by these.
            document: what the teacher's passages start with; what it says itself when unset.

        Raises:
            RunError: the two have vectors of different dims, or one returns NaN or infinity.
        """
        queries = as_queries(encoder, self.query_texts, self.instruction)
        prompt = teacher.info.prompts.get("document", "") if document is None else document
        passages = [prompt + text for text in self.corpus_texts]
        asked, held = embed_distinct(encoder, queries), embed_distinct(teacher, passages)
        together = joined(asked, held, encoder.info.name, teacher.info.name)
        query_q, corpus_c = asked.of(queries), held.of(passages) + len(asked.vectors_ud)
        found = _found(together, query_q, corpus_c, self.judgements, divisors, encoder.device)
        return self._scored(found, together.tokens)

    def measure_bm25(self) -> Measured:
        """Scores BM25 as a model is scored, at the dim `NO_DIM`. Queries carry no instruction.

        Raises:
            DataError: bm25s is not installed.
        """
        left_out_q = self.judgements.own_q
        top_qk = top_passages(self.query_texts, self.corpus_texts, k=K, left_out_q=left_out_q)
        return self._scored({NO_DIM: top_qk}, 0)

    def chance(self) -> float:
        """ndcg@10 of passages in random order, on average."""
        return rounded(chance(self.judgements, len(self.corpus_ids)).mean())

    def _scored(self, results: Mapping[int, Ints], tokens: int) -> Measured:
        """Scores of the results by dim, largest first."""
        judged, corpus = self.judgements, len(self.corpus_ids)
        return measured(
            self.kind,
            self.metrics,
            units_table(self.query_ids, self.query_languages),
            {dim: metrics(top_qk, judged.relevant_r2, corpus, judged.grade_r) for dim, top_qk in results.items()},
            corpus=corpus,
            tokens=tokens,
        )

    def _told(self, failure: Failure) -> dict[str, str | int]:
        """A failure in words, as JSON values."""
        return {
            "language": self.query_languages[failure.query],
            "query": formatting.clip(self.query_texts[failure.query], SHOWN),
            "expected": formatting.clip(self.corpus_texts[failure.right], SHOWN),
            "found": formatting.clip(self.corpus_texts[failure.found], SHOWN),
            "rank": failure.rank,
        }

    @classmethod
    def read(cls, folder: Folder) -> RetrievalSet:
        """As `Task.read`."""
        facts = folder.read_json("set.json")
        return read_beir(folder.uri, name=facts["name"], instruction=facts["instruction"])


def _found(
    vectors: DistinctVectors,
    query_q: Ints,
    corpus_c: Ints,
    judged: Judgements,
    divisors: Sequence[int],
    device: str,
) -> dict[int, Ints]:
    """The nearest passages [q, K] of the queries by dim, largest first; an exact search."""
    from f2llm_ray.engine.nearest import top_positions

    return {
        dim: top_positions(cut_ud, query_q, corpus_c, k=K, left_out_q=judged.own_q, device=device)
        for dim, cut_ud in vectors.at_dims(divisors)
    }


def read_beir(uri: str, *, name: str, instruction: str, max_queries: int | None = None) -> RetrievalSet:
    """Reads a folder in the BEIR layout: queries, corpus and qrels as .parquet, .jsonl, .csv or .tsv.

    The usual spellings of a column are all known (`_id`, `id`; `query-id`, `query_id`; ...) and a `title` goes
    before its text. A judgement counts when its `score`, which is its grade, is above 0 or it has none. Where the
    judgements are BEIR's `qrels/test.tsv`, queries outside that split are left out; in any other file all queries
    are judged.

    Args:
        uri: local path or URI of the folder.
        name: the set's name in the report.
        instruction: said before queries to models trained with instructions.
        max_queries: at most this many queries, drawn by content hash; the corpus stays whole.

    Raises:
        RunError: the URI cannot be opened.
        DataError: a missing file or column, a malformed row, an id that is unknown or appears twice, a query
            without relevant passage, or nothing at all.
    """
    folder = Folder.at(uri)
    table = read_table(folder, "queries", known=KNOWN)
    texts = list(zip(table.texts(*QUERY_TEXT), table.languages(), strict=True))
    queries = by_id(table.rows.place, table.values("label", *QUERY_ID), texts)

    table = read_table(folder, "corpus", known=KNOWN)
    corpus = by_id(table.rows.place, table.values("label", *CORPUS_ID), table.texts(*CORPUS_TEXT))

    table = read_table(folder, "qrels", SPLIT, known=KNOWN)
    judged, passages = table.values("label", *JUDGED_QUERY), table.values("label", *JUDGED_PASSAGE)
    scores = table.values("number", *SCORES) if table.name_of(*SCORES) else [1.0] * len(judged)
    if table.rows.place.endswith(SPLIT):
        split = set(judged)
        queries = {query_id: query for query_id, query in queries.items() if query_id in split}
    return _assemble(
        table.rows.place,
        name=name,
        instruction=instruction,
        queries=queries,
        corpus=corpus,
        relevant=(found for found in zip(judged, passages, scores, strict=True) if found[2] > 0),
        max_queries=max_queries,
    )


def from_pairs(pairs: pa.Table, *, name: str, instruction: str, max_queries: int | None = None) -> RetrievalSet:
    """Makes a set of (query, passage) pairs: each query against all the distinct passages.

    A query is a text in a language, and all passages it is paired with are relevant to it. A pair whose query
    is its passage asks nothing and is left out. Ids are content hashes and set the order, so the order of
    the rows does not matter.

    Args:
        pairs: a table with string columns query, passage and language (null where it is not known).
        name: the set's name in the report.
        instruction: said before queries to models trained with instructions.
        max_queries: at most this many queries, drawn by content hash; the corpus stays whole.

    Raises:
        DataError: a column is missing, or no pair is left.
    """
    missing = [column for column in ("query", "passage", "language") if column not in pairs.column_names]
    if missing:
        raise DataError(f"{name}: no column {missing[0]!r}; found {pairs.column_names}")
    columns = (pairs.column(column).to_pylist() for column in ("query", "passage", "language"))
    queries: dict[str, tuple[str, str]] = {}
    corpus: dict[str, str] = {}
    relevant: set[tuple[str, str, float]] = set()
    for query, passage, found in zip(*columns, strict=True):
        if query == passage:
            continue
        language = found or UNKNOWN_LANGUAGE
        query_id, passage_id = _query_key(query, language), text_key(passage).hex()
        queries[query_id] = (query, language)
        corpus[passage_id] = passage
        relevant.add((query_id, passage_id, 1.0))
    return _assemble(
        name,
        name=name,
        instruction=instruction,
        queries=dict(sorted(queries.items())),
        corpus=dict(sorted(corpus.items())),
        relevant=relevant,
        max_queries=max_queries,
    )


def _assemble(
    place: str,
    *,
    name: str,
    instruction: str,
    queries: Mapping[str, tuple[str, str]],
    corpus: Mapping[str, str],
    relevant: Iterable[tuple[str, str, float]],
    max_queries: int | None,
) -> RetrievalSet:
    """Checks that the parts fit together, draws the queries and turns ids into positions."""
    if not queries or not corpus:
        raise DataError(f"{place}: an empty set: {len(queries)} queries against {len(corpus)} passages")
    query_at = {query_id: position for position, query_id in enumerate(queries)}
    passage_at = {passage_id: position for position, passage_id in enumerate(corpus)}
    grade_of: dict[tuple[int, int], float] = {}
    for query_id, passage_id, grade in relevant:
        if query_id not in query_at:
            raise DataError(f"{place}: query {query_id!r} is not among the {len(queries)} queries")
        if passage_id not in passage_at:
            raise DataError(f"{place}: passage {passage_id!r} is not in the corpus of {len(corpus)}")
        pair = query_at[query_id], passage_at[passage_id]
        grade_of[pair] = max(grade, grade_of.get(pair, 0.0))
    judged = {query for query, _ in grade_of}
    without = [query_id for query_id, position in query_at.items() if position not in judged]
    if without:
        raise DataError(
            f"{place}: {len(without)} of {len(queries)} queries have no relevant passage, "
            f"the first of them {without[0]!r}"
        )
    # Drawn are the queries whose content has the smallest hashes; they stay in their order.
    keys = [(_query_key(*query), query_id) for query_id, query in queries.items()]
    kept_k = sorted(sorted(range(len(keys)), key=keys.__getitem__)[:max_queries])
    kept_ids = [keys[position][1] for position in kept_k]
    place_of = {position: place for place, position in enumerate(kept_k)}
    kept = {(place_of[query], found): grade for (query, found), grade in grade_of.items() if query in place_of}
    pairs = sorted(kept)
    grade_r = np.array([kept[pair] for pair in pairs])
    return RetrievalSet(
        name=name,
        instruction=instruction,
        query_ids=kept_ids,
        query_texts=[queries[query_id][0] for query_id in kept_ids],
        query_languages=[queries[query_id][1] for query_id in kept_ids],
        corpus_ids=list(corpus),
        corpus_texts=list(corpus.values()),
        relevant=np.array(pairs, dtype=np.int64),
        grades=None if (grade_r == grade_r[0]).all() else grade_r,
    )


def _query_key(text: str, language: str) -> str:
    """The same text in two languages is two queries: each counts for its own language."""
    return text_key(f"{language}\t{text}").hex()
