"""Scores of a parent model as files, measured over Ray workers where there is much to run.

The calibration text is cut into pieces whatever the number of workers, and their float64 sums are added in order:
the scores do not depend on how many workers measured them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.flow import Item, each_on_actors, start_actors
from f2llm_ray.model.checkpoint import load_backbone, load_info
from f2llm_ray.model.prune import Importance
from f2llm_ray.run.folder import Folder
from f2llm_ray.shrink.importance import Sums, chance, magnitude, measure

if TYPE_CHECKING:
    from f2llm_ray.data.tokens.store import Tokens
    from f2llm_ray.engine.settings import Compute
    from f2llm_ray.model.settings import Prune

TENSORS, FACTS = "importance.safetensors", "importance.json"
TOKENS_PER_PIECE = 65_536
"""What an actor measures at a time, at least."""
TOKENS_PER_PASS = 4_096
"""The inputs of all layers are held for a pass: 0.5 GB for 28 layers of 1,024 channels."""


def pieces_of(calibration: Sequence[Tokens], tokens: int = TOKENS_PER_PIECE) -> list[list[Tokens]]:
    """Cuts texts, in their order, into pieces that hold this many tokens or just more; the last may hold fewer."""
    pieces: list[list[Tokens]] = [[]]
    held = 0
    for text in calibration:
        if held >= tokens:
            pieces.append([])
            held = 0
        pieces[-1].append(text)
        held += len(text)
    return pieces


def score(
    parent: Folder, calibration: Sequence[Tokens], settings: Prune, compute: Compute, *, seed: int
) -> Importance:
    """The scores of a parent's parts, of the kind that the settings name, on at least one calibration text.

    Raises:
        RunError: the parent's family cannot be pruned.
    """
    import ray

    if settings.importance == "activation":
        return _measured(parent, pieces_of(calibration), compute).importance()
    found: Importance = ray.get(ray.remote(num_cpus=1)(_of_weights).remote(parent, settings, seed))
    return found


def _of_weights(parent: Folder, settings: Prune, seed: int) -> Importance:
    with parent.as_local() as folder:
        backbone = load_backbone(folder)
    return magnitude(backbone) if settings.importance == "magnitude" else chance(backbone.config, seed)


def _measured(parent: Folder, pieces: list[list[Tokens]], compute: Compute) -> Sums:
    make = partial(PieceScorer, parent, compute.threads_per_worker)
    items = [{"piece": number, "tokens": piece} for number, piece in enumerate(pieces)]
    actors = start_actors(make, min(compute.workers, len(pieces)), **compute.per_worker)
    found = sorted(each_on_actors("importance", items, actors), key=lambda row: row["piece"])
    return reduce(add, [row["sums"] for row in found])


class PieceScorer:
    """One parent model that measures pieces of text, with so many torch threads on CPU."""

    def __init__(self, parent: Folder, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with parent.as_local() as folder:
            self.pooling = load_info(folder).pooling
            self.backbone = load_backbone(folder, dtype=dtype).to(device).eval()

    def __call__(self, item: Item) -> Item:
        """The sums of one piece."""
        sums = measure(self.backbone, item["tokens"], pooling=self.pooling, tokens_per_pass=TOKENS_PER_PASS)
        return {"piece": item["piece"], "sums": sums}


def save(importance: Importance, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the scores as safetensors, and facts about them beside it."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in asdict(importance).items()}, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Importance:
    """Reads scores.

    Raises:
        RunError: there are none, or they are broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Importance(**load_file(folder / TENSORS))
    except (OSError, SafetensorError, TypeError) as error:
        raise RunError(f"{folder / TENSORS}: not the scores of a model: {error}") from None


def summary(importance: Importance) -> dict[str, Any]:
    """The part of the scores that a report shows: each layer's, and how uneven the parts are."""

    def spread(scores: Any) -> list[float]:
        values = np.asarray(scores, dtype=np.float64)
        return [round(float(np.quantile(values, q) / values.mean()), 4) for q in (0.0, 0.1, 0.5, 0.9, 1.0)]

    return {
        "layers": [round(value, 6) for value in importance.layers_l.tolist()],
        "quantiles_over_mean": {
            "hidden": spread(importance.hidden_d),
            "ffn": spread(importance.ffn_lf),
            "kv_heads": spread(importance.kv_heads_lg),
        },
    }
