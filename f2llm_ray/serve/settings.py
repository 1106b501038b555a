"""Settings of serving."""

from __future__ import annotations

from pydantic import Field

from f2llm_ray.base.section import Neutral, Section


class Serving(Section):
    """Limits of the endpoint; every one is shown by /info."""

    model: Neutral[str | None] = None
    """The stage that is served; the last one of the run when unset."""
    max_inputs: Neutral[int] = Field(default=2048, ge=1)
    """Texts per request."""
    max_tokens: Neutral[int] = Field(default=8192, ge=2)
    """Tokens per text, EOS included."""
    max_body_bytes: Neutral[int] = Field(default=10_000_000, ge=1024)
    max_queued: Neutral[int] = Field(default=512, ge=1)
    """Requests waiting or running per replica; beyond it the answer is 429."""
    batch_tokens: Neutral[int] = Field(default=16_384, ge=64)
    """Token budget of one forward pass."""


class Access(Section):
    """Who may ask, and what is written down about it; not part of a recipe, and not shown by /info."""

    keys: str | None = None
    """File of hashed API keys (`python -m f2llm_ray.serve.keys`); anyone may ask when unset."""
    access_log: bool = False
    """One JSON line per request on the replica's stdout, without texts or keys."""
