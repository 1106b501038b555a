"""The exported model folder: one that AutoModel, SentenceTransformer and our engine load to the same vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.schema import TextPrompts
from f2llm_ray.data.tokens.tokenizer import save_tokenizer, template_of
from f2llm_ray.model.dense import KIND, WEIGHTS_FILE, dense_among, parts_of, put_dense, read_linear, write_dense
from f2llm_ray.model.described import (
    CONFIG_FILE,
    FLAG,
    MODULES_FILE,
    OTHER_FLAGS,
    POOLING_FLAGS,
    described,
    read_stock,
    stock_file,
)
from f2llm_ray.model.families import POOLINGS, Pooling, family_of, without_dropout
from f2llm_ray.model.stock_files import mend_config
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel

INFO_FILE = "f2llm.json"
MODEL = "model"
"""Folder of the model in that of the stage which made it."""
SHOWN = 8
"""Model folders that an error names at most."""
OWN = "f2llm"
"""Folder of files that other loaders must not see: vLLM takes every .safetensors beside them for weights."""
CALIBRATION_FILE = f"{OWN}/calibration.safetensors"
"""Ranges for int8 vectors and the vectors of the self-check (`engine.text_engine`)."""
SAMPLE = 1 << 20
"""Bytes at each end of a weight file that are hashed; training changes every weight."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The space of another model that a model was taught to end in: its queries may search that one's passages."""

    model: str
    """The other model's name."""
    checksum: str
    """Its `fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model folder says beyond its Hugging Face config."""

    name: str
    dims: tuple[int, ...]
    """The matryoshka dims it was trained for, smallest first; the last one is the length of its vectors."""
    max_tokens: int
    """Longest text it was trained on, EOS included."""
    prompts: dict[str, str]
    """Text put before a text, by prompt name: "query" before a query, "document" before a passage, "" where the
    model was trained without; the others before queries of one kind."""
    instructions: bool
    """Whether it was trained with an instruction before queries (`schema.query_text`)."""
    pooling: Pooling = "last"
    space: Space | None = None
    exits: tuple[int, ...] = ()
    """Numbers of layers, below all that it has, after which it was trained to be cut."""


def matryoshka_dims(hidden: int, smallest: int = 8) -> tuple[int, ...]:
    """The trained dims: doublings of the smallest below the hidden size, and the hidden size (paper)."""
    dims = [smallest << i for i in range(hidden.bit_length()) if smallest << i < hidden]
    return (*dims, hidden)


