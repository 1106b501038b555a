"""Settings of mining hard negatives."""

from __future__ import annotations

from pydantic import Field, model_validator

from f2llm_ray.base.section import Content, Output, Section


class Mine(Section):
    """Hard-negative mining within each retrieval source; the defaults are the paper's predecessor's."""

    model: Content[str]
    """A model of the run, such as "untrained", or a model folder. The stages after it, or all of them, train on
    the negatives that it found."""
    sources: Output[tuple[str, ...] | None] = None
    """Names of the retrieval sources that are mined; all when unset."""
    count: Output[int] = Field(default=24, ge=1)
    """Negatives per row, those that the source brought included."""
    top_k: Output[int] = Field(default=100, ge=1)
    """Nearest passages that are looked at, positives not counted."""
    rescore: Content[str | None] = None
    """Another model that scores these again, before any is left out: a cross-encoder (a folder, or OWNER/NAME on
    the hub, of a ...ForSequenceClassification model with one label), or another embedding model, one of the run, a
    folder or on the hub. `skip`, `max_score` and the margins then go by its scores: for a cross-encoder the
    sigmoid of what it says, from 0 to 1, for an embedding model the cosine."""
    skip: Output[int] = Field(default=5, ge=0)
    """The nearest of them that are left out, being likely positives that nobody marked."""
    max_score: Output[float] = Field(default=0.8, gt=0, le=1)
    """Largest cosine to the query, or score of `rescore`."""
    relative_margin: Output[float | None] = Field(default=0.05, ge=0, le=1)
    """Least distance of the cosine, or of the score of `rescore`, below the positive's, as a share of it: 0.05
    leaves out what is above 95 %."""
    absolute_margin: Output[float | None] = Field(default=None, ge=0, le=2)
    """Least distance of the cosine, or of the score of `rescore`, below the positive's."""

    @model_validator(mode="after")
    def _leaves_some(self) -> Mine:
        if self.skip >= self.top_k:
            raise ValueError(f"skip ({self.skip}) leaves nothing of top_k ({self.top_k})")
        if self.rescore is not None and self.rescore == self.model:
            raise ValueError(f"rescore: {self.rescore!r} is the model that mines; name another one")
        return self
