"""What mining compares within one source: its texts, candidates, queries and positives, as numbers.

A text's number is its place among the keys of the source's texts, a candidate's its place among the candidates, so
both are in key order. The arrays are files that every worker maps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from f2llm_ray.data.keys import Keys, distinct_keys
from f2llm_ray.data.ragged import Ints, ranges
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.run.folder import Folder


@dataclass(frozen=True)
class Candidates:
    """One source in numbers. Shapes: t texts, c candidates, u distinct queries, n rows."""

    texts: Keys
    """Halves of the keys of all texts [2, t], rising."""
    number: Ints
    """The candidate that stands for each text [t]: that of its near-duplicate group; -1 for what is no passage."""
    candidates: Ints
    """The text of each candidate [c], rising: the smallest key of each group of passages."""
    queries: Ints
    """The text of each distinct query [u], rising."""
    group: Ints
    """The near-duplicate group of each query [u]."""
    positives: Ints
    """Each pair of a query group and a candidate that are in one row: group * c + candidate, rising."""
    row: Ints
    """Rows of the table [n], ordered by their query."""
    query: Ints
    """The query of each of these rows [n], a place in `queries`."""
    passage: Ints
    """The text of each of these rows' own passage [n]."""

    def rows_of(self, first_query: int, queries: int) -> slice:
        """Which of the rows in `row`, `query` and `passage` are those of some queries that follow each other."""
        first, last = np.searchsorted(self.query, [first_query, first_query + queries])
        return slice(int(first), int(last))

    def positive_cells(self, first_query: int, queries: int, first: int, last: int) -> tuple[Ints, Ints]:
        """Where a block of queries meets its positives among the candidates first..last.

        Returns:
            Row and column of each such cell within the block, by row.
        """
        base = self.group[first_query : first_query + queries] * len(self.candidates)
        starts, ends = np.searchsorted(self.positives, base + first), np.searchsorted(self.positives, base + last)
        cells = self.positives[ranges(starts, ends - starts)]
        return np.repeat(np.arange(len(base)), ends - starts), cells % len(self.candidates) - first

    def save(self, folder: Folder) -> None:
        """Writes every array as a file of its own."""
        for field in fields(self):
            folder.write_array(f"{field.name}.npy", getattr(self, field.name))

    @staticmethod
    def load(folder: Folder) -> Candidates:
        """What `save` wrote, mapped where the folder is local."""
        return Candidates(**{field.name: folder.read_array(f"{field.name}.npy") for field in fields(Candidates)})


def number_texts(table: pa.Table, query_column: str) -> Candidates:
    """Numbers one source: its rows with the columns passage_key, query_group, passage_group and the query's.

    That is query_key, or instructed_key for a model that was trained with instructions.
    """
    rows, names = len(table), (query_column, "passage_key", "query_group", "passage_group")
    queries, passages, query_groups, passage_groups = (key_numbers(table[name]) for name in names)
    texts, text = distinct_keys(np.concatenate([queries, passages]))
    query_text, passage_text = text[:rows], text[rows:]
    distinct_groups, passage_group = distinct_keys(passage_groups)
    standing = np.full(len(distinct_groups), len(texts))
    np.minimum.at(standing, passage_group, passage_text)
    candidates, candidate = np.unique(standing, return_inverse=True)
    number = np.full(len(texts), -1)
    number[passage_text] = candidate[passage_group]
    distinct_queries, query = np.unique(query_text, return_inverse=True)
    _, query_group = distinct_keys(query_groups)
    group = np.empty(len(distinct_queries), np.int64)
    group[query] = query_group
    order = np.argsort(query, kind="stable")
    return Candidates(
        texts=np.ascontiguousarray(texts.T),
        number=number,
        candidates=candidates,
        queries=distinct_queries,
        group=group,
        positives=np.unique(query_group * len(candidates) + candidate[passage_group]),
        row=order,
        query=query[order],
        passage=passage_text[order],
    )
