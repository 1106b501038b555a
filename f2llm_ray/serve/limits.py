"""The checks of a request against the limits and the model; each raises an `ApiError`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from f2llm_ray.data.schema import query_text
from f2llm_ray.data.tokens.store import cut
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, ModelInfo
from f2llm_ray.model.dims import EmbeddingType
from f2llm_ray.serve.api import ApiError
from f2llm_ray.serve.settings import Serving

if TYPE_CHECKING:
    from f2llm_ray.data.tokens.store import Tokens

RETRY_AFTER_S = 1
"""A full queue of short texts is empty again within a second or so."""


class RequestSlots:
    """Bounds the number of requests that wait or run at a time."""

    def __init__(self, limits: Serving) -> None:
        self.limits = limits
        self.taken = 0

    def check(self) -> None:
        """Raises ApiError 429 when all slots are taken."""
        if self.taken >= self.limits.max_queued:
            message = f"{self.taken} requests are waiting here, the most allowed; try again in {RETRY_AFTER_S} s"
            raise ApiError(429, "overloaded", message, retry_after=RETRY_AFTER_S)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds a slot for one request, from when its body is there until it is answered.

        Raises:
            ApiError: 429 when all slots are taken.
        """
        self.check()
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


def check_body(size: int, limits: Serving) -> None:
    """Raises 413 for a body above the limit; called before all of it is read."""
    if size > limits.max_body_bytes:
        raise ApiError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")


def check_model(name: str, served: Sequence[str]) -> None:
    """Raises 404 for a model that is not served here."""
    if name not in served:
        message = f"model {name!r} is not served here; served: {', '.join(served)}"
        raise ApiError(404, "model_not_found", message, param="model")


def check_dimensions(dimensions: int | None, info: ModelInfo) -> int:
    """The dim to answer with; raises 422 for one that the model was not trained for."""
    if dimensions is None or dimensions in info.dims:
        return dimensions or info.dims[-1]
    problem = f"{info.name} was not trained for {dimensions}; allowed: {', '.join(map(str, info.dims))}"
    raise _wrong("dimensions", "invalid_dimensions", problem)


def check_types(types: Sequence[EmbeddingType] | None, known: Sequence[EmbeddingType]) -> list[EmbeddingType]:
    """The vector types to answer with, each once; raises 422 for none, or for one that the model cannot make."""
    if types is None:
        return ["float"]
    if not types:
        raise _wrong("embedding_types", "invalid_value", f"it is empty; allowed: {', '.join(known)}")
    for kind in types:
        if kind not in known:
            problem = f"this model has no stored ranges for {kind} ({CALIBRATION_FILE} in its folder, which the "
            problem += f"pipeline writes); allowed: {', '.join(known)}"
            raise _wrong("embedding_types", "not_calibrated", problem)
    return list(dict.fromkeys(types))


def check_prompt(prompt_name: str | None, instruction: str | None, info: ModelInfo) -> str:
    """The text to put before each input; raises 422 for a prompt or instruction that the model does not take."""
    if instruction is not None:
        if prompt_name is not None:
            raise _wrong("instruction", "invalid_prompt", "give either prompt_name or instruction, not both")
        if not info.instructions:
            raise _wrong("instruction", "invalid_prompt", f"{info.name} was trained without instructions")
        return query_text("", instruction)
    if prompt_name is not None and prompt_name not in info.prompts:
        problem = f"{info.name} has no prompt {prompt_name!r}; it has: {', '.join(info.prompts)}"
        raise _wrong("prompt_name", "invalid_prompt", problem)
    return "" if prompt_name is None else info.prompts[prompt_name]


def check_prompted(prompt: str, inputs: int, limits: Serving) -> None:
    """Raises 413 where a prompt before each input would make more text than a body may have."""
    if len(prompt) * inputs > limits.max_body_bytes:
        problem = f"{len(prompt):,} characters before each of {inputs} inputs"
        problem += f" are more than {limits.max_body_bytes:,} together"
        raise _wrong("instruction", "too_much_text", problem, status=413)


def check_inputs(inputs: Sequence[str] | Sequence[Sequence[int]], limits: Serving, param: str) -> None:
    """Raises 413 for too many inputs, 422 for none or an empty one."""
    if len(inputs) > limits.max_inputs:
        problem = f"{len(inputs)} inputs, at most {limits.max_inputs} are allowed"
        raise _wrong(param, "too_many_inputs", problem, status=413)
    if not inputs:
        raise _wrong(param, "empty_input", "it is empty")
    for i, value in enumerate(inputs):
        if not value:
            raise _wrong(f"{param}[{i}]", "empty_input", "it is empty")


def check_ids(
    inputs: Sequence[Sequence[int]], *, vocabulary: int, prefix: list[int], eos: int, param: str
) -> list[Tokens]:
    """Token lists with the template's prefix first and EOS last, given or not; raises 422 for an unknown id."""
    for i, ids in enumerate(inputs):
        for bad in (min(ids), max(ids)):
            if not 0 <= bad < vocabulary:
                raise _wrong(f"{param}[{i}]", "invalid_token", f"token id {bad} is not in 0..{vocabulary - 1}")
    started = (ids if list(ids[: len(prefix)]) == prefix else [*prefix, *ids] for ids in inputs)
    return [np.array(ids if ids[-1] == eos else [*ids, eos], dtype=np.uint32) for ids in started]


def longest_text(info: ModelInfo, limits: Serving) -> int:
    """Most tokens of a text: no more than the endpoint allows, and no more than the model was trained on."""
    return min(info.max_tokens, limits.max_tokens)


def check_lengths(tokens: list[Tokens], *, max_tokens: int, truncate: bool, param: str) -> list[Tokens]:
    """The token lists, each cut to the limit with `truncate`; without it, raises 422 for one that is too long."""
    if truncate:
        return [cut(ids, max_tokens) for ids in tokens]
    for i, ids in enumerate(tokens):
        if len(ids) > max_tokens:
            problem = f"{len(ids)} tokens, at most {max_tokens} are allowed; truncate: true cuts it"
            raise _wrong(f"{param}[{i}]", "too_many_tokens", problem)
    return tokens


def _wrong(field: str, code: str, problem: str, status: int = 422) -> ApiError:
    """The error for a field of a request, or for one of its items, such as `input[3]`."""
    return ApiError(status, code, f"{field}: {problem}", param=field.partition("[")[0])
