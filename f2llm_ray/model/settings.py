"""Settings of the models: the backbone that a run starts from, and what pruning keeps of a trained one."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from f2llm_ray.base.section import Batches, Content, Neutral, Output, Section
from f2llm_ray.model.families import Part, Pooling
from f2llm_ray.model.sizes import Shape

PARTS: tuple[Part, ...] = get_args(Part)
"""What pruning can cut."""


class Prompts(Section):
    """What every query and every passage starts with, such as "query: " and "passage: " of E5.

    The backbone's own where unset. A stage with instructions puts those before its queries instead.
    """

    query: Batches[str | None] = None
    """What queries start with."""
    document: Batches[str | None] = None
    """What passages start with."""


class Keep(Section):
    """What structured pruning keeps of a model; a part that is not named stays whole."""

    layers: Output[Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None] = None
    """So many of the most important ones, or those of these numbers, from 0. Where a distillation follows, evenly
    spread ones may recover better than the most important (docs/results.md)."""
    hidden: Output[int | None] = Field(default=None, ge=8)
    """Channels of the residual stream, which is the size of the vectors."""
    ffn: Output[int | None] = Field(default=None, ge=8)
    """Channels of each layer's FFN."""
    kv_heads: Output[int | None] = Field(default=None, ge=1)
    """Key-value heads of each layer; the query heads that share one go with it. Neither these nor `hidden` can be
    cut in BERT, XLM-RoBERTa and ModernBERT (`model/families.py` says why)."""
    vocabulary: Output[Literal["used"] | Annotated[int, Field(ge=1)] | None] = None
    """Tokens: those that the training texts use, or so many: the most used, then the tokenizer's first. Bytes or
    characters and special tokens stay. What unseen texts have beside these is spelt in smaller pieces."""
    importance: Output[Literal["activation", "magnitude", "random"]] = "activation"
    """What decides: what the parts do on training text, the size of their weights, or chance (to compare with)."""
    calibration_rows: Output[int] = Field(default=512, ge=1)
    """Training rows whose texts the scores are measured on, drawn over all sources and languages."""

    def count(self, part: Part) -> int | None:
        """How many of a part stay; None where all do, or the texts decide."""
        wanted = getattr(self, part)
        if isinstance(wanted, tuple):
            return len(wanted)
        return wanted if isinstance(wanted, int) else None

    @model_validator(mode="after")
    def _layers_rise(self) -> Keep:
        if isinstance(self.layers, tuple) and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(
                f"layers: found {list(self.layers)}, expected a count, or different numbers that rise"
            )
        return self

    @model_validator(mode="after")
    def _some(self) -> Keep:
        if all(getattr(self, part) is None for part in PARTS):
            raise ValueError(f"set at least one of {', '.join(PARTS)}")
        return self


PAIRS = "pairs"
"""In `embeddings_from`: the run's own training pairs."""


class Backbone(Section):
    """The model that training starts from: a checkpoint, or a random one of a given shape."""

    path: Content[str | None] = None
    """Hub name or local folder of a checkpoint, of a family in `model/families.py`: bare, of
    sentence-transformers, or a model folder of ours."""
    shape: Shape | None = None
    embeddings_from: Content[str | None] = None
    """Where a model of `shape` has its first input embeddings from, in place of random ones. `pairs`: the training
    rows, of which pairs each token stands in (latent semantic indexing); with pooling mean it finds by them before
    any training. Else the folder of a model, such as the teacher (./pairs is a folder): its embeddings, cut to the
    hidden size by their main directions; the run's tokenizer is then that model's (`tokenizer.path`)."""
    pooling: Output[Pooling | None] = None
    """How a vector comes of a text's tokens: the last one, their mean, or the first one ("cls"). The backbone's
    own where unset, else that of its family: last for decoders, mean for encoders."""
    max_tokens: Output[int | None] = Field(default=None, ge=8)
    """Tokens of the longest text that the run's models take, those of `data.max_tokens` when unset: a backbone
    still reads longer texts than it is trained on here."""
    keep: Neutral[Keep | None] = None
    """Prune it before any training, in the words of the section `prune`: the whole backbone is the model
    "untrained", what is kept of it the model "kept", from which the first step goes on; both are evaluated."""

    @model_validator(mode="after")
    def _one_of(self) -> Backbone:
        if (self.path is None) == (self.shape is None):
            raise ValueError("set exactly one of path and shape")
        if self.embeddings_from is not None and self.shape is None:
            raise ValueError("embeddings_from: a model of path has its own embeddings; expected shape beside it")
        return self


class Quantize(Section):
    """Int8 weights for small deployments on CPU: of each model named, one more, `<model>-int8`."""

    models: Neutral[tuple[str, ...]] = Field(min_length=1)
    """Names of the run's models that get one."""
    embeddings: Output[bool] = True
    """Input embeddings too: they are most of a small model."""


class Soup(Section):
    """One model of several, weight by weight (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""

    kind: Neutral[Literal["soup"]] = "soup"
    models: Content[tuple[str, ...]] = Field(min_length=2)
    """What is merged: models of the run, or model folders of other runs, all of one shape and tokenizer."""
    weights: Output[tuple[Annotated[float, Field(gt=0)], ...] | None] = None
    """Their shares; equal ones when unset."""
    method: Output[Literal["average", "slerp"]] = "average"
    """The mean of the weights, or a place on the arc between two."""

    @model_validator(mode="after")
    def _fits(self) -> Soup:
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(
                f"weights: found {len(self.weights)}, expected one for each of {len(self.models)} models"
            )
        if self.method == "slerp" and len(self.models) != 2:
            raise ValueError(f"slerp is between 2 models; found {len(self.models)}")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each model; together 1."""
        weights = self.weights or (1.0,) * len(self.models)
        return tuple(weight / sum(weights) for weight in weights)


class Prune(Keep):
    """Structured pruning of a model into a smaller stock one; a part that is not named stays whole."""

    kind: Neutral[Literal["prune"]] = "prune"
    model: Neutral[str | None] = None
    """The model to prune, such as a contrastive stage, or "untrained" for the backbone itself; the one before it
    when unset."""
