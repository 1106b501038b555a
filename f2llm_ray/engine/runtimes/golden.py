"""Golden texts of an export: odd and ordinary strings, the ids and the vectors that the model itself gives them.

They lie with the export, so that its proof can be run again anywhere, without the model.
Shapes: n texts, of which the first v have vectors, d hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import Tokens, tokenize
from f2llm_ray.data.tokens.tokenizer import TOKENIZER, load_tokenizer
from f2llm_ray.engine.text_engine import CHECK_TEXTS
from f2llm_ray.model.checkpoint import OWN, ModelInfo, load_info
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

TEXTS_FILE = f"{OWN}/golden.json"
TENSORS_FILE = f"{OWN}/golden.safetensors"
LONGEST = 2048
"""Tokens of the longest text whose vector is compared: the scores of attention take memory with its square."""
ODD = (
    "",
    " ",
    "\n\t ",
    "a",
    "?!",
    "0 1 2 3.14 1e-5 007",
    "🙂👩‍👩‍👧‍👦🇩🇪 👍🏽",
    "Z̷̛̗a̸̢͝l̵̡̛g̶̨͠o̷̧͘",
    "<|endoftext|>",
    "before <|endoftext|> after",
    "[CLS] [SEP] [MASK] <s> </s> <unk>",
    "ﬁ ① Ⅳ ｆｕｌｌ　ｗｉｄｔｈ",
    "e\u0301 is \u00e9, a\u200bb, \u202eright to left\u202c",
    "WORDS in CaMeL_Case and_snake_case",
    "https://example.org/a/b?c=d&e=%20f#g",
    '{"key": [1, 2, null], "x": "\\u0041"}',
    "ไม่มีช่องว่างระหว่างคำ",
    "오늘 날씨가 좋다",
    "இன்று மழை பெய்கிறது",
    "Žluťoučký kůň úpěl ďábelské ódy",
    "שלום עולם",
    "ვეფხისტყაოსანი",
)
"""Strings on which tokenizers and their ports differ."""
PROMPTS = 2
"""Prompts of the model, the first that are not empty, that every string comes with as well."""


@dataclass(frozen=True, eq=False)
class Golden:
    """What an export is compared with."""

    texts: tuple[str, ...]
    """With their prompts [n]."""
    tokens: tuple[Tokens, ...]
    """Ids of each, cut to the model's longest text [n]."""
    vectors_vd: Vectors
    """The model's unit vectors of the first v."""

    def save(self, folder: Path) -> None:
        """Writes both files into an export's folder."""
        from safetensors.numpy import save

        lengths_n = np.array([len(ids) for ids in self.tokens], np.uint32)
        tensors = {"ids": np.concatenate(self.tokens), "lengths": lengths_n, "vectors": self.vectors_vd}
        place = Folder.at(str(folder / OWN))
        place.write_json(Path(TEXTS_FILE).name, list(self.texts))
        place.write_bytes(Path(TENSORS_FILE).name, save(tensors))

    @classmethod
    def load(cls, folder: Path) -> Golden:
        """Reads both files of an export.

        Raises:
            RunError: one is not there or damaged, or they do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / TENSORS_FILE
        try:
            texts = json.loads((folder / TEXTS_FILE).read_text(encoding="utf-8"))
            tensors = load_file(path)
            ids, lengths_n, vectors_vd = (tensors[name] for name in ("ids", "lengths", "vectors"))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RunError(f"{path}: not the golden vectors of an export: {error}") from None
        if len(texts) != len(lengths_n) or lengths_n.sum() != len(ids) or len(vectors_vd) > len(texts):
            raise RunError(f"{path}: not the golden vectors of {folder / TEXTS_FILE}: their numbers differ")
        return cls(tuple(texts), tuple(np.split(ids, lengths_n.cumsum()[:-1])), vectors_vd)


def make_golden(model: Path, backbone: PreTrainedModel) -> Golden:
    """The golden texts of a model folder; the backbone is its own in float32, on CPU."""
    import torch
    from torch.nn.functional import normalize

    from f2llm_ray.engine.encode import encode

    info, tokenizer = load_info(model), load_tokenizer(model)
    texts = list(dict.fromkeys(_texts(info, tokenizer)))
    tokens = tokenize(tokenizer, texts, info.max_tokens)
    # Those with vectors come first.
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]) > LONGEST)
    texts, tokens = [texts[i] for i in order], [tokens[i] for i in order]
    short = [ids for ids in tokens if len(ids) <= LONGEST]
    with torch.inference_mode():
        raw_vd = encode(backbone, short, pooling=info.pooling, tokens_per_pass=LONGEST)
        vectors_vd: Vectors = normalize(raw_vd, dim=-1).numpy()
    return Golden(tuple(texts), tuple(tokens), vectors_vd)


def _texts(info: ModelInfo, tokenizer: Tokenizer) -> Iterator[str]:
    plain = (*ODD, *CHECK_TEXTS)
    prompts = [prompt for prompt in dict.fromkeys(info.prompts.values()) if prompt][:PROMPTS]
    for prompt in ("", *prompts):
        yield from (prompt + text for text in plain)
    longest = info.max_tokens
    for tokens in sorted({longest - 1, longest, longest + 1, 3 * longest, min(longest, LONGEST), 250, 128, 40}):
        yield text_of_length(tokenizer, tokens, CHECK_TEXTS)


def text_of_length(tokenizer: Tokenizer, tokens: int, words: Sequence[str]) -> str:
    """A text of so many tokens, special ones included, or of the nearest number that its characters allow.

    Cutting a word makes more or fewer tokens of it: a few ends are tried, and a few starts of the text.
    """
    base = " ".join(words) + " "
    whole = base * (tokens // len(tokenizer.encode(base, add_special_tokens=False).ids) + 2)
    encoded = tokenizer.encode(whole)
    real = [
        end for (_, end), special in zip(encoded.offsets, encoded.special_tokens_mask, strict=True) if not special
    ]
    wanted = max(tokens - sum(encoded.special_tokens_mask), 1)
    ends = range(real[wanted - 1], min(real[wanted - 1] + 16, len(whole)))
    found = [whole[start:end] for start in range(min(4, len(base))) for end in ends]
    return min(found, key=lambda text: abs(len(tokenizer.encode(text).ids) - tokens))


def check_tokens(folder: Path, golden: Golden, max_tokens: int) -> None:
    """Tokenizes the golden texts as another runtime does: by tokenizer.json, cut by the tokenizers library.

    Raises:
        RunError: a text gets other ids than the model gives it.
    """
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(max_tokens)
    for text, ids, encoding in zip(golden.texts, golden.tokens, tokenizer.encode_batch(golden.texts), strict=True):
        if encoding.ids != ids.tolist():
            raise RunError(
                f"{folder}/{TOKENIZER}: found ids {encoding.ids} for {shown(text)}, expected {ids.tolist()}"
                if len(ids) < 16
                else f"{folder}/{TOKENIZER}: other ids than the model's for {shown(text)}"
            )


def shown(text: str) -> str:
    """A text as a message shows it."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
