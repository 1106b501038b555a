"""The tokenizer of a run: an existing one, or a byte-level BPE trained on the corpus itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
# Merges of a 16k vocabulary are settled well before this many characters; more only costs time.
SAMPLE_CHARS = 20_000_000
LINE_CHARS = 1_000
BYTES_PER_TOKEN = 3.5
"""UTF-8 bytes of a text for each token, as a trained tokenizer of 8,000 entries had them: 3.5 of help articles in
several languages."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Trains a byte-level BPE, so that no text of any script is unknown to it.

    Args:
        texts: distinct texts; the first `SAMPLE_CHARS` characters of them are used, `LINE_CHARS` of each.
        vocabulary: number of entries, the 256 bytes and END included.
    """
    from tokenizers import Tokenizer as Tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizers(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    return with_eos(tokenizer, END)


def open_tokenizer(path: str) -> Tokenizer:
    """The fast tokenizer of a hub name or local folder, with its own template, made to end every text.

    Raises:
        RecipeError: not there, or not a fast tokenizer, or nothing that could end a text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (Path(path) / "tokenizer.json").is_file() and not (Path(path) / "config.json").is_file():
            loaded = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"tokenizer {path!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    eos = loaded.eos_token or loaded.sep_token
    if backend is None or eos is None:
        raise RecipeError(f"tokenizer {path!r}: expected a fast tokenizer with an EOS token")
    try:
        return with_eos(backend, eos)
    except ValueError as error:
        raise RecipeError(f"tokenizer {path!r}: {error}") from None


def with_eos(tokenizer: Tokenizer, eos: str) -> Tokenizer:
    """The tokenizer with a template that ends every text: its own where that does, else its own and EOS.

    Encoders bring theirs, such as `[CLS] $A [SEP]`; most decoders start with a BOS or nothing.

    Raises:
        ValueError: its own template ends a text with several tokens, of which cutting a text would lose some.
    """
    from tokenizers import Tokenizer as Tokenizers
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    ours = Tokenizers.from_str(tokenizer.to_str())
    ours.no_truncation()
    ours.no_padding()
    added, bare = ours.encode("a").tokens, ours.encode("a", add_special_tokens=False).tokens
    start = added.index(bare[0]) if bare and bare[0] in added else 0
    prefix, suffix = added[:start], added[start + len(bare) :]
    if len(suffix) > 1:
        raise ValueError(f"its template ends a text with {suffix}, expected one token")
    if suffix:
        return ours
    special = [(token, ours.token_to_id(token)) for token in dict.fromkeys([*prefix, eos])]
    template = TemplateProcessing(
        single=[*prefix, "$A", eos], pair=[*prefix, "$A", "$B:1", f"{eos}:1"], special_tokens=special
    )
    ours.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    return ours


def template_of(tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids that a text starts with, often none, and the one that it ends with."""
    *prefix, end = tokenizer.encode("").ids
    return prefix, end


def save_tokenizer(folder: Path, tokenizer: Tokenizer, max_tokens: int, *, pad: str | None = None) -> None:
    """Writes tokenizer.json and the config that makes AutoTokenizer load it.

    `pad` is the token that an encoder pads with; without it padding is EOS, as it may be anything in a decoder.
    """
    from transformers import PreTrainedTokenizerFast

    prefix, end = template_of(tokenizer)
    eos = tokenizer.id_to_token(end)
    special = {"eos_token": eos, "pad_token": eos}
    if pad is not None:
        special |= {"sep_token": eos, "pad_token": pad}
        special |= {"cls_token": tokenizer.id_to_token(prefix[0])} if prefix else {}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        model_max_length=max_tokens,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        # Those that all backbones take; the class would also give token types.
        model_input_names=["input_ids", "attention_mask"],
    )
    wrapped.save_pretrained(folder)
    _name_stock_class(folder / "tokenizer_config.json")


def _name_stock_class(path: Path) -> None:
    """Names the class that transformers 4 and 5 both have, in place of one of 5 alone."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, which ends every text with EOS by itself.

    Raises:
        RunError: no tokenizer.json there.
    """
    from tokenizers import Tokenizer as Tokenizers

    path = folder / TOKENIZER
    if not path.is_file():
        raise RunError(f"{folder}: it has no tokenizer.json")
    tokenizer = Tokenizers.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def differences(one: Folder, other: Folder) -> list[str]:
    """The parts in which two folders' tokenizer.json differ; none when they give the same tokens.

    Raises:
        RunError: one of them is not there.
    """
    ours, theirs = (folder.read_json(TOKENIZER) for folder in (one, other))
    # Cutting and padding are settings of a call, and are set anew for each.
    parts = {*ours, *theirs} - {"truncation", "padding"}
    return sorted(part for part in parts if ours.get(part) != theirs.get(part))


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_CHARS
    for text in texts:
        if left <= 0:
            return
        yield text[:LINE_CHARS]
        left -= min(len(text), LINE_CHARS)
