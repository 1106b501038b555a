"""A model folder says what other loaders look for, each in its own way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.text_engine import calibrate, save_calibration
from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
from f2llm_ray.model.vocabulary import TokenMap, save_map
from f2llm_ray.run.folder import Folder
from tests.model.small import FAMILIES, VOCABULARY, backbone
from tests.tiny import LINES, tiny_model

TEI_QWEN3: dict[str, type | tuple[type, ...]] = {
    "attention_bias": bool,
    "vocab_size": int,
    "head_dim": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "hidden_act": str,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "use_sliding_window": bool,
    "eos_token_id": int,
}
"""What text-embeddings-inference demands of a Qwen3's config.json (backends/candle/src/models/qwen3.rs)."""
OLD = ("transformers>=4.57,<4.58", "sentence-transformers>=5.1,<5.2", "huggingface_hub>=0.34,<1")
OLD_TOO = ("tokenizers>=0.22,<0.23", "datasets>=4.0,<4.4")


def word_tokenizer() -> Tokenizer:
    """A tokenizer of as many words as the small backbones have rows."""
    from tokenizers import models, pre_tokenizers, processors

    words = {f"w{n}": n for n in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w9"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="w2 $A w1", special_tokens=[("w2", 2), ("w1", 1)]
    )
    return tokenizer


def family_folder(folder: Path, kind: str) -> Path:
    model = backbone(kind)
    hidden = model.config.hidden_size
    causal = kind in ("qwen3", "llama", "gemma3_text")
    info = ModelInfo(
        name=kind,
        dims=matryoshka_dims(hidden),
        max_tokens=64,
        prompts={"query": ""},
        instructions=False,
        pooling="last" if causal else "mean",
    )
    save_model(folder, model, word_tokenizer(), info)
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def test_text_embeddings_inference_finds_what_it_demands(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    config, pooling = read(folder, "config.json"), read(folder, "1_Pooling/config.json")
    assert {name: type(config[name]) for name in TEI_QWEN3} == TEI_QWEN3
    # router/src/lib.rs, PoolConfig: both must be there, on or off.
    assert {pooling["pooling_mode_cls_token"], pooling["pooling_mode_mean_tokens"]} == {False}
    assert pooling["pooling_mode_lasttoken"] is True
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert config["eos_token_id"] == tokenizer.encode("a").ids[-1]
    assert config["pad_token_id"] is None, "as padding_idx it would stop the gradient of EOS"


def test_vllm_finds_one_file_of_weights_and_the_dims(tmp_path: Path) -> None:
    """It reads every .safetensors of the folder, and takes `dimensions` by these two keys."""
    folder = tiny_model(tmp_path)
    engine = Engine(folder)
    save_calibration(Folder.at(str(folder)), calibrate(engine, engine.tokenize(LINES)))
    save_map(TokenMap(np.zeros(3, np.int32), np.zeros(4, np.int32)), folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    config = read(folder, "config.json")
    assert config["is_matryoshka"] is True
    assert config["matryoshka_dimensions"] == list(engine.info.dims)
    assert Engine(folder).calibration is not None


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_4_finds_the_rotary_bases(tmp_path: Path, kind: str) -> None:
    config = read(family_folder(tmp_path, kind), "config.json")
    said = config.get("rope_parameters")
    if kind.startswith("gemma3"):
        assert config["rope_theta"] == said["full_attention"]["rope_theta"] == 1e6
        assert config["rope_local_base_freq"] == said["sliding_attention"]["rope_theta"] == 1e4
    elif kind == "modernbert":
        assert config["global_rope_theta"] == said["full_attention"]["rope_theta"] == 160_000
        assert config["local_rope_theta"] == said["sliding_attention"]["rope_theta"] == 1e4
    elif kind in ("qwen3", "llama"):
        assert config["rope_theta"] == said["rope_theta"]
    else:
        assert "rope_theta" not in config
    assert read(tmp_path, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in read(tmp_path, "tokenizer_config.json")


ENCODE = """
import json, sys
import numpy as np, sentence_transformers, transformers
assert transformers.__version__ < "5" and sentence_transformers.__version__ < "6"
for folder in sys.argv[2:]:
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")
    np.save(folder + ".npy", model.encode(json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_sentence_transformers_5_and_transformers_4_give_the_same_vectors(tmp_path: Path) -> None:
    old = tmp_path / "old"
    asked = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(old), *OLD, *OLD_TOO]
    if subprocess.run(asked, check=False, capture_output=True).returncode:
        pytest.skip("the packages cannot be installed here")
    texts = ["w3 w4 w5", "w6", " ".join(f"w{n % 50 + 5}" for n in range(40))]
    folders = {kind: family_folder(tmp_path / kind.replace(" ", "-"), kind) for kind in FAMILIES}
    folders["tiny"] = tiny_model(tmp_path / "tiny")
    folders = {kind: folder for kind, folder in folders.items() if "two-way" not in kind}  # transformers 5 alone
    ran = subprocess.run(
        [sys.executable, "-c", ENCODE, json.dumps(texts), *map(str, folders.values())],
        env=os.environ | {"PYTHONPATH": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for kind, folder in folders.items():
        cosine_n = (np.load(f"{folder}.npy") * Engine(folder).embed(texts)).sum(1)
        assert cosine_n.min() > 0.99999, kind
