"""The exported model folder: one that AutoModel, SentenceTransformer and our engine load to the same vectors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.errors import RunError
from f2llm_ray.run import Folder

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

INFO_FILE = "f2llm.json"
CALIBRATION_FILE = "calibration.safetensors"
"""Ranges for int8 vectors and the vectors of the self-check (`serve.calibrate`)."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model folder says beyond its Hugging Face config."""

    name: str
    dims: tuple[int, ...]
    """The matryoshka dims it was trained for, smallest first; the last one is the hidden size."""
    max_tokens: int
    """Longest text it was trained on, EOS included."""
    prompts: dict[str, str]
    """Text put before a query, by prompt name; "query" is the default one, "" where queries have none."""
    instructions: bool
    """Whether it was trained with an instruction before queries (`schema.query_text`)."""


def matryoshka_dims(hidden: int, smallest: int = 8) -> tuple[int, ...]:
    """The trained dims: doublings of the smallest below the hidden size, and the hidden size (paper)."""
    dims = [smallest << i for i in range(hidden.bit_length()) if smallest << i < hidden]
    return (*dims, hidden)


def with_eos(tokenizer: Tokenizer, eos: str) -> Tokenizer:
    """The tokenizer with a post-processor that ends every text with EOS (after a BOS, where it had one)."""
    from tokenizers import Tokenizer as Tokenizers
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    ours = Tokenizers.from_str(tokenizer.to_str())
    ours.no_truncation()
    ours.no_padding()
    added, bare = ours.encode("a").tokens, ours.encode("a", add_special_tokens=False).tokens
    prefix = added[: added.index(bare[0])] if bare and bare[0] in added else []
    special = [(token, ours.token_to_id(token)) for token in dict.fromkeys([*prefix, eos])]
    template = TemplateProcessing(
        single=[*prefix, "$A", eos], pair=[*prefix, "$A", "$B:1", f"{eos}:1"], special_tokens=special
    )
    ours.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    return ours


def save_model(
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: Tokenizer,
    info: ModelInfo,
    *,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes config, safetensors, tokenizer, the sentence-transformers files and our own facts.

    Args:
        folder: a local folder, made when missing.
        backbone: the model; its config is written as a stock config.
        tokenizer: one made by `with_eos`.
        info: name, dims, lengths and prompts.
        state: weights to write in place of the backbone's own (gathered from ZeRO shards).
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar per file of a model that loads in a second only hides our own lines
    folder.mkdir(parents=True, exist_ok=True)
    backbone.save_pretrained(folder, state_dict=state)
    save_tokenizer(folder, tokenizer, info.max_tokens)
    files: dict[str, Any] = {
        INFO_FILE: asdict(info),
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": backbone.config.hidden_size,
            "pooling_mode_lasttoken": True,
            "pooling_mode_mean_tokens": False,
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": info.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {**info.prompts, "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Writes tokenizer.json and the config that makes AutoTokenizer load it."""
    from transformers import PreTrainedTokenizerFast

    eos = tokenizer.id_to_token(tokenizer.encode("").ids[-1])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=eos,
        model_max_length=max_tokens,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)


def load_info(folder: Path) -> ModelInfo:
    """The facts of a model folder.

    Raises:
        RunError: not a model folder of ours.
    """
    return read_info(Folder.at(str(folder)))


def read_info(folder: Folder) -> ModelInfo:
    """The facts of a model folder anywhere, without its weights.

    Raises:
        RunError: not a model folder of ours, or its facts are not those of a model.
    """
    if not folder.exists(INFO_FILE):
        raise RunError(f"{folder.uri}: not a model folder: it has no {INFO_FILE}")
    facts = folder.read_json(INFO_FILE)
    try:
        return ModelInfo(**{**facts, "dims": tuple(facts["dims"])})
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{folder.uri}/{INFO_FILE}: not the facts of a model: {error}") from None


def load_backbone(folder: Path | str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The decoder of a model folder (or any local Hugging Face checkpoint), in float32 unless told otherwise.

    Int8 weights stay int8, whatever the dtype (`model.int8`).

    Raises:
        RunError: no config or no safetensors weights there.
    """
    import torch
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    from f2llm_ray.model.int8 import is_quantized, load_quantized

    disable_progress_bar()
    if is_quantized(folder):
        return load_quantized(Path(folder))
    try:
        return AutoModel.from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: cannot be loaded as a model: {error}") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, which ends every text with EOS by itself.

    Raises:
        RunError: no tokenizer.json there.
    """
    from tokenizers import Tokenizer as Tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RunError(f"{folder}: it has no tokenizer.json")
    tokenizer = Tokenizers.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
