"""Bitext retrieval: is the nearest of a language's translations the right one?

Defined as mteb's bitext mining: the label of a text is its translation, and the class that it is given is the
nearest of all translations of its language. Equal translations are one class here, so no score hangs on which of
two equal texts is found.

Shapes: n pairs, m dims.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from f2llm_ray.data.schema import text_key
from f2llm_ray.errors import DataError
from f2llm_ray.evaluate.encode import Encoded, Positions, encode_distinct, instructed
from f2llm_ray.evaluate.intervals import Values
from f2llm_ray.evaluate.labelled import LabelledSet
from f2llm_ray.evaluate.retrieval import top_positions
from f2llm_ray.evaluate.summary import Metric, measured
from f2llm_ray.evaluate.tables import UNKNOWN_LANGUAGE
from f2llm_ray.evaluate.task import Kind, Measured, Screened

if TYPE_CHECKING:
    from f2llm_ray.model.dims import Vectors
    from f2llm_ray.serve.engine import Engine


class Bitext(LabelledSet):
    """Pairs of a text and its translation."""

    kind: ClassVar[Kind] = "bitext"
    columns: ClassVar[dict[str, pa.DataType]] = {"text_a": pa.string(), "text_b": pa.string()}

    def check(self) -> None:
        """Nothing: any pair can be scored."""

    def screened(self) -> Screened:
        """The texts, and their translations as answers."""
        return Screened(self.values("text_a"), self.values("text_b"))

    def measure(self, engine: Engine, divisors: Sequence[int]) -> Measured:
        """F1 of the class of each text, and accuracy. Only the text carries the instruction."""
        started = time.perf_counter()
        asked, found = instructed(engine, self.values("text_a"), self.instruction), self.values("text_b")
        encoded = encode_distinct(engine, [*asked, *found])
        searches = [_Search(encoded, asked, found, rows_k) for rows_k in self.by_language().values()]
        dims, f1, right = [], [], []
        for dim, cut_ud in encoded.at_dims(divisors):
            f1_n, right_n = np.empty(len(asked)), np.empty(len(asked))
            for search in searches:
                f1_n[search.rows_k], right_n[search.rows_k] = search.score(cut_ud, engine.device)
            dims.append(dim)
            f1.append(f1_n)
            right.append(right_n)
        return measured(
            self.kind,
            self.units(),
            {"f1": Metric(np.column_stack(f1)), "accuracy": Metric(np.column_stack(right))},
            dims,
            corpus=sum(len(search.pool_c) for search in searches),
            tokens=encoded.tokens,
            started=started,
        )


class _Search:
    """The pairs of one language: k rows, a pool of c distinct translations."""

    def __init__(self, encoded: Encoded, asked: Sequence[str], found: Sequence[str], rows_k: Positions) -> None:
        pool = sorted({found[row] for row in rows_k})
        place = {text: index for index, text in enumerate(pool)}
        self.rows_k = rows_k
        self.query_k = encoded.of([asked[row] for row in rows_k])
        self.pool_c = encoded.of(pool)
        self.gold_k = np.array([place[found[row]] for row in rows_k])
        # A text that has several translations may be given any of them.
        self.pairs = np.unique(self.query_k * len(pool) + self.gold_k)

    def score(self, vectors_ud: Vectors, device: str) -> tuple[Values, Values]:
        """F1 of each row's class, and whether the row is right."""
        top_k = top_positions(vectors_ud, self.query_k, self.pool_c, k=1, device=device)[:, 0]
        right_k = np.isin(self.query_k * len(self.pool_c) + top_k, self.pairs)
        given_k = np.where(right_k, self.gold_k, top_k)
        classes = len(self.pool_c)
        hits_c = np.bincount(self.gold_k[right_k], minlength=classes)
        both_c = np.bincount(self.gold_k, minlength=classes) + np.bincount(given_k, minlength=classes)
        return (2 * hits_c / both_c)[self.gold_k], right_k.astype(np.float64)


def bitext_of_pairs(pairs: pa.Table, *, name: str, instruction: str, max_queries: int | None = None) -> Bitext:
    """Makes a set of a source's pairs; those of two equal texts are left out, and each counts once.

    Args:
        pairs: a table with string columns query, passage and language (null where it is not known).
        name: the set's name in the report.
        instruction: said before texts to models trained with instructions.
        max_queries: at most this many pairs, drawn by content hash.

    Raises:
        DataError: no pair is left.
    """
    columns = (pairs[column].to_pylist() for column in ("query", "passage", "language"))
    rows = {
        (text, translation, language or UNKNOWN_LANGUAGE)
        for text, translation, language in zip(*columns, strict=True)
        if text != translation
    }
    if not rows:
        raise DataError(f"{name}: none of {len(pairs)} pairs is of two different texts")
    kept = sorted(rows, key=lambda row: text_key("\t".join(row)))[:max_queries]
    names = ("text_a", "text_b", "language")
    test = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in kept])
    return Bitext(name=name, instruction=instruction, test=test, place=name)
