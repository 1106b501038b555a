"""Input embeddings of a random model taken from another model, cut to the hidden size by their main directions.

What tokens mean to each other is in a table of embeddings before any layer: a small model that starts from it
learns the rest in a fraction of the steps. The cut is the singular value decomposition's, which keeps the table's
dot products as well as so many dims can (Eckart and Young 1936).
Shapes: v entries, D dims of the other model's table, d hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.tokenizer import TOKENIZER, differences
from f2llm_ray.model.checkpoint import load_backbone
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TEXT_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
"""Parts of a tokenizer.json that number and cut tokens; a template after them makes no other tokens."""


def take_embeddings(backbone: PreTrainedModel, path: str, tokenizer: Folder) -> None:
    """Puts another model's input embeddings into a random one, as many dims as it has.

    Args:
        backbone: the random model, whose entries are those of the tokenizer.
        path: folder of the other model.
        tokenizer: folder of the run's tokenizer.

    Raises:
        RunError: the other model has another tokenizer, fewer dims or fewer entries.
    """
    import torch

    place = f"backbone.embeddings_from: {path}"
    other = [part for part in differences(tokenizer, Folder.at(path)) if part in TEXT_PARTS]
    if other:
        raise RunError(
            f"{place}/{TOKENIZER}: not the run's tokenizer, from which it differs in {', '.join(other)}"
        )
    theirs_vD = load_backbone(Path(path)).get_input_embeddings().weight.detach()
    table = backbone.get_input_embeddings().weight
    if theirs_vD.shape[0] < table.shape[0] or theirs_vD.shape[1] < table.shape[1]:
        raise RunError(
            f"{place}: found embeddings of {list(theirs_vD.shape)}, expected at least {list(table.shape)}, the "
            "tokenizer's entries and backbone.shape.hidden"
        )
    with torch.no_grad():
        table.copy_(main_dims(theirs_vD[: len(table)], table.shape[1]))


def main_dims(table_vD: torch.Tensor, dims: int) -> torch.Tensor:
    """A table of embeddings [v, dims] along its main directions, at a mean square of 1.

    At that size what a token means is not lost beside what the random layers add to it.
    """
    import torch

    # Of a table in float64, D by D: the same directions on any machine, but for their signs, which are set below.
    gram_DD = sum((part.double().T @ part.double() for part in table_vD.split(65_536)), torch.zeros(()))
    _, directions_DD = torch.linalg.eigh(gram_DD)  # the largest last
    cut_vd = table_vD.double() @ signed(directions_DD.flip(1)[:, :dims])
    return (cut_vd / cut_vd.square().mean().sqrt()).to(table_vD.dtype)


def signed(directions: torch.Tensor) -> torch.Tensor:
    """Directions, one a column, each with the sign that makes its largest entry positive, as on any machine."""
    return directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
