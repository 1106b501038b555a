"""Small random backbones of each family, with norms and embeddings of sizes that a wrong cut would show."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

DECODERS = ("qwen3", "llama", "gemma3_text")
ENCODERS = ("bert", "xlm-roberta", "modernbert")
TWO_WAY_GEMMA = "gemma3_text two-way"
"""Gemma 3 whose tokens see all of their text, as in EmbeddingGemma."""
FAMILIES = (*DECODERS, TWO_WAY_GEMMA, *ENCODERS)
VOCABULARY = 60
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def backbone(kind: str, *, seed: int = 0, tied: bool = True, vocabulary: int = VOCABULARY) -> torch.nn.Module:
    """Three layers, two of them sliding if they can; 32 channels, 4 query heads (decoders: 2 groups), FFN 48."""
    from transformers import AutoConfig, AutoModel

    model_type = kind.split(maxsplit=1)[0]
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    options = {}
    if model_type in ("bert", "xlm-roberta"):
        sizes |= {"pad_token_id": 5, "layer_norm_eps": 1e-2}
        options = {"add_pooling_layer": False}
    elif model_type == "modernbert":
        sizes |= {"pad_token_id": 5, "norm_eps": 1e-2, "layer_types": LAYERS, "local_attention": 8}
        sizes |= {"cls_token_id": 2, "sep_token_id": 1}
    else:
        # A large eps, so that a cut that changes its weight beside the mean square shows.
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-2}
    if model_type == "gemma3_text":
        sizes |= {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 8}
        sizes |= {"use_bidirectional_attention": True, "sliding_window": 6} if kind == TWO_WAY_GEMMA else {}
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, **options).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norm weights of one (or zero) would hide a mistake in how they are cut
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "embed" not in name:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def texts(count: int = 30, seed: int = 0) -> list[np.ndarray]:
    """Texts of 1 to 19 tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, n).astype(np.uint32) for n in generator.integers(1, 20, count)]
