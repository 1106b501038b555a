"""The account of every row: counted by source, language and the tag that took it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

STEPS = ("read", "clean", "decontaminate", "dedup", "cap")
"""The steps that take rows out, in their order; a tag is "<step>: <reason>"."""


def count_tags(rows: pa.Table) -> pa.Table:
    """Rows by source, language and drop, as columns with those names and `rows`."""
    by = ["source", "language", "drop"]
    ones = rows.append_column("rows", pa.array(np.ones(len(rows), np.int64)))
    return ones.group_by(by).aggregate([("rows", "sum")]).rename_columns([*by, "rows"])


class Counts:
    """Rows by source, language and tag (None for rows that are still in)."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str | None, str | None]] = Counter()

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row of `count_tags`."""
        self._counts[row["source"], row["language"], row["drop"]] += row["rows"]

    def drop(self, row: Mapping[str, Any]) -> None:
        """Moves rows that were in to the tag of a row of `count_tags`."""
        self._counts[row["source"], row["language"], None] -= row["rows"]
        self.add(row)

    @property
    def rows(self) -> int:
        """All rows that were read."""
        return self._counts.total()

    def kept(self, source: str) -> int:
        """Rows of a source that are still in."""
        return sum(n for (name, _, drop), n in self._counts.items() if name == source and drop is None)

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

    def _sum(self, label: Callable[[tuple[str, str | None, str | None]], str | None]) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for key, n in self._counts.items():
            name = label(key)
            if name is not None and n:
                sums[name] += n
        return dict(sums.most_common())
