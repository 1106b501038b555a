"""Decontamination: training rows that hold a text of an evaluation set are tagged.

Shapes: D texts of the sets, G their n-grams, T training texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.clean import normalize
from f2llm_ray.data.near.shingles import Hashes, Shingles, shingle
from f2llm_ray.data.ragged import Ints, filter_beside, filter_lists, lengths_of, list_array, ranges
from f2llm_ray.data.schema import with_column
from f2llm_ray.data.settings import Decontamination

Mask = np.ndarray[Any, np.dtype[np.bool_]]
TEXTS_AT_ONCE = 3_000
"""About a million characters of negatives, whose n-grams stay in the cache."""
MOST_SLOT_BITS = 25
SETS = pa.list_(pa.string())


class Screened(NamedTuple):
    """The texts of a task that must not be trained on."""

    asked: Sequence[str]
    """Queries and labelled texts: also the short ones are looked for."""
    answers: Sequence[str]
    """What is to be found; a short one is no secret."""


@dataclass(frozen=True)
class Screen:
    """The texts of evaluation sets by their n-grams: an inverted index, which counts every overlap exactly."""

    settings: Decontamination
    sets: tuple[str, ...]
    set_of: Ints
    """The set of each text [D]."""
    sizes: Ints
    """Distinct n-grams of each text [D]."""
    ngrams: Hashes
    """All n-grams of all texts, sorted [G]."""
    text_of: Ints
    """The text that each is of [G]."""
    slots: Mask
    """Whether a place of this table, of a power of 2, is that of an n-gram: most texts are told apart by it."""

    def find(self, texts: Sequence[str]) -> Ints:
        """The first set that each training text holds a text of [T], -1 for none."""
        owner, held = self.held(texts)
        found = np.full(len(texts), len(self.sets))
        np.minimum.at(found, owner, self.set_of[held])
        return np.where(found < len(self.sets), found, -1)

    def held(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Each pair of a training text and a text of a set that it holds, as their places."""
        shingles = shingle(texts, self.settings.ngram)
        some = self._touched(shingles)
        hashes, lengths = shingles.of(some)
        owner = np.repeat(some, lengths)
        first = np.searchsorted(self.ngrams, hashes, side="left")
        count = np.searchsorted(self.ngrams, hashes, side="right") - first
        pairs = np.repeat(owner, count) * len(self.sizes) + self.text_of[ranges(first, count)]
        pairs, common = np.unique(pairs, return_counts=True)
        held = pairs[common >= self.settings.overlap * self.sizes[pairs % len(self.sizes)]]
        return held // len(self.sizes), held % len(self.sizes)

    def _touched(self, shingles: Shingles) -> Ints:
        """The training texts that have an n-gram of a text of a set."""
        place = np.flatnonzero(self.slots[_slot(shingles.hashes, len(self.slots))])
        hashes = shingles.hashes[place]
        at = np.minimum(np.searchsorted(self.ngrams, hashes), len(self.ngrams) - 1)
        place = place[self.ngrams[at] == hashes]
        return np.unique(np.searchsorted(shingles.starts, place, side="right") - 1)


def make_screen(sets: Mapping[str, Screened], settings: Decontamination) -> Screen | None:
    """Indexes what sets, by name, ask, and their answers of an n-gram's length; None when there is no text."""
    set_of: list[int] = []
    texts: list[str] = []
    for place, (asked, answers) in enumerate(sets.values()):
        queries = [normalize(text) for text in asked]
        passages = [normalize(text) for text in answers] if settings.passages else []
        long = shingle(passages, settings.ngram).tokens >= settings.ngram
        kept = [*queries, *(text for text, enough in zip(passages, long, strict=True) if enough)]
        set_of += [place] * len(kept)
        texts += kept
    if not texts:
        return None
    hashes, sizes = shingle(texts, settings.ngram).distinct()
    order = np.argsort(hashes, kind="stable")
    text_of = np.repeat(np.arange(len(texts)), sizes)[order]
    slots = np.zeros(1 << min(MOST_SLOT_BITS, (8 * len(hashes)).bit_length()), bool)
    slots[_slot(hashes, len(slots))] = True
    return Screen(settings, tuple(sets), np.array(set_of), sizes, hashes[order], text_of, slots)


def _slot(hashes: Hashes, size: int) -> Ints:
    """The place of each hash in a table of a power of 2."""
    return (hashes >> np.uint64(65 - size.bit_length())).astype(np.int64)


def decontaminate(rows: pa.Table, screen: Screen | None) -> pa.Table:
    """Tags rows with "decontaminate: <set>" whose query or passage holds a text of the set.

    A negative that holds one is left out, and the row stays.

    Returns:
        The rows with the column `screened_negatives`: the set of each negative that was left out.
    """
    if screen is None or not len(rows):
        return rows.append_column("screened_negatives", pa.nulls(len(rows), SETS))
    query, passage = (screen.find(rows[name].to_pylist()) for name in ("query", "passage"))
    found = np.where(query >= 0, query, passage)
    drops = [
        drop or (f"decontaminate: {screen.sets[place]}" if place >= 0 else None)
        for drop, place in zip(rows["drop"].to_pylist(), found.tolist(), strict=True)
    ]
    return _without_negatives(with_column(rows, "drop", drops), screen)


def _without_negatives(rows: pa.Table, screen: Screen) -> pa.Table:
    negatives, scores = (rows[name].combine_chunks() for name in ("negatives", "negative_scores"))
    lengths = lengths_of(negatives)
    # A negative often stands in many rows: each text is looked at once.
    distinct = pc.dictionary_encode(negatives.flatten())
    texts = distinct.dictionary.to_pylist()
    parts = [screen.find(texts[at : at + TEXTS_AT_ONCE]) for at in range(0, len(texts), TEXTS_AT_ONCE)]
    found = np.concatenate([np.zeros(0, np.int64), *parts])[distinct.indices.to_numpy()]
    kept = found < 0
    sets = [screen.sets[place] for place in found[~kept].tolist()]
    counts = np.bincount(np.repeat(np.arange(len(rows)), lengths)[~kept], minlength=len(rows))
    rows = rows.append_column("screened_negatives", list_array(pa.array(sets, pa.string()), counts))
    if kept.all():
        return rows
    rows = with_column(rows, "negatives", filter_lists(negatives, kept).cast(negatives.type))
    return with_column(rows, "negative_scores", filter_beside(scores, lengths, kept))
