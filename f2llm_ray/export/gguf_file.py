"""GGUF for llama.cpp: `gguf/NAME-F16.gguf` and `gguf/NAME-Q8_0.gguf` of decoders with byte-level BPE.

llama.cpp has its own code for each family and each way to split text, and picks them by names in the file. What it
would compute or split otherwise is refused here. The names of keys and tensors are the `gguf` package's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.data.tokens.tokenizer import TOKENIZER, load_tokenizer, template_of
from f2llm_ray.model.checkpoint import ModelInfo, has_dense
from f2llm_ray.model.described import CONFIG_FILE, MODULES_FILE
from f2llm_ray.model.families import Pooling, kv_heads
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from f2llm_ray.engine.runtimes.golden import Golden
    from f2llm_ray.engine.runtimes.source import Source
    from f2llm_ray.model.dims import Vectors

PACKAGES = ("gguf",)
FAMILIES = ("qwen3", "llama")
KINDS = {"F16": 1, "Q8_0": 7}
"""Types of the matrices, with llama.cpp's number for a file of each; norms stay float32."""
BLOCK = 32
"""Values that share a scale in Q8_0."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_WORDS % r"\p{N}": "qwen2", _WORDS % r"\p{N}{1,3}": "llama-bpe"}
"""Regular expressions by which text is split before merging, and llama.cpp's names for them."""
OWN_SPLIT = "gpt-2"
"""Its name for that of the tokenizers library's ByteLevel."""
POOLINGS: dict[Pooling, str] = {"last": "LAST", "mean": "MEAN", "cls": "CLS"}


def refuse(model: Path, info: ModelInfo) -> None:
    """Raises RunError where llama.cpp would run a model folder otherwise than the engine does."""
    path = model / CONFIG_FILE
    config = Folder.at(str(model)).read_json(CONFIG_FILE)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise RunError(
            f"{path}: model_type {kind!r} cannot be written as GGUF here; expected {' or '.join(FAMILIES)}"
        )
    if has_dense(Folder.at(str(model))):
        raise RunError(
            f"{model / MODULES_FILE}: a Dense module cannot be written as GGUF here; expected a model without"
        )
    for flag in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(flag):
            raise RunError(f"{path}: {flag} cannot be written as GGUF here; expected without")
    rotary = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    if rotary != "default":
        raise RunError(f"{path}: rope_type {rotary!r} cannot be written as GGUF here; expected 'default'")
    _split(model)
    if len(template_of(load_tokenizer(model))[0]) > 1:
        raise RunError(f"{model}/{TOKENIZER}: llama.cpp can start a text with one token; found more")
    del info


