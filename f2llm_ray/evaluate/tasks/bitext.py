"""Bitext retrieval: is the nearest of a language's translations the right one?

Defined as mteb's bitext mining: the label of a text is its translation, and the class that it is given is the
nearest of all translations of its language. Equal translations are one class here, so no score hangs on which of
two equal texts is found.

Shapes: n pairs, m dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import text_key
from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.tables import UNKNOWN_LANGUAGE
from f2llm_ray.evaluate.tasks.labelled import Columns, LabelledFile, LabelledSet, Scoring
from f2llm_ray.evaluate.vectors import DistinctVectors, Embedder, as_documents, as_queries, embed_distinct
from f2llm_ray.model.dims import Vectors


class BitextSet(LabelledFile):
    """Texts (text_a), each with its translation (text_b), to be found among those of its language."""

    test: Content[str]
    """Table with the columns text_a and text_b."""
    instruction: Output[str] = "Retrieve translations of the following text."
    """Said before each text_a to models trained with instructions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bitext(LabelledSet):
    """Pairs of a text and its translation."""

    kind: ClassVar[str] = "bitext"
    section = BitextSet
    columns: ClassVar[Columns] = {
        "test": {"text_a": "text", "text_b": "text"},
        "others": {"text_b": "text"},
    }
    asked: ClassVar[tuple[str, ...]] = ("text_a", "text_b")
    metrics: ClassVar[weighted_metrics.Metrics] = {"f1": weighted_metrics.mean, "accuracy": weighted_metrics.mean}

    others: pa.Table | None = None
    """Further translations (text_b, language) that are searched and that no text of `test` asks for."""

    def screened(self) -> Screened:
        """The texts, and all translations as answers."""
        others = [] if self.others is None else self.others["text_b"].to_pylist()
        return Screened(self.values("text_a"), [*self.values("text_b"), *others])

    def pools(self) -> dict[str, list[str]]:
        """The distinct translations of each language, sorted."""
        pools: dict[str, set[str]] = {}
        for table in (self.test, self.others):
            for row in [] if table is None else table.select(["text_b", "language"]).to_pylist():
                pools.setdefault(row["language"], set()).add(row["text_b"])
        return {language: sorted(pool) for language, pool in pools.items()}

    def scoring(self, encoder: Embedder) -> Scoring:
        """F1 of the class of each text, and accuracy. Only the text carries the instruction."""
        asked = as_queries(encoder, self.values("text_a"), self.instruction)
        found = as_documents(encoder, self.values("text_b"))
        pools = {language: as_documents(encoder, pool) for language, pool in self.pools().items()}
        encoded = embed_distinct(encoder, [*asked, *(text for pool in pools.values() for text in pool)])
        searches = [
            _Search(encoded, [(asked[row], found[row]) for row in rows_k], pools[language], rows_k)
            for language, rows_k in self.by_language().items()
        ]

        def score(cut_ud: Vectors) -> dict[str, Values]:
            values = {name: np.empty(len(asked)) for name in self.metrics}
            for search in searches:
                for name, found_k in search.score(cut_ud, encoder.device).items():
                    values[name][search.rows_k] = found_k
            return values

        return Scoring(encoded, score, sum(len(search.pool_c) for search in searches))


class _Search:
    """The pairs of one language: k rows, a pool of c distinct translations."""

    def __init__(
        self, encoded: DistinctVectors, pairs: Sequence[tuple[str, str]], pool: Sequence[str], rows_k: Ints
    ) -> None:
        place = {text: index for index, text in enumerate(pool)}
        self.rows_k = rows_k
        self.query_k = encoded.of([text for text, _ in pairs])
        self.pool_c = encoded.of(pool)
        self.gold_k = np.array([place[translation] for _, translation in pairs])
        # A text that has several translations may be given any of them.
        self.pairs = np.unique(self.query_k * len(pool) + self.gold_k)

    def score(self, vectors_ud: Vectors, device: str) -> dict[str, Values]:
        """F1 of each row's class [k], and whether the row is right [k]."""
        from f2llm_ray.engine.nearest import top_positions

        top_k = top_positions(vectors_ud, self.query_k, self.pool_c, k=1, device=device)[:, 0]
        right_k = np.isin(self.query_k * len(self.pool_c) + top_k, self.pairs)
        given_k = np.where(right_k, self.gold_k, top_k)
        classes = len(self.pool_c)
        hits_c = np.bincount(self.gold_k[right_k], minlength=classes)
        both_c = np.bincount(self.gold_k, minlength=classes) + np.bincount(given_k, minlength=classes)
        return {
            "f1": 2 * hits_c[self.gold_k] / both_c[self.gold_k],
            "accuracy": right_k.astype(np.float64),
        }


def bitext_of_pairs(pairs: pa.Table, *, name: str, instruction: str, max_queries: int | None = None) -> Bitext:
    """Makes a set of a source's pairs: each text against all the translations of its language.

    A pair of two equal texts is left out, and each pair counts once, so the order of the rows does not matter.
    The arguments are those of `retrieval_set.from_pairs`: of the texts at most `max_queries` are drawn, with all
    their translations, and the others' translations stay in the search.

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
    asked = sorted({(text, language) for text, _, language in rows}, key=_content)
    drawn = set(asked[:max_queries])
    test = [row for row in sorted(rows, key=_content) if (row[0], row[2]) in drawn]
    others = {row[1:] for row in rows} - {row[1:] for row in test}
    return Bitext(
        name=name,
        instruction=instruction,
        test=_table(("text_a", "text_b", "language"), test),
        others=_table(("text_b", "language"), sorted(others)) if others else None,
    )


def _content(texts: tuple[str, ...]) -> bytes:
    return text_key("\t".join(texts))


def _table(names: Sequence[str], rows: Sequence[tuple[str, ...]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
