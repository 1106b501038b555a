"""Tiny encoders as folders of sentence-transformers, real in all but size: what teams bring as backbones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import LINES

KINDS = ("bert", "xlm-roberta", "modernbert")
MAX_POSITIONS = 80
SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>"),
    "modernbert": ("[UNK]", "[CLS]", "[SEP]", "[PAD]"),
}


def tokenizer_of(kind: str) -> Any:
    """A tokenizer of the kind that the family has, trained on `LINES`: WordPiece, Unigram, byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = list(SPECIAL[kind])
    start, end = ("<s>", "</s>") if kind == "xlm-roberta" else ("[CLS]", "[SEP]")
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif kind == "xlm-roberta":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=180,
            special_tokens=special,
            unk_token="<unk>",  # noqa: S106
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator([*LINES, *(word for line in LINES for word in line.split())], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return tokenizer


def encoder_folder(
    folder: Path,
    kind: str,
    *,
    pooling: str = "mean",
    prompts: dict[str, str] | None = None,
    layers: int = 2,
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
) -> Path:
    """Writes an encoder with random weights, always the same ones, as sentence-transformers 5 writes it."""
    import torch
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    tokenizer = tokenizer_of(kind)
    start, end = ("<s>", "</s>") if kind == "xlm-roberta" else ("[CLS]", "[SEP]")
    pad = "<pad>" if kind == "xlm-roberta" else "[PAD]"
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": tokenizer.token_to_id(pad),
        "bos_token_id": tokenizer.token_to_id(start),
        "eos_token_id": tokenizer.token_to_id(end),
        "initializer_range": 0.3,
    }
    if kind == "modernbert":
        sizes |= {
            "cls_token_id": sizes["bos_token_id"],
            "sep_token_id": sizes["eos_token_id"],
            "local_attention": 8,
        }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).float()
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=start,
        sep_token=end,
        pad_token=pad,
        unk_token="<unk>" if kind == "xlm-roberta" else "[UNK]",
        model_max_length=MAX_POSITIONS - 2,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    flags = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "max": "max_tokens"}
    write = {
        "modules.json": [
            {
                "idx": place,
                "name": str(place),
                "path": "" if name == "Transformer" else f"{place}_{name}",
                "type": f"sentence_transformers.models.{name}",
            }
            for place, name in enumerate(modules)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 32, f"pooling_mode_{flags[pooling]}": True},
        "config_sentence_transformers.json": {"prompts": prompts or {}, "similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {"max_seq_length": MAX_POSITIONS - 2, "do_lower_case": False},
    }
    for name, content in write.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    if "Normalize" in modules:
        (folder / f"{modules.index('Normalize')}_Normalize").mkdir(exist_ok=True)
    return folder
