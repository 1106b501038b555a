"""Negatives from labels: other labels for classification, texts of other classes for clustering."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.keys import KEYS
from f2llm_ray.data.schema import rng


def label_negatives(ids: pa.Table, *, source: str, seed: int, count: int = 24) -> pa.Table:
    """Gives rows that brought no negatives the keys of other labels (paper: a label text is the negative).

    A classification source's passages are its labels. Up to `count` others (paper: 24 per row) are drawn for each
    row, among those written in the same passage language where the source has several. A text with several labels
    gets none of them.

    Args:
        ids: rows of one classification source, with query_group, passage_key, language, passage_language,
            negative_keys.
        source: its name, part of the seed.
        seed: the recipe's.
        count: most negatives per row.
    """
    languages = np.array([language or "" for language in _passage_languages(ids)])
    given = ids["negative_keys"].to_pylist()
    labels = ids["passage_key"].to_pylist()
    pools = {
        language: sorted({labels[row] for row in np.flatnonzero(languages == language)})
        for language in np.unique(languages)
    }
    groups = ids["query_group"].to_pylist()
    own: dict[bytes, set[bytes]] = {}
    for group, label in zip(groups, labels, strict=True):
        own.setdefault(group, set()).add(label)
    start = rng(seed, source, "labels").integers(0, 2**31, size=len(labels))
    negatives = []
    for row in range(len(labels)):
        pool = pools[languages[row]]
        if given[row]:
            negatives.append(given[row])
            continue
        # A stretch of the sorted (hash-ordered) labels from a random place on, the text's own left out.
        mine = own[groups[row]]
        place = [pool[(int(start[row]) + i) % len(pool)] for i in range(min(count + len(mine), len(pool)))]
        negatives.append([other for other in place if other not in mine][:count])
    return _with_negatives(ids, negatives)


def class_negatives(ids: pa.Table, *, source: str, seed: int, count: int = 24) -> pa.Table:
    """Gives rows that brought no negatives the passages of rows of other classes (paper's data: 24 per row).

    They are drawn at random, in the row's passage language where the source has several. Rows without a label, and
    classes without another one in their language, get none.

    Args:
        ids: rows of one clustering source, with label, passage_key, passage_group, language, passage_language
            and negative_keys.
        source: its name, part of the seed.
        seed: the recipe's.
        count: most negatives per row.
    """
    columns = ("label", "passage_key", "passage_group", "negative_keys")
    label, key, group, negatives = (ids[name].to_pylist() for name in columns)
    language = _passage_languages(ids)
    generator = rng(seed, source, "classes")
    rows_of: dict[str | None, list[int]] = {}
    for row, (name, given) in enumerate(zip(language, label, strict=True)):
        if given is not None:
            rows_of.setdefault(name, []).append(row)
    for rows in rows_of.values():
        # Twice as many draws as wanted, since some fall on the row's own class or on one text twice.
        drawn = generator.integers(0, len(rows), size=(len(rows), 2 * count)).tolist()
        for row, draws in zip(rows, drawn, strict=True):
            if not negatives[row]:
                others = [rows[draw] for draw in draws if label[rows[draw]] != label[row]]
                # One text of each near-duplicate group, none of the row's own.
                by_group = {group[other]: key[other] for other in others if group[other] != group[row]}
                negatives[row] = list(by_group.values())[:count]
    return _with_negatives(ids, negatives)


def _passage_languages(ids: pa.Table) -> list[str | None]:
    """The language of each passage, which is the query's where it has none of its own."""
    found: list[str | None] = pc.coalesce(ids["passage_language"], ids["language"]).to_pylist()
    return found


def _with_negatives(ids: pa.Table, negatives: list[list[bytes]]) -> pa.Table:
    index, field = ids.schema.get_field_index("negative_keys"), KEYS.field("negative_keys")
    return ids.set_column(index, field, pa.array(negatives, field.type))
