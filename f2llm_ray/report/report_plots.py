"""The plots of a run's report; what was not measured is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from f2llm_ray.report.plots import Plot, bar_plot, line_plot
from f2llm_ray.report.read_scores import (
    BITS,
    ModelEntry,
    RunReport,
    by_dim,
    main_metric,
    megabytes,
    served_of,
    sets_of,
)

LANGUAGES_PLOTTED = 40


@dataclass(frozen=True)
class Plots:
    """What a report draws."""

    matryoshka: list[tuple[str, Plot | None]]
    """The main metric by dim, a line per model, for each set."""
    types: list[tuple[str, Plot]]
    """The main metric of the served model by the size of its vectors, a line per type, for each set with it."""
    languages: Plot | None
    """Training rows of the largest languages."""
    losses: list[tuple[str, Plot]]
    """By stage of training."""
    scores: list[tuple[str, Plot]]
    """On held-out rows and of checkpoints, by stage of training."""

    def all(self) -> list[Plot]:
        """All of them."""
        found = [plot for _, plot in (*self.matryoshka, *self.types, *self.losses, *self.scores)]
        return [plot for plot in (*found, self.languages) if plot is not None]


def plots_of(report: RunReport) -> Plots:
    """The plots of a report, which may lack any part."""
    models, served = list(report.get("models") or []), served_of(report)
    return Plots(
        [(name, _matryoshka(models, name)) for name in sets_of(models)],
        [] if served is None else _types(served),
        _languages(report.get("languages") or {}),
        _losses(report),
        _scores(report),
    )


def _matryoshka(models: Sequence[ModelEntry], name: str) -> Plot | None:
    main = main_metric(models, name)
    lines = {}
    for model in models:
        points = [(dim, scores.get(main)) for dim, scores in by_dim(model, name).items()]
        lines[str(model.get("name"))] = [(float(dim), value) for dim, value in points if value is not None]
    ticks = sorted({dim for points in lines.values() for dim, _ in points})
    title = f"{main} by dim on {name}"
    return line_plot(title, lines, x="dim", y=main, markers=True, ticks=ticks) if ticks else None


def _types(model: ModelEntry) -> list[tuple[str, Plot]]:
    plots = []
    for name, found in (model.get("types") or {}).items():
        lines = {
            kind: [
                (float(megabytes(int(dim), kind)), scores[kind]) for dim, scores in found.items() if kind in scores
            ]
            for kind in BITS
        }
        sizes = [size for points in lines.values() for size, _ in points]
        ticks = [4**n for n in range(12) if min(sizes) <= 4**n <= max(sizes)]
        main = main_metric([model], name)
        title = f"{main} by size on {name}"
        plots.append(
            (name, line_plot(title, lines, x="MB per million vectors", y=main, markers=True, ticks=ticks))
        )
    return plots


def _languages(languages: Mapping[str, int]) -> Plot | None:
    largest = sorted(languages.items(), key=lambda item: (-item[1], item[0]))[:LANGUAGES_PLOTTED]
    return bar_plot("training rows by language", largest) if largest else None


def _losses(report: RunReport) -> list[tuple[str, Plot]]:
    plots = []
    for stage, facts in (report.get("training") or {}).items():
        by_dim = sorted((key for key in facts if key.startswith("loss_at_")), key=lambda key: -int(key[8:]))
        kinds = {"training": "loss", "validation": "validation", **{f"{key[8:]} dims": key for key in by_dim[-3:]}}
        lines = {
            kind: [(step, loss) for step, loss in facts.get(key) or [] if loss is not None]
            for kind, key in kinds.items()
        }
        if any(lines.values()):
            plots.append((stage, line_plot(f"loss of {stage}", lines, x="step", y="loss", markers=False)))
    return plots


def _scores(report: RunReport) -> list[tuple[str, Plot]]:
    """ndcg@10 on held-out rows while a stage trained, and the scores of its checkpoints on the sets."""
    plots = []
    for stage, facts in (report.get("training") or {}).items():
        held_out = [(step, score) for step, score in facts.get("score") or [] if score is not None]
        measured = facts.get("checkpoint_scores") or {}
        lines = {"held-out ndcg@10": held_out}
        lines |= {name: [(step, score) for step, score in curve] for name, curve in measured.items()}
        if any(lines.values()):
            plots.append((stage, line_plot(f"score of {stage}", lines, x="step", y="score", markers=True)))
    return plots
