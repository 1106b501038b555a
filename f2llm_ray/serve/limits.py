"""The checks of a request against the limits and the model; each raises an `ApiError`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from f2llm_ray.data.schema import query_text
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, ModelInfo
from f2llm_ray.model.dims import EmbeddingType
from f2llm_ray.serve.api import NAME_CHARS, ApiError
from f2llm_ray.serve.settings import LongText, Serving

if TYPE_CHECKING:
    from f2llm_ray.data.tokens.store import Tokens

RETRY_AFTER_S = 1
"""A full queue of short texts is empty again within a second or so."""
HELD_BODIES = 8
"""Bodies of the largest size whose bytes may wait together; the number of requests alone would allow gigabytes."""


class RequestSlots:
    """Bounds the requests that wait or run at a time, by their number and by the bytes of their bodies."""

    def __init__(self, limits: Serving) -> None:
        self.limits = limits
        self.taken = self.bytes = 0

    def check(self, size: int = 0) -> None:
        """Raises ApiError 429 when all slots are taken, or a body of this size is too much beside the others."""
        full = self.taken >= self.limits.max_queued
        if full or (self.taken and self.bytes + size > HELD_BODIES * self.limits.max_body_bytes):
            message = (
                f"{self.taken} requests with {self.bytes:,} bytes are waiting here; try again in {RETRY_AFTER_S} s"
            )
            raise ApiError(429, "overloaded", message, retry_after=RETRY_AFTER_S)

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Holds a slot for one request with a body of this size, from when that is there until it is answered.

        Raises:
            ApiError: 429 when all slots are taken.
        """
        self.check(size)
        self.taken, self.bytes = self.taken + 1, self.bytes + size
        try:
            yield
        finally:
            self.taken, self.bytes = self.taken - 1, self.bytes - size


def check_body(size: int, limits: Serving) -> None:
    """Raises 413 for a body above the limit; called before all of it is read."""
    if size > limits.max_body_bytes:
        raise ApiError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")


def check_model(name: str, served: Sequence[str]) -> None:
    """Raises 404 for a model that is not served here."""
    if name not in served:
        message = f"model {name[:NAME_CHARS]!r} is not served here; served: {', '.join(served)}"
        raise ApiError(404, "model_not_found", message, param="model")


def check_dimensions(dimensions: int | None, info: ModelInfo, param: str = "dimensions") -> int:
    """The dim to answer with; raises 422 for one that the model was not trained for."""
    if dimensions is None or dimensions in info.dims:
        return dimensions or info.dims[-1]
    problem = f"{info.name} was not trained for {dimensions}; allowed: {', '.join(map(str, info.dims))}"
    raise _wrong(param, "invalid_dimensions", problem)


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


def check_long_text(truncate: bool | None, long_text: LongText | None, limits: Serving) -> LongText:
    """What is done with a text that is too long; raises 422 where `truncate` and `long_text` disagree."""
    said: LongText | None = None if truncate is None else "truncate" if truncate else "refuse"
    if said is not None and long_text not in (None, said):
        problem = f"truncate: {str(truncate).lower()} and long_text: {long_text} contradict each other; give one"
        raise _wrong("long_text", "invalid_value", problem)
    return long_text or said or limits.long_text


def check_ids(
    inputs: Sequence[Sequence[int]],
    limits: Serving,
    *,
    vocabulary: int,
    prefix: list[int],
    eos: int,
    param: str,
) -> list[Tokens]:
    """Token lists with the template's prefix first and EOS last, given or not; raises 422 for an unknown id.

    It raises 422 for all of them where this endpoint takes texts alone.
    """
    if not limits.token_ids:
        problem = (
            "token ids are not taken here, since those of another model's tokenizer would give wrong vectors in "
        )
        problem += "silence; send texts (LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False)"
        raise _wrong(param, "token_ids_refused", problem)
    for i, ids in enumerate(inputs):
        for bad in (min(ids), max(ids)):
            if not 0 <= bad < vocabulary:
                raise _wrong(f"{param}[{i}]", "invalid_token", f"token id {bad} is not in 0..{vocabulary - 1}")
    started = (ids if list(ids[: len(prefix)]) == prefix else [*prefix, *ids] for ids in inputs)
    return [np.array(ids if ids[-1] == eos else [*ids, eos], dtype=np.uint32) for ids in started]


def longest_text(info: ModelInfo, limits: Serving) -> int:
    """Most tokens of a text: no more than the endpoint allows, and no more than the model was trained on."""
    return min(info.max_tokens, limits.max_tokens)


def check_lengths(tokens: Sequence[Tokens], *, max_tokens: int, param: str) -> None:
    """Raises 422 for a token list that is too long; it says what the route of this field has for that."""
    remedy = "truncate cuts it"
    if param in {"input", "inputs"}:
        remedy = f"long_text: {remedy}, and chunk takes the mean of its parts"
    for i, ids in enumerate(tokens):
        if len(ids) > max_tokens:
            problem = f"more than {max_tokens} tokens, the most of a text; {remedy}"
            raise _wrong(f"{param}[{i}]", "too_many_tokens", problem)


def check_instruction(prompt: Tokens, *, max_tokens: int, long_text: LongText) -> None:
    """Raises 422 for an instruction or prompt that leaves no room for a text."""
    if len(prompt) >= max_tokens:
        problem = f"more than {max_tokens - 1} tokens, and a text has {max_tokens} at most, these included"
        raise _wrong("instruction", "too_many_tokens", problem)
    if long_text == "chunk" and 2 * len(prompt) > max_tokens:
        problem = f"{len(prompt)} tokens before each part of a text; with long_text: chunk they may be "
        problem += f"{max_tokens // 2} at most, half of a part"
        raise _wrong("instruction", "too_many_tokens", problem)


def _wrong(field: str, code: str, problem: str, status: int = 422) -> ApiError:
    """The error for a field of a request, or for one of its items, such as `input[3]`."""
    return ApiError(status, code, f"{field}: {problem}", param=field.partition("[")[0])
