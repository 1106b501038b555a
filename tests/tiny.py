"""A tiny model folder, real in all but size: random weights and a BPE trained on a few lines."""

from __future__ import annotations

from pathlib import Path

from f2llm_ray.data.tokens.tokenizer import with_eos
from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
from f2llm_ray.model.sizes import Shape, random_backbone

LINES = [
    "The cat sat on the mat and looked at the rain.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "El perro come una manzana roja en la cocina.",
    "Кошка сидит на окне и смотрит на улицу.",
    "猫が窓のそばで眠っています。",
    "def add(a, b):\n    return a + b",
]
MAX_TOKENS = 64


def tiny_model(folder: Path, *, hidden: int = 32, name: str = "tiny", max_tokens: int = MAX_TOKENS) -> Path:
    """Writes a two-layer model of this hidden size, always the same one, and returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    eos = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    shape = Shape(hidden=hidden, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=2 * hidden)
    backbone = random_backbone(shape, tokenizer.get_vocab_size(), seed=0)
    info = ModelInfo(
        name=name,
        dims=matryoshka_dims(hidden),
        max_tokens=max_tokens,
        prompts={"query": "Instruct: Find the passage that answers.\nQuery: "},
        instructions=True,
    )
    save_model(folder, backbone, with_eos(tokenizer, eos), info)
    return folder
