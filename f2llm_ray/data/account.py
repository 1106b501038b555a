"""The account of every row: counted by source, language and the tag that took it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.formatting import ranked
from f2llm_ray.data.identify import MISMATCH

STEPS = ("read", "clean", "language", "decontaminate", "dedup", "near_dedup", "cap")
"""The steps that take rows out, in their order; a tag is "<step>: <reason>"."""

SIDES = ("query", "passage")
LENGTH_BINS = 24
"""Bin i counts texts of 2^i to 2^(i+1)-1 characters; the last takes all longer ones."""


def told(steps: Sequence[Mapping[str, Any]]) -> str:
    """How many rows came in and were kept, and what became of the others, the most first."""
    left_out: Counter[str] = Counter()
    for step in steps:
        for reason, rows in step["dropped"].items():
            left_out[f"{step['step']}: {reason}"] += rows
    said = f"{steps[0]['in']:,} rows read, {steps[-1]['out']:,} kept"
    reasons = [f"{reason} {rows:,}" for reason, rows in left_out.most_common()]
    return f"{said}; left out: {', '.join(reasons)}" if reasons else said


def count_by(rows: pa.Table, *columns: str) -> list[list[Any]]:
    """Rows by the values of columns: one [value, ..., rows] for each combination."""
    counted = rows.group_by(list(columns)).aggregate([([], "count_all")])
    return [list(row.values()) for row in counted.select([*columns, "count_all"]).to_pylist()]


def part_account(rows: pa.Table) -> dict[str, Any]:
    """What one table of a part's written rows adds to the account, as JSON values."""
    is_kept = pc.is_null(rows["drop"])
    kept = rows.filter(is_kept)
    asked = rows.filter(pc.or_kleene(is_kept, pc.equal(rows["drop"], MISMATCH)))
    return {
        "rows": count_by(rows, "language", "drop"),
        "lengths": {side: _length_bins(kept[side]).tolist() for side in SIDES},
        "language_check": count_by(asked, "language", "detected", "verdict"),
        "given_negatives": _sum(kept, "given_negatives"),
        "near_positives": _sum(kept, "dropped_negatives"),
        "screened_negatives": Counter(pc.list_flatten(kept["screened_negatives"]).to_pylist()),
    }


def _sum(rows: pa.Table, column: str) -> int:
    return int(pc.sum(rows[column]).as_py() or 0)


def _length_bins(texts: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    lengths = pc.utf8_length(texts).to_numpy()
    bins = np.minimum(np.log2(np.maximum(lengths, 1)).astype(np.int64), LENGTH_BINS - 1)
    return np.bincount(bins, minlength=LENGTH_BINS)


class Account:
    """What happened to every row and negative of a run."""

    def __init__(self) -> None:
        self._rows: Counter[tuple[str, str | None, str | None]] = Counter()
        self._checks: Counter[tuple[str | None, ...]] = Counter()
        self._negatives: dict[str, Counter[str]] = {}
        self._lengths: dict[str, dict[str, np.ndarray[Any, np.dtype[np.int64]]]] = {}

    def add_part(self, source: str, found: Mapping[str, Any]) -> None:
        """Adds a `part_account` of a source."""
        for language, drop, n in found["rows"]:
            self._rows[source, language, drop] += n
        for language, detected, verdict, n in found["language_check"]:
            claimed = None if verdict == "filled" else language
            self._checks[source, claimed, detected, verdict] += n
        lengths = self._lengths.setdefault(source, {side: np.zeros(LENGTH_BINS, np.int64) for side in SIDES})
        for side in SIDES:
            lengths[side] += found["lengths"][side]
        self.add_negatives(source, given=found["given_negatives"])
        self.add_negatives(source, **{"near-equal to the positive": found["near_positives"]})
        self.add_negatives(source, **{f"a text of {name}": n for name, n in found["screened_negatives"].items()})

    def add_negatives(self, source: str, **counts: int) -> None:
        """Adds negatives that a source gave ("given") or lost, by reason."""
        self._negatives.setdefault(source, Counter()).update(counts)

    def drop(self, source: str, language: str | None, tag: str, rows: int) -> None:
        """Moves rows that were in to a tag."""
        self._rows[source, language, None] -= rows
        self._rows[source, language, tag] += rows

    @property
    def rows(self) -> int:
        """All rows that were read."""
        return self._rows.total()

    @property
    def left(self) -> int:
        """Rows that are still in."""
        return sum(n for (_, _, drop), n in self._rows.items() if drop is None)

    def kept(self, source: str) -> int:
        """Rows of a source that are still in."""
        return sum(n for (name, _, drop), n in self._rows.items() if name == source and drop is None)

    def languages(self) -> dict[str, int]:
        """Rows that are still in, by language, most first."""
        return self._sum(lambda key: (key[1] or "und") if key[2] is None else None)

    def dropped(self, source: str | None = None) -> dict[str, int]:
        """Rows that are out, by tag, of one source or of all."""
        return self._sum(lambda key: key[2] if source in (None, key[0]) else None)

    def steps(self) -> list[dict[str, Any]]:
        """Rows in, out and dropped by reason, for each step in order."""
        dropped, left, account = self.dropped(), self.rows, []
        for step in STEPS:
            reasons = {
                tag.removeprefix(f"{step}: "): n for tag, n in dropped.items() if tag.startswith(f"{step}: ")
            }
            out = left - sum(reasons.values())
            account.append({"step": step, "in": left, "out": out, "dropped": reasons})
            left = out
        return account

    def card(self) -> dict[str, Any]:
        """The parts of the data card that are counts."""
        marked = "decontaminate: "
        contaminated: dict[str, Counter[str]] = {}
        for (source, _, drop), n in self._rows.items():
            if drop is not None and drop.startswith(marked):
                contaminated.setdefault(drop.removeprefix(marked), Counter())[source] += n
        return {
            "steps": self.steps(),
            "rows": _listed(self._rows, ("source", "language", "drop")),
            "lengths": {
                source: {side: bins.tolist() for side, bins in lengths.items()}
                for source, lengths in sorted(self._lengths.items())
            },
            "language_check": _listed(self._checks, ("source", "claimed", "detected", "verdict")),
            "negatives": {
                source: {
                    "given": counts["given"],
                    "dropped": {k: n for k, n in counts.items() if n and k != "given"},
                }
                for source, counts in sorted(self._negatives.items())
                if counts["given"]
            },
            "contamination": {name: dict(counts.most_common()) for name, counts in sorted(contaminated.items())},
        }

    def _sum(self, label: Callable[[tuple[str, str | None, str | None]], str | None]) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for key, n in self._rows.items():
            name = label(key)
            if name is not None and n:
                sums[name] += n
        # Equal counts in the order of their names: the account must not depend on which part came first.
        return ranked(sums)


def _listed(counts: Mapping[tuple[Any, ...], int], names: Sequence[str]) -> list[dict[str, Any]]:
    ordered = sorted(counts.items(), key=lambda item: [value or "" for value in item[0]])
    return [{**dict(zip(names, key, strict=True)), "rows": n} for key, n in ordered if n]
