"""The parts of a data card: tables as rows of cells, and plots.

All numbers by source and language are sums over one account, so that the parts agree with each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.data.language import UNKNOWN
from f2llm_ray.report.page import Cells
from f2llm_ray.report.plots import Plot, bar_plot, histogram_plot, line_plot

Card = Mapping[str, Any]
Row = Mapping[str, Any]

DISAGREEMENTS = 20
SAMPLE_CHARS = 240
SIDES = ("query", "passage")


@dataclass
class Tally:
    """Where the rows of a source, of a language or of all went."""

    read: int = 0
    out: Counter[str] = field(default_factory=Counter)
    """Rows that are out, by step."""

    @property
    def kept(self) -> int:
        """Rows that are still in."""
        return self.read - self.out.total()


def tally(rows: Iterable[Row], label: Callable[[Row], str]) -> dict[str, Tally]:
    """Sums the account under a label of each of its rows, in the order of their first appearance."""
    tallies: dict[str, Tally] = {}
    for row in rows:
        found = tallies.setdefault(label(row), Tally())
        found.read += row["rows"]
        if row["drop"] is not None:
            found.out[row["drop"].partition(":")[0]] += row["rows"]
    return tallies


def language_of(row: Row) -> str:
    """The language that a row of the account is counted under."""
    return row["language"] or UNKNOWN


def total(rows: Iterable[Row]) -> Tally:
    """The sum of the whole account."""
    return tally(rows, lambda _: "all").get("all", Tally())


def dropping_steps(card: Card) -> list[str]:
    """The steps that took rows out, in their order."""
    out = {step for step, rows in total(card.get("rows") or []).out.items() if rows}
    known = [row["step"] for row in card.get("steps") or [] if row["step"] in out]
    return known + sorted(out - set(known))


def step_cells(row: Row) -> list[str]:
    """Step, rows in, out by it and left, and its reasons."""
    read, out = row.get("in"), row.get("out")
    lost = None if read is None or out is None else read - out
    reasons = formatting.tallied(row.get("dropped") or {})
    return [str(row.get("step")), formatting.count(read), formatting.count(lost), formatting.count(out), reasons]


def source_cells(card: Card) -> Cells:
    """Rows of source, task, rows read and kept, the share kept, and licence."""
    measured = bool(card.get("rows"))
    by_source = tally(card.get("rows") or [], lambda row: str(row["source"]))
    known = card.get("sources") or {}
    cells = []
    for name in dict.fromkeys([*known, *by_source]):
        facts = known.get(name) or {"task": formatting.NOT_MEASURED, "licence": formatting.NOT_MEASURED}
        found = by_source.get(name, Tally())
        numbers = [formatting.NOT_MEASURED] * 3
        if measured:
            numbers = [formatting.count(found.read), formatting.count(found.kept), _share(found.kept, found.read)]
        cells.append([name, str(facts["task"]), *numbers, str(facts["licence"] or "not stated")])
    return cells


def out_cells(card: Card, steps: Sequence[str]) -> Cells:
    """Rows of source and of the rows that each step took out of it."""
    by_source = tally(card.get("rows") or [], lambda row: str(row["source"]))
    names = dict.fromkeys([*(card.get("sources") or {}), *by_source])
    return [
        [name, *(formatting.count(by_source[name].out[step]) for step in steps)]
        for name in names
        if name in by_source
    ]


def _share(part: int, whole: int) -> str:
    """A share that has nothing to show where there is no whole."""
    return formatting.share(part, whole) if whole else ""


def language_plot(by_language: Mapping[str, Tally], names: Sequence[str]) -> Plot | None:
    """Rows kept of rows read, as bars in the given order."""
    if not names:
        return None
    kept = [(name, by_language[name].kept) for name in names]
    return bar_plot("rows kept by language", kept, [by_language[name].read for name in names])


def language_cells(name: str, found: Tally) -> list[str]:
    """Language, rows read and kept, and the share kept."""
    return [name, formatting.count(found.read), formatting.count(found.kept), _share(found.kept, found.read)]


def length_plots(card: Card) -> list[tuple[str, str, Plot]]:
    """Name, medians and a plot for each source, all over the same range of lengths."""
    lengths = {name: sides for name, sides in (card.get("lengths") or {}).items() if any(map(sum, sides.values()))}
    used = [bin_ for sides in lengths.values() for bins in sides.values() for bin_, n in enumerate(bins) if n]
    if not used:
        return []
    first, last = min(used), max(used) + 1
    step = max(1, (last - first) // 4)
    edges = {edge: _power(edge) for edge in (*range(first, last, step), last)}
    plots = []
    for name, sides in lengths.items():
        shares = {side: [n / max(sum(sides[side]), 1) for n in sides[side]] for side in SIDES}
        medians = ", ".join(f"{side} {_median(sides[side])}" for side in SIDES)
        plots.append((name, f"median {medians}", histogram_plot(f"lengths of {name}", shares, edges)))
    return plots


def _power(exponent: int) -> str:
    """2^exponent, short."""
    for unit, name in ((20, "M"), (10, "k")):
        if exponent >= unit:
            return f"{1 << (exponent - unit)}{name}"
    return str(1 << exponent)


def _median(bins: Sequence[int]) -> str:
    """The range of lengths that the middle text lies in."""
    half, below = sum(bins) / 2, 0
    for bin_, number in enumerate(bins):
        below += number
        if number and below >= half:
            return f"{1 << bin_:,}–{(2 << bin_) - 1:,}" if bin_ else "1"
    return formatting.NOT_MEASURED


def agreement(checks: Sequence[Row]) -> Cells:
    """Rows of source, rows judged, share that agrees, and those not judged: not detected, no claim, no label."""
    cells = []
    for name in dict.fromkeys(check["source"] for check in checks):
        found: Counter[str | None] = Counter()
        for check in checks:
            if check["source"] == name:
                found[check["verdict"]] += check["rows"]
        judged = found["agrees"] + found["differs"]
        others = (found[None], found["filled"], found["unjudged"])
        cells.append(
            [name, formatting.count(judged), _share(found["agrees"], judged), *map(formatting.count, others)]
        )
    return cells


def disagreements(checks: Sequence[Row]) -> Cells:
    """The most frequent pairs of claimed and detected language, and the sources they are of."""
    by_pair: dict[tuple[str, str], Counter[str]] = {}
    for check in checks:
        if check["verdict"] == "differs":
            pair = (check["claimed"], check["detected"])
            by_pair.setdefault(pair, Counter())[check["source"]] += check["rows"]
    pairs = sorted(by_pair, key=lambda pair: (-by_pair[pair].total(), pair))[:DISAGREEMENTS]
    return [
        [" → ".join(pair), formatting.count(by_pair[pair].total()), formatting.tallied(by_pair[pair])]
        for pair in pairs
    ]


def near_dedup(found: Row) -> Cells:
    """What was looked for and found, as pairs of a name and a value."""
    if not found:
        return []
    least = found["min_jaccard"]
    candidates, accepted = found["candidates"], found["accepted"]
    of_candidates = f" ({formatting.share(accepted, candidates)})" if candidates else ""
    return [
        ["preset", f"{found['preset']}: {found['bands']} bands of {found['rows']} rows"],
        ["tokens of a shingle", formatting.count(found["shingle"])],
        ["least Jaccard", "none, every candidate is accepted" if least is None else f"{least:g}"],
        ["documents", formatting.count(found["documents"])],
        ["candidate pairs", formatting.count(candidates)],
        ["accepted pairs", formatting.count(accepted) + of_candidates],
        ["clusters", formatting.count(found["clusters"])],
        ["documents in clusters", formatting.count(found["clustered_documents"])],
        ["largest cluster", formatting.plural(found["largest_cluster"], "document")],
    ]


def curve(found: Row) -> Plot | None:
    """The S-curve of the bands, with the least Jaccard marked."""
    if not found.get("curve"):
        return None
    lines = {"chance that two texts become candidates": [(x, y) for x, y in found["curve"]]}
    name = "chance of two texts to become candidates by their Jaccard"
    return line_plot(name, lines, x="Jaccard", y="probability", markers=False, mark=found["min_jaccard"])


def samples(found: Row) -> list[dict[str, Any]]:
    """Source and language, and the clipped texts of the kept and the dropped row."""
    return [
        {
            "title": " · ".join(filter(None, [sample["source"], sample["language"]])),
            "rows": [
                (row, [formatting.clip(sample[row][side], SAMPLE_CHARS) for side in SIDES])
                for row in ("kept", "dropped")
            ],
        }
        for sample in found.get("samples") or []
    ]


def negatives(card: Card) -> Cells:
    """Rows of source, negatives given, left, and dropped by reason."""
    cells = []
    for name, found in (card.get("negatives") or {}).items():
        left = found["given"] - sum(found["dropped"].values())
        share = _share(left, found["given"])
        cells.append(
            [name, *map(formatting.count, (found["given"], left)), share, formatting.tallied(found["dropped"])]
        )
    return cells


def contamination(card: Card) -> Cells:
    """Rows of evaluation set, training rows that held a text of it, and those by source."""
    found = card.get("contamination") or {}
    return [[name, formatting.count(sum(rows.values())), formatting.tallied(rows)] for name, rows in found.items()]


def throughput(card: Card) -> Cells:
    """Step, rows, duration, rows a second, and its time as a share of the longest one for a bar."""
    found = card.get("seconds") or {}
    longest = max((step["seconds"] for step in found.values()), default=0) or 1
    return [
        [
            name,
            formatting.count(step["rows"]),
            formatting.duration(step["seconds"]),
            formatting.count(round(step["rows"] / step["seconds"]) if step["seconds"] else None),
            f"{100 * step['seconds'] / longest:.1f}%",
        ]
        for name, step in found.items()
    ]
