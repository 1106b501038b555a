"""Int8 weights on one CPU thread: ours beside float32, torch's `quantize_dynamic` kernel, and torchao if there.

CPU time of a forward pass of a random Qwen3, median of rounds taken in turn, and the mean cosine of all hidden
states to float32's. One JSON object comes last.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch

from f2llm_ray.model.int8 import quantize, quantize_rows
from f2llm_ray.model.sizes import Shape, random_backbone

SHAPES = {
    "256 wide": Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768),
    "896 wide": Shape(hidden=896, layers=4, heads=14, kv_heads=2, head_dim=64, ffn=2560),
}
PASSES = ((1, 16), (32, 32), (64, 64))
"""Texts and tokens of each."""
VOCABULARY = 1000


class Dynamic(torch.nn.Module):
    """What torch's `quantize_dynamic` computes: one activation scale for a whole pass."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        q_oi, scale_o = quantize_rows(layer.weight.detach())
        zeros = torch.zeros(len(q_oi), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(q_oi, scale_o.double(), zeros, 0)  # noqa: SLF001
        self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def forward(self, x: torch.Tensor) -> Any:
        """Maps [.., i] to [.., o]."""
        return torch.ops.quantized.linear_dynamic(x, self.packed, True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    results = [row for name, shape in SHAPES.items() for row in measure(name, shape, rounds)]
    print(json.dumps({"torch": torch.__version__, "clock": "cpu", "rows": results}))


def measure(name: str, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Rows of one shape: milliseconds and cosine of each model, by size of the pass."""
    backbone = random_backbone(shape, VOCABULARY, seed=0).eval()
    models = {
        "float32": backbone,
        "int8": quantize(backbone, embeddings=False),
        "quantize_dynamic": dynamic(backbone),
    }
    ao = torchao(backbone)
    if ao is not None:
        models["torchao"] = ao
    rows = []
    for texts, tokens in PASSES:
        ids = torch.randint(0, VOCABULARY, (texts, tokens), generator=torch.Generator().manual_seed(0))
        spent: dict[str, list[float]] = {key: [] for key in models}
        states: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            for _ in range(rounds + 1):
                for key, model in models.items():
                    begun = time.process_time()
                    states[key] = model(input_ids=ids, use_cache=False).last_hidden_state
                    spent[key].append(time.process_time() - begun)
        row: dict[str, Any] = {"shape": name, "texts": texts, "tokens": tokens}
        for key, seconds in spent.items():
            cosine = torch.cosine_similarity(states[key], states["float32"], dim=-1).mean()
            # The first round warms up.
            row[key] = {"ms": round(1e3 * statistics.median(seconds[1:]), 2), "cosine": round(float(cosine), 5)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def dynamic(backbone: Any) -> Any:
    """A copy with torch's dynamic kernel in every linear layer."""
    small = copy.deepcopy(backbone)
    for parent in list(small.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Dynamic(child))
    return small


def torchao(backbone: Any) -> Any:
    """A copy quantized by torchao, None where it is not installed."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    small = copy.deepcopy(backbone)
    quantize_(small, Int8DynamicActivationInt8WeightConfig())
    return small


if __name__ == "__main__":
    main()