def write(source: Source, folder: Path) -> None:
    """Writes both files into an export's folder, and reads each back tensor by tensor.

    Raises:
        RunError: a tensor does not come back as it was.
    """
    gguf = require("gguf", extra="export")
    for kind in KINDS:
        path = folder / file_of(source.info, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(path, source.backbone.config.model_type)
        _write_facts(writer, source, kind)
        _write_vocabulary(writer, source)
        for tensor in _tensors(source):
            stored = _stored(gguf, tensor.values, kind)
            writer.add_tensor(tensor.name, stored[0], raw_dtype=stored[1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _read_back(path, source, kind)


def proofs(folder: Path, golden: Golden, info: ModelInfo) -> dict[str, Any]:
    """What each file holds beside the export's tokenizer and facts; llama.cpp itself is not run.

    Raises:
        RunError: a file cannot be read, a tensor is not finite, or its vocabulary or facts are others.
    """
    del golden
    gguf = require("gguf", extra="export")
    tokenizer, found = load_tokenizer(folder), {}
    for path in sorted((folder / "gguf").glob("*.gguf")):
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise RunError(f"{path}: cannot be read as GGUF: {error}") from None
        said = {name: field.contents() for name, field in reader.fields.items()}
        kind = said["general.architecture"]
        expected = {
            f"{kind}.context_length": info.max_tokens,
            f"{kind}.pooling_type": int(gguf.PoolingType[POOLINGS[info.pooling]]),
            f"{kind}.embedding_length": info.dims[-1],
            "tokenizer.ggml.eos_token_id": template_of(tokenizer)[1],
            "tokenizer.ggml.add_eos_token": True,
        }
        for key, value in expected.items():
            if said.get(key) != value:
                raise RunError(f"{path}: {key} is {said.get(key)!r}, expected {value!r}")
        names = said["tokenizer.ggml.tokens"][: tokenizer.get_vocab_size()]
        if names != [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]:
            raise RunError(f"{path}: its tokens are not those of {folder / TOKENIZER}")
        for tensor in reader.tensors:
            if not np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all():
                raise RunError(f"{path}: {tensor.name} is not finite")
        found[str(path.relative_to(folder))] = {"tensors": len(reader.tensors), "tokens": len(names)}
    if len(found) != len(KINDS):
        raise RunError(f"{folder}/gguf: found {len(found)} files, expected {len(KINDS)}")
    return found


def file_of(info: ModelInfo, kind: str) -> str:
    """The file of a model's export."""
    return f"gguf/{re.sub(r'[^A-Za-z0-9._-]+', '-', info.name)}-{kind}.gguf"


@dataclass(frozen=True, eq=False)
class _Tensor:
    name: str
    """As llama.cpp has it."""
    values: Vectors


def _tensors(source: Source) -> Iterator[_Tensor]:
    gguf = require("gguf", extra="export")
    config = source.backbone.config
    arch = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in source.backbone.state_dict().items():
        found = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        if found is None:
            raise RunError(f"{source.model}: GGUF has no name for the weight {name!r}")
        values = value.float().numpy()
        if config.model_type == "llama" and "q_proj" in name:
            values = _interleaved(values, config.num_attention_heads)
        elif config.model_type == "llama" and "k_proj" in name:
            values = _interleaved(values, kv_heads(config))
        yield _Tensor(found, values)


def _interleaved(values_oi: Vectors, heads: int) -> Vectors:
    """Rows of queries or keys such that the two of a rotated pair are neighbours, as llama.cpp rotates Llama's."""
    rows, inputs = values_oi.shape
    return values_oi.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def _stored(gguf: Any, values: Vectors, kind: str) -> tuple[np.ndarray[Any, Any], Any]:
    """A tensor as a file of a kind holds it, and llama.cpp's type of it."""
    types = gguf.GGMLQuantizationType
    name = "F32" if values.ndim == 1 else kind if kind == "F16" or values.shape[1] % BLOCK == 0 else "F16"
    return gguf.quantize(np.ascontiguousarray(values), types[name]), types[name]


def _write_facts(writer: Any, source: Source, kind: str) -> None:
    gguf = require("gguf", extra="export")
    config, info = source.backbone.config, source.info
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(info.name)
    writer.add_file_type(KINDS[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(info.max_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads(config))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_pooling_type(gguf.PoolingType[POOLINGS[info.pooling]])


def _write_vocabulary(writer: Any, source: Source) -> None:
    gguf = require("gguf", extra="export")
    tokenizer = load_tokenizer(source.model)
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    names, types = [], []
    for number in range(source.backbone.config.vocab_size):
        name = tokenizer.id_to_token(number)
        kind = "NORMAL" if number not in added else "CONTROL" if added[number] else "USER_DEFINED"
        names.append(f"[unused {number}]" if name is None else name)
        types.append(gguf.TokenType["UNUSED" if name is None else kind])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(source.model))
    writer.add_token_list(names)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    prefix, end = template_of(tokenizer)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_eos_token(value=True)
    writer.add_add_bos_token(value=bool(prefix))
    if prefix:
        writer.add_bos_token_id(prefix[0])


def _split(model: Path) -> str:
    """llama.cpp's name for how a model's tokenizer splits text.

    Raises:
        RunError: it has none, or the tokenizer is no byte-level BPE.
    """
    path = model / TOKENIZER
    content = json.loads(load_tokenizer(model).to_str())
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        raise RunError(
            f"{path}: found {content['model']['type']}, and GGUF is written of byte-level BPE alone here"
        )
    if (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise RunError(f"{path}: llama.cpp does not have its normalizer, {content['normalizer']['type']}")
    parts = content["pre_tokenizer"]
    parts = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    if (
        [part["type"] for part in parts] == ["ByteLevel"]
        and parts[0]["use_regex"]
        and not parts[0]["add_prefix_space"]
    ):
        return OWN_SPLIT
    if [part["type"] for part in parts] == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        name = SPLITS.get(parts[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise RunError(f"{path}: its pre_tokenizer is none that llama.cpp has under a name known here")


def _read_back(path: Path, source: Source, kind: str) -> None:
    """Raises RunError where a tensor of a written file is not the model's, to the rounding of its type."""
    gguf = require("gguf", extra="export")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    rounding = {"F16": 2**-10, "Q8_0": 1 / 127}[kind]
    for tensor in _tensors(source):
        stored = found.pop(tensor.name, None)
        if stored is None:
            raise RunError(f"{path}: {tensor.name} was not written")
        values = gguf.dequantize(stored.data, stored.tensor_type).reshape(tensor.values.shape)
        off = float(np.abs(values - tensor.values).max())
        if not off <= rounding * float(np.abs(tensor.values).max()):
            raise RunError(f"{path}: {tensor.name} came back with values up to {off:.3g} off")
    if found:
        raise RunError(f"{path}: it holds {min(found)}, which the model has not")
