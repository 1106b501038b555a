"""Small random decoders of each family, with norms and embeddings of sizes that a wrong cut would show."""

from __future__ import annotations

import numpy as np
import torch

FAMILIES = ("qwen3", "llama", "gemma3_text")
VOCABULARY = 60


def decoder(model_type: str, *, seed: int = 0, tied: bool = True) -> torch.nn.Module:
    """Three layers, 32 channels, 4 query heads in 2 groups, 48 FFN channels; two layers slide where it can."""
    from transformers import AutoConfig, AutoModel

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "rms_norm_eps": 1e-2,  # large, so that a cut that changes its weight beside the mean square shows
    }
    if model_type == "gemma3_text":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        sizes |= {"sliding_window": 4, "layer_types": layers, "query_pre_attn_scalar": 8}
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norm weights of one (or zero) would hide a mistake in how they are cut
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "embed" not in name:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def texts(count: int = 30, seed: int = 0) -> list[np.ndarray]:
    """Texts of 1 to 19 tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, n).astype(np.uint32) for n in generator.integers(1, 20, count)]