def save_model(
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: Tokenizer,
    info: ModelInfo,
    *,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a stock config, safetensors, tokenizer, the sentence-transformers files and our own facts.

    The folder is local, and made when missing; the tokenizer comes from `with_eos`. `state` has weights to write
    in place of the backbone's own (gathered from ZeRO shards). A map after pooling (`model.dense`) is a module.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar per file of a model that loads in a second only hides our own lines
    folder.mkdir(parents=True, exist_ok=True)
    own, dense = parts_of(backbone.state_dict() if state is None else state)
    backbone.save_pretrained(folder, state_dict=own)
    save_tokenizer(folder, tokenizer, info.max_tokens, pad=pad_token(backbone.config, tokenizer))
    causal = family_of(backbone.config).causal
    mend_config(folder / CONFIG_FILE, info.dims, template_of(tokenizer)[1] if causal else None)
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    paths = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds[1:], start=1))]
    files: dict[str, Any] = {
        INFO_FILE: {name: fact for name, fact in asdict(info).items() if fact is not None},
        MODULES_FILE: [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": backbone.config.hidden_size,
            **{flag: info.pooling == pooling for pooling, flag in POOLING_FLAGS.items()},
            **{f"{FLAG}{name}": False for name in OTHER_FLAGS},
            "include_prompt": True,
        },
        **({f"{paths[2]}/{CONFIG_FILE}": write_dense(folder / paths[2], dense)} if dense else {}),
        f"{paths[-1]}/{CONFIG_FILE}": {},
        "sentence_bert_config.json": {"max_seq_length": info.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"document": "", **info.prompts},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_info(folder: Folder | Path) -> ModelInfo:
    """The facts of a model folder anywhere, without its weights: one of ours, or of sentence-transformers.

    Raises:
        RunError: neither, its facts are not those of a model, or the engine cannot run it.
    """
    place = folder if isinstance(folder, Folder) else Folder.at(str(folder))
    if not place.exists(INFO_FILE):
        return _described_info(place)
    facts = place.read_json(INFO_FILE)
    try:
        prompts = {**facts["prompts"], "document": facts["prompts"].get("document", "")}
        space = None if facts.get("space") is None else Space(**facts["space"])
        numbers = {"dims": tuple(facts["dims"]), "exits": tuple(facts.get("exits", ()))}
        info = ModelInfo(**{**facts, **numbers, "prompts": prompts, "space": space})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{place.uri}/{INFO_FILE}: not the facts of a model: {error}") from None
    if info.pooling not in POOLINGS:
        raise RunError(
            f"{place.uri}/{INFO_FILE}: pooling is {info.pooling!r}, expected one of {', '.join(POOLINGS)}"
        )
    check_family(place)
    return info


def has_dense(folder: Folder) -> bool:
    """Whether a model folder lists a Dense module."""
    modules = folder.read_json(MODULES_FILE) if folder.exists(MODULES_FILE) else []
    return any(str(entry["type"]).endswith(f".{KIND}") for entry in modules)


def _described_info(folder: Folder) -> ModelInfo:
    """The facts of a folder of sentence-transformers."""
    said = described(lambda name: folder.read_json(name) if folder.exists(name) else None, folder.uri)
    if said is None:
        raise RunError(
            f"{folder.uri}: not a model folder: it has no {INFO_FILE}, and no {MODULES_FILE}{_models_in(folder)}"
        )
    check_family(folder)
    config = folder.read_json(CONFIG_FILE)
    longest = said.max_tokens or config.get("max_position_embeddings")
    if not isinstance(longest, int) or "hidden_size" not in config:
        raise RunError(f"{folder.uri}/{CONFIG_FILE}: found no hidden_size, or no length of the longest text")
    return ModelInfo(
        name=folder.path.rpartition("/")[2],
        dims=(config["hidden_size"] if said.dense is None else said.dense.outputs,),
        max_tokens=longest,
        prompts={"query": said.query, "document": said.document},
        instructions=False,
        pooling=said.pooling,
    )


def _models_in(folder: Folder) -> str:
    """The model folders in the root of a run, or in the folder of one of its stages, to end an error in."""
    if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
        return ""
    entries = folder.filesystem.get_file_info(fs.FileSelector(folder.path))
    names = [MODEL, *sorted(f"{entry.base_name}/{MODEL}" for entry in entries)]
    found = [f"{folder.uri}/{name}" for name in names if folder.exists(f"{name}/{INFO_FILE}")]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"; the model folders in it are {', '.join(found[:SHOWN])}{more}" if found else ""


def prompts_of(info: ModelInfo, data: TextPrompts) -> TextPrompts:
    """What a model wants its texts to start with, beside prepared data whose texts start with `data`.

    A model that was trained with instructions has no other prompt for queries: there they are the same.
    """
    query = data.query if info.instructions else info.prompts.get("query", "")
    return TextPrompts(query, info.prompts.get("document", ""))


def check_prompts(info: ModelInfo, data: TextPrompts, model: Folder, advice: str) -> None:
    """Refuses a model whose prompts are not those of the prepared data.

    Raises:
        RunError: its texts start with something else; the message ends in the advice.
    """
    wanted = prompts_of(info, data)
    if wanted != data:
        raise RunError(
            f"{model.uri}: its prompts are {wanted.query!r} and {wanted.document!r}, those of the prepared data "
            f"{data.query!r} and {data.document!r}{advice}"
        )


def check_family(folder: Folder) -> None:
    """Raises RunError where a folder's config.json names a family that is not known here."""
    if folder.exists(CONFIG_FILE):
        family_of(folder.read_json(CONFIG_FILE), f"{folder.uri}/{CONFIG_FILE}")


def pad_token(config: PreTrainedConfig, tokenizer: Tokenizer) -> str | None:
    """The token that an encoder pads with; None for a decoder, whose padding nothing looks at."""
    number = getattr(config, "pad_token_id", None)
    return None if family_of(config).causal or number is None else tokenizer.id_to_token(number)


def load_backbone(folder: Path | str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The backbone of a model folder (or any local Hugging Face checkpoint), in float32 by default.

    A map after pooling is part of it (`model.dense`). It has no dropout (`families.without_dropout`).
    Int8 weights stay int8, whatever the dtype (`model.int8`).

    Raises:
        RunError: no config or no safetensors weights there, some are missing, or the family is not known here.
    """
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.utils.logging import disable_progress_bar

    from f2llm_ray.model.int8 import is_quantized, load_quantized

    disable_progress_bar()
    check_family(Folder.at(str(folder)))
    if is_quantized(folder):
        return load_quantized(Path(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family = family_of(config, str(folder))
        backbone = load_whole(AutoModel, folder, config=config, dtype=dtype or torch.float32, **family.options)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: cannot be loaded as a model: {error}") from None
    _load_dense(str(folder), backbone)
    return without_dropout(backbone)


def load_whole(kind: Any, folder: Path | str, **options: Any) -> PreTrainedModel:
    """What a class of transformers, such as AutoModel, loads of a folder's safetensors, with all of its weights.

    Raises:
        OSError: transformers' own error, as is ValueError.
        RunError: a weight is not there.
    """
    with _quiet_transformers():  # what is missing is an error below, and the head that is left out is no news
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise RunError(f"{folder}: {len(missing)} weights are not there, such as {missing[0]}")
    return model


def _load_dense(folder: str, backbone: PreTrainedModel) -> None:
    """Puts the map after pooling into a backbone, where its folder has one."""
    modules = read_stock(folder, MODULES_FILE)
    said = dense_among(modules or [], partial(read_stock, folder), folder, (MODULES_FILE, CONFIG_FILE))
    if said is None:
        return
    if said.inputs != backbone.config.hidden_size:
        raise RunError(
            f"{folder}/{said.path}/{CONFIG_FILE}: found in_features {said.inputs}, expected the hidden size, "
            f"{backbone.config.hidden_size}"
        )
    path = stock_file(folder, said.weights)
    if path is None:
        raise RunError(f"{folder}/{said.weights}: not there; expected the weights of the Dense module")
    put_dense(backbone, read_linear(said, path, backbone.dtype))


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds weights; an export for another runtime does not."""
    return any(folder.glob("*.safetensors"))


def vocabulary_size(folder: Path) -> int:
    """Token ids that a model folder has embeddings for.

    Raises:
        RunError: its config.json does not say.
    """
    size = Folder.at(str(folder)).read_json(CONFIG_FILE).get("vocab_size")
    if not isinstance(size, int):
        raise RunError(f"{folder}/{CONFIG_FILE}: found vocab_size {size!r}, expected a number")
    return size


def float_bytes(folder: Path) -> int:
    """Bytes of a model folder's weights in float32."""
    config = Folder.at(str(folder)).read_json(CONFIG_FILE)
    half = str(config.get("dtype") or config.get("torch_dtype")).endswith("16")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) * (2 if half else 1)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers' log to errors meanwhile."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def fingerprint(model: Folder) -> str:
    """A short hash of a model's facts, tokenizer and both ends of each weight file.

    Neither its folder's place counts nor what is measured of it afterwards, its calibration.
    """
    digest = hashlib.blake2b(digest_size=8)
    modules = model.read_json(MODULES_FILE) if model.exists(MODULES_FILE) else []
    parts = [f"{entry['path']}/{WEIGHTS_FILE}" for entry in modules if entry.get("path")]
    inside = [name for name in parts if model.exists(name)]
    for name in (*model.files(".json"), *model.files(".safetensors"), *inside):
        with model.filesystem.open_input_file(f"{model.path}/{name}") as file:
            size = file.size()
            digest.update(f"{name} {size} ".encode())
            digest.update(file.read(size if name.endswith(".json") else SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()
