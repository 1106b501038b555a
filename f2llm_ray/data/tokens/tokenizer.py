"""The tokenizer of a run: an existing one, or a byte-level BPE trained on the corpus itself."""

from __future__ import annotations

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
    """The fast tokenizer of a hub name or local folder, made to end every text with its own EOS.

    Raises:
        RecipeError: not there, or not a fast tokenizer, or one without an EOS.
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
    if backend is None or loaded.eos_token is None:
        raise RecipeError(f"tokenizer {path!r}: expected a fast tokenizer with an EOS token")
    return with_eos(backend, loaded.eos_token)


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
