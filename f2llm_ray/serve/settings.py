"""Settings of serving."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from f2llm_ray.base.section import Neutral, Section
from f2llm_ray.engine.names import EngineName

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\sA-Z]+|null")
"""What a browser sends as the origin of a page; "null" for a file."""
LongText = Literal["refuse", "truncate", "chunk"]
"""What is done with a text of too many tokens: 422, its first tokens alone, or the mean of its parts' vectors."""


class Limits(Section):
    """Limits of requests and batches, and what computes the vectors."""

    max_inputs: Neutral[int] = Field(default=2048, ge=1)
    """Texts per request."""
    max_tokens: Neutral[int] = Field(default=8192, ge=2)
    """Tokens per text, EOS included."""
    max_body_bytes: Neutral[int] = Field(default=10_000_000, ge=1024)
    """Bytes of a request's body."""
    max_queued: Neutral[int] = Field(default=512, ge=1)
    """Requests waiting or running per replica; beyond it the answer is 429."""
    batch_tokens: Neutral[int] = Field(default=16_384, ge=64)
    """Most tokens of one forward pass."""
    long_text: Neutral[LongText] = "refuse"
    """For texts of more than `max_tokens`, where a request does not say."""
    token_ids: Neutral[bool] = True
    """Whether inputs may be token ids; some clients send those of another model's tokenizer unless told not to."""
    engine: Neutral[EngineName] = "auto"
    """What computes the vectors that are served, or written by `f2llm embed`. `torch`; `onnx` or `openvino`, on
    CPU; or `auto`: torch on a GPU, and on a CPU the fastest installed one that gives torch's vectors there."""


class Serving(Limits):
    """Which model of a run is served, and the limits of its endpoint; GET /info shows them all."""

    model: Neutral[str | None] = None
    """The model that is served; the last one of the run when unset."""


class Access(Section):
    """Who may send requests, and what is logged about them; not part of a recipe, and not shown by /info."""

    keys: str | None = None
    """File of hashed API keys (`python -m f2llm_ray.serve.keys`); no key is needed when unset."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may send requests from a browser, such as https://example.org; "*" for all."""
    access_log: bool = False
    """One JSON line per request on the replica's stdout, without texts or keys."""

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and ORIGIN.fullmatch(origin) is None:
                expected = "scheme and host in small letters without a path, such as https://example.org"
                raise ValueError(f"found {origin!r}, which no browser sends, expected {expected}")
        return origins
