"""Plots: SVG elements that take colours and font from the page around them, and PNG files in light colours."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
P = ParamSpec("P")

CODE = "#0f0f0"
"""With a digit after it, a colour that no text contains by chance: it becomes the page's CSS variable of that
number, so that one SVG is readable in light and in dark."""
LINES = 5
POINTS_PER_LINE = 300
PNG_DPI = 160


@dataclass(frozen=True)
class Palette:
    """Colours of a plot."""

    ink: str
    grid: str
    lines: tuple[str, ...]

    def line(self, index: int) -> str:
        """The colour of the line with this number; they come round again."""
        return self.lines[index % len(self.lines)]


PAGE = Palette(f"{CODE}0", f"{CODE}1", tuple(f"{CODE}{2 + index}" for index in range(LINES)))
PRINT = Palette("#1f2328", "#d9dce0", ("#0b6bb3", "#c4531a", "#1a8163", "#9a4c93", "#8a6d00"))
"""As in the page's light colours."""


@dataclass(frozen=True)
class Plot:
    """A plot that a template may hold."""

    name: str
    """Its own on its page."""
    draw: Callable[[Palette], Figure]

    def __html__(self) -> str:
        return _svg(self.draw(PAGE), self.name)

    @property
    def file(self) -> str:
        """A file name."""
        return f"{re.sub(r'[^0-9A-Za-z_]+', '-', self.name).strip('-').lower()}.png"

    def png(self) -> bytes:
        """The image, on white, the same bytes each time."""
        figure, buffer = self.draw(PRINT), io.BytesIO()
        _finish(figure, PRINT)
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
        return buffer.getvalue()


def _plot(draw: Callable[Concatenate[Palette, P], Figure]) -> Callable[Concatenate[str, P], Plot]:
    """From a function that draws in a palette's colours to one that makes a plot, by its name on the page."""

    def make(name: str, /, *args: P.args, **kwargs: P.kwargs) -> Plot:
        return Plot(name, lambda palette: draw(palette, *args, **kwargs))

    return make


@_plot
def line_plot(
    palette: Palette,
    lines: Mapping[str, Points],
    *,
    x: str,
    y: str,
    markers: bool,
    ticks: Sequence[float] = (),
    mark: float | None = None,
) -> Figure:
    """One line per key; with ticks, x is logarithmic and marked there. Empty lines are left out.

    Args:
        palette: the colours.
        lines: points (x, y) by the line's name.
        x: name of the axis.
        y: name of the axis.
        markers: a dot on every point.
        ticks: the places of x that are marked.
        mark: x of a dashed vertical line.
    """
    figure, axes = _figure(4.8, 2.9, palette)
    drawn = {name: _thin(sorted(points)) for name, points in lines.items() if points}
    for index, (key, points) in enumerate(drawn.items()):
        # A leading underscore would hide a line from the legend.
        label, colour = key.lstrip("_") or key, palette.line(index)
        alone = markers or len(points) == 1
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o" if alone else "", ms=4)
    if mark is not None:
        axes.axvline(mark, color=palette.ink, linewidth=0.8, linestyle="--")
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if markers:  # scores, whose differences would look larger than they are
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=palette.grid, linewidth=0.6)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


@_plot
def bar_plot(palette: Palette, bars: Sequence[tuple[str, int]], wholes: Sequence[int] = ()) -> Figure:
    """One bar per key with its number at the end, in the given order.

    With wholes, a pale bar behind each one is what it is a part of, and both numbers are at its end.
    """
    figure, axes = _figure(4.8, 0.2 + 0.2 * len(bars), palette)
    keys, numbers = zip(*bars, strict=True)
    places = range(len(bars))
    ends, labels = numbers, [f"{number:,}" for number in numbers]
    if wholes:
        axes.barh(places, wholes, color=palette.grid, height=0.72)
        ends = tuple(map(max, numbers, wholes))
        labels = [f"{number:,} of {whole:,}" for number, whole in zip(numbers, wholes, strict=True)]
    axes.barh(places, numbers, color=palette.line(0), height=0.72)
    axes.set_yticks(places, keys)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    # Room for the label of the longest bar.
    axes.set_xlim(0, max(*ends, 1) * (1.4 if wholes else 1.18))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for place, end, label in zip(places, ends, labels, strict=True):
        axes.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center", size=9)
    return figure


@_plot
def histogram_plot(palette: Palette, shares: Mapping[str, Sequence[float]], edges: Mapping[int, str]) -> Figure:
    """A small plot of one or more histograms over the same bins, laid over each other.

    Args:
        palette: the colours.
        shares: share of each bin, by the histogram's name; the n-th has the n-th colour of lines.
        edges: which edges between bins are marked, and how; the first and the last bound the plot.
    """
    figure, axes = _figure(3.4, 1.5, palette)
    first, last = min(edges), max(edges)
    for index, values in enumerate(shares.values()):
        colour = palette.line(index)
        axes.stairs(values, range(len(values) + 1), color=colour, fill=True, alpha=0.2)
        axes.stairs(values, range(len(values) + 1), color=colour, linewidth=1.4)
    axes.set_xlim(first, last)
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(edges), list(edges.values()))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.locator_params(axis="y", nbins=3)
    return figure


def _figure(width: float, height: float, palette: Palette) -> tuple[Figure, Axes]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as NewFigure

    with rc_context({"axes.edgecolor": palette.grid}):
        figure = NewFigure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=palette.grid)
    return figure, axes


def _finish(figure: Figure, palette: Palette) -> None:
    """Text in ink, and not read as mathematics."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_color(palette.ink)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element.

    Text stays text. Ids are hashes that the name keeps apart from those of the page's other plots; the ids of
    groups, which every figure has alike, are left out.
    """
    from matplotlib import rc_context

    _finish(figure, PAGE)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(CODE + r"(\d)", r"var(--plot-\1)", svg)
    return f'<svg role="img" aria-label="{html.escape(name)}"{svg}'


def _thin(points: Points) -> Points:
    """At most `POINTS_PER_LINE` points, each the mean of its neighbours where there were more."""
    size = -(-len(points) // POINTS_PER_LINE) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
