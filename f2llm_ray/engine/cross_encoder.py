"""A cross-encoder: a model that reads a query and a passage together, and scores how well they fit.

Shapes: n pairs, b of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.checkpoint import INFO_FILE, load_whole
from f2llm_ray.model.described import CONFIG_FILE, MODULES_FILE
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["cross_encoder", "embedding"]
CROSS_ENCODER: Kind = "cross_encoder"
EMBEDDING: Kind = "embedding"
HEAD = "ForSequenceClassification"
"""What the class of a model ends in that gives a text, or a pair of them, scores instead of a vector."""
TOKENIZER = "tokenizer.json"
PAIRS_AT_ONCE = 8192
"""Pairs whose tokens are in memory together."""
GPU_PASS = 32_768
"""Most tokens of a pass on a GPU, padding included."""


def is_cross_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with scores instead of vectors."""
    return any(str(name).endswith(HEAD) for name in config.get("architectures") or ())


def check_cross_encoder(config: Mapping[str, Any], place: str) -> None:
    """Raises RunError where a model scores a pair by other than one number; `place` is its config.json."""
    labels = (
        len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    )  # transformers' default
    if labels != 1:
        raise RunError(f"{place}: found {labels} labels, expected 1, the score of a pair (a cross-encoder)")


def kind_of(folder: Folder) -> Kind:
    """What kind of model a folder holds; no weights are read.

    Raises:
        RunError: neither an embedding model nor a cross-encoder of one label.
    """
    config = folder.read_json(CONFIG_FILE) if folder.exists(CONFIG_FILE) else {}
    if is_cross_encoder(config):
        check_cross_encoder(config, f"{folder.uri}/{CONFIG_FILE}")
        return CROSS_ENCODER
    if not any(folder.exists(name) for name in (INFO_FILE, MODULES_FILE)):
        found = ", ".join(config.get("architectures") or ()) or "none"
        raise RunError(
            f"{folder.uri}: found architecture {found}, expected a cross-encoder ({CONFIG_FILE} with "
            f"...ForSequenceClassification) or an embedding model ({INFO_FILE} or {MODULES_FILE})"
        )
    return EMBEDDING


def load_pair_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a cross-encoder.

    Raises:
        RunError: it is not there, cannot pad, or is of another model than the folder's.
    """
    from transformers import AutoTokenizer

    if not (folder / TOKENIZER).is_file():  # else an empty one would be made
        raise RunError(f"{folder}/{TOKENIZER}: no such file; expected the tokenizer of the cross-encoder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}/{TOKENIZER}: cannot be loaded: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        raise RunError(f"{folder}: its tokenizer names no pad_token, expected one")
    has, size = len(tokenizer), Folder.at(str(folder)).read_json(CONFIG_FILE).get("vocab_size")
    if isinstance(size, int) and has > size:
        raise RunError(
            f"{folder}/{TOKENIZER}: has {has} entries, the model beside it {size}; expected that model's tokenizer"
        )
    return tokenizer


class CrossEncoder:
    """A cross-encoder in float32, on the GPU where there is one.

    Raises:
        RunError: the folder holds no cross-encoder with its tokenizer and safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        from f2llm_ray.engine.torch_forward import CPU_PASS

        check_cross_encoder(Folder.at(str(folder)).read_json(CONFIG_FILE), f"{folder}/{CONFIG_FILE}")
        self.folder, self.tokenizer = folder, load_pair_tokenizer(folder)
        try:
            model = load_whole(AutoModelForSequenceClassification, folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise RunError(f"{folder}: cannot be loaded as a model: {str(error).splitlines()[0]}") from None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device).eval()
        self.tokens_per_pass = GPU_PASS if self.device == "cuda" else CPU_PASS
        self.max_tokens = _longest(self.tokenizer, model.config)

    def score(self, queries: Sequence[str], passages: Sequence[str]) -> Vectors:
        """Scores [n] from 0 to 1 of pairs, in their order: the sigmoid of what the model says.

        A pair that is too long loses tokens of the longer of its texts.

        Raises:
            RunError: a score that is not a number.
        """
        parts = [
            self._logits(list(queries[at : at + PAIRS_AT_ONCE]), list(passages[at : at + PAIRS_AT_ONCE]))
            for at in range(0, len(queries), PAIRS_AT_ONCE)
        ]
        logit_n = np.concatenate([np.zeros(0), *parts])
        broken = int(np.isnan(logit_n).sum())
        if broken:
            raise RunError(
                f"{self.folder}: gives scores that are not numbers for {broken} of {len(logit_n)} pairs"
            )
        with np.errstate(over="ignore"):  # exp(1000) is infinite, and the score 0
            return (1 / (1 + np.exp(-logit_n))).astype(np.float32)

    def _logits(self, queries: list[str], passages: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
        import torch

        from f2llm_ray.engine.encode import plan_passes

        tokens = self.tokenizer(queries, passages, truncation="longest_first", max_length=self.max_tokens)
        logit_n = np.empty(len(queries))
        for places in plan_passes([len(ids) for ids in tokens["input_ids"]], self.tokens_per_pass):
            some = {name: [values[place] for place in places] for name, values in tokens.items()}
            inputs = self.tokenizer.pad(some, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                logit_n[places] = self.model(**inputs).logits[:, 0].double().cpu().numpy()
        return logit_n


def _longest(tokenizer: PreTrainedTokenizerBase, config: Any) -> int | None:
    """Tokens of the longest pair; None where neither tokenizer nor model bounds them."""
    from f2llm_ray.model.families import family_of

    said = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < 1e9 else []  # a huge one means unset
    try:
        has = family_of(config, "").max_tokens(config)
    except RunError:  # of a family that the engine does not embed with
        has = getattr(config, "max_position_embeddings", None)
    return min([*said, *([] if has is None else [int(has)])], default=None)
