"""What a replica refuses, and why: pure checks of a request against the limits and the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from f2llm_ray.data.schema import query_text
from f2llm_ray.data.tokens.store import cut
from f2llm_ray.engine.vector_types import EmbeddingType
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, ModelInfo
from f2llm_ray.serve.api import ApiError
from f2llm_ray.serve.settings import Serving

if TYPE_CHECKING:
    from f2llm_ray.data.tokens.store import Tokens

RETRY_AFTER_S = 1
"""A full queue of short texts is empty again within a second or so."""


class RequestSlots:
    """As many requests at a time as are allowed."""

    def __init__(self, limits: Serving) -> None:
        self.limits = limits
        self.taken = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds a place for one request, from before its body is read until it is answered.

        Raises:
            ApiError: 429 when all slots are taken.
        """
        if self.taken >= self.limits.max_queued:
            message = f"{self.taken} requests are waiting here, the most allowed; try again in {RETRY_AFTER_S} s"
            raise ApiError(429, "overloaded", message, retry_after=RETRY_AFTER_S)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


def check_body(size: int, limits: Serving) -> None:
    """413 for a body above the limit; called before all of it is read."""
    if size > limits.max_body_bytes:
        raise ApiError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")


def check_model(name: str, served: Sequence[str]) -> None:
    """404 for a model that is not served here."""
    if name not in served:
        message = f"model {name!r} is not served here; served: {', '.join(served)}"
        raise ApiError(404, "model_not_found", message, param="model")


def check_dimensions(dimensions: int | None, info: ModelInfo) -> int:
    """The dim to answer with; 422 for one the model was not trained for."""
    if dimensions is None:
        return info.dims[-1]
    if dimensions not in info.dims:
        allowed = ", ".join(map(str, info.dims))
        message = f"dimensions: {info.name} was not trained for {dimensions}; allowed: {allowed}"
        raise ApiError(422, "invalid_dimensions", message, param="dimensions")
    return dimensions


def check_types(types: Sequence[EmbeddingType] | None, known: Sequence[EmbeddingType]) -> list[EmbeddingType]:
    """The forms to answer with, each once; 422 for none, or for one that the model has no ranges for."""
    if types is None:
        return ["float"]
    if not types:
        message = f"embedding_types: it is empty; allowed: {', '.join(known)}"
        raise ApiError(422, "invalid_value", message, param="embedding_types")
    unknown = next((kind for kind in types if kind not in known), None)
    if unknown is not None:
        message = (
            f"embedding_types: this model has no stored ranges for {unknown} ({CALIBRATION_FILE} in its folder, "
            f"which the pipeline writes); allowed: {', '.join(known)}"
        )
        raise ApiError(422, "not_calibrated", message, param="embedding_types")
    return list(dict.fromkeys(types))


def check_prompt(prompt_name: str | None, instruction: str | None, info: ModelInfo) -> str:
    """The text to put before each input; 422 where the model has no such prompt or takes no instructions."""
    if instruction is not None and prompt_name is not None:
        message = "instruction: give either prompt_name or instruction, not both"
        raise ApiError(422, "invalid_prompt", message, param="instruction")
    if instruction is not None:
        if not info.instructions:
            message = f"instruction: {info.name} was trained without instructions"
            raise ApiError(422, "invalid_prompt", message, param="instruction")
        return query_text("", instruction)
    if prompt_name is None:
        return ""
    if prompt_name not in info.prompts:
        message = f"prompt_name: {info.name} has no prompt {prompt_name!r}; it has: {', '.join(info.prompts)}"
        raise ApiError(422, "invalid_prompt", message, param="prompt_name")
    return info.prompts[prompt_name]


def check_inputs(inputs: Sequence[str] | Sequence[Sequence[int]], limits: Serving, param: str) -> None:
    """413 for too many inputs, 422 for none or an empty one."""
    if len(inputs) > limits.max_inputs:
        message = f"{param}: {len(inputs)} inputs, at most {limits.max_inputs} are allowed"
        raise ApiError(413, "too_many_inputs", message, param=param)
    empty = next((i for i, value in enumerate(inputs) if not value), None)
    if not inputs or empty is not None:
        message = f"{param}: it is empty" if not inputs else f"{param}[{empty}]: it is empty"
        raise ApiError(422, "empty_input", message, param=param)


def check_ids(inputs: Sequence[Sequence[int]], *, vocabulary: int, eos: int, param: str) -> list[Tokens]:
    """Token lists with EOS last, whether or not it was given; 422 for an id that the model does not have."""
    for i, ids in enumerate(inputs):
        if min(ids) < 0 or max(ids) >= vocabulary:
            bad = min(ids) if min(ids) < 0 else max(ids)
            message = f"{param}[{i}]: token id {bad} is not in 0..{vocabulary - 1}"
            raise ApiError(422, "invalid_token", message, param=param)
    return [np.array(ids if ids[-1] == eos else [*ids, eos], dtype=np.uint32) for ids in inputs]


def longest_text(info: ModelInfo, limits: Serving) -> int:
    """Most tokens of a text: neither more than the endpoint allows nor than the model has seen."""
    return min(info.max_tokens, limits.max_tokens)


def check_lengths(tokens: list[Tokens], *, max_tokens: int, truncate: bool, param: str) -> list[Tokens]:
    """The token lists, cut where that was asked for; 422 for one that is too long otherwise."""
    if truncate:
        return [cut(ids, max_tokens) for ids in tokens]
    for i, ids in enumerate(tokens):
        if len(ids) > max_tokens:
            message = f"{param}[{i}]: {len(ids)} tokens, at most {max_tokens} are allowed; truncate: true cuts it"
            raise ApiError(422, "too_many_tokens", message, param=param)
    return tokens
