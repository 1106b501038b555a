"""A smaller vocabulary: the tokens that a corpus uses, with a tokenizer that splits their texts as before.

Byte-pair encoding merges the pair of lowest rank first, and a final token is made by merges inside it alone. Where
a token is kept with every token on the way to it, the tokenizer with the other merges taken out makes the same
merges in the same order, so a text whose tokens are all kept gets the same tokens. What was dropped is spelt with
smaller tokens, down to bytes, so no text becomes unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RecipeError, RunError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from f2llm_ray.data.tokens.store import Tokens

Ids = np.ndarray[Any, np.dtype[np.int64]]
MAP_FILE = "token_map.safetensors"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How sentencepiece names the tokens of single bytes."""
COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class TokenMap:
    """What each token of a parent's vocabulary became: one token, or those that spell it now."""

    first: Ids
    """Where the tokens of each old id lie in `ids`, and the end of the last [V + 1]."""
    ids: Ids


def remap(tokens: Sequence[Tokens], table: TokenMap | None) -> list[Tokens]:
    """Texts in the prepared tokens as texts in a model's own; as they are where it has no map.

    The token store holds the tokens of the recipe's tokenizer. A model with a pruned vocabulary reads the same
    store through the map in its folder, and so does one that is trained from it. Equal to what the pruned
    tokenizer gives where all tokens of a text were kept; else some words may be spelt with other pieces.

    Raises:
        RunError: a token that the pruned vocabulary cannot spell, such as a dropped special token.
    """
    if table is None or not tokens:
        return list(tokens)
    old = np.concatenate(tokens).astype(np.int64)
    counts = np.diff(table.first)[old]
    if not counts.all():
        raise RunError(
            f"token {int(old[counts == 0][0])} is not in the pruned vocabulary, and cannot be spelt in it"
        )
    ends = np.cumsum(counts)
    new = table.ids[np.repeat(table.first[old] - (ends - counts), counts) + np.arange(ends[-1])].astype(np.uint32)
    texts = np.cumsum([len(text) for text in tokens])
    return np.split(new, ends[texts[:-1] - 1])


def save_map(table: TokenMap, folder: Path) -> None:
    """Writes the map into a model folder."""
    from safetensors.numpy import save_file

    save_file({"first": table.first, "ids": table.ids}, folder / MAP_FILE)


def load_map(folder: Path) -> TokenMap | None:
    """The map of a model folder, None where the model has its parent's tokens."""
    from safetensors.numpy import load_file

    path = folder / MAP_FILE
    return TokenMap(**load_file(path)) if path.is_file() else None


def count_tokens(store: Path, vocabulary: int) -> Ids:
    """How often each token stands in the distinct texts of a token store [V]."""
    counts = np.zeros(vocabulary, np.int64)
    for path in sorted(store.glob("*.bin")):
        tokens = np.memmap(path, dtype="<u4", mode="r") if path.stat().st_size else np.empty(0, "<u4")
        for first in range(0, len(tokens), COUNTED_AT_ONCE):
            counts += np.bincount(tokens[first : first + COUNTED_AT_ONCE], minlength=vocabulary)
    return counts


class Vocabulary:
    """A byte-pair tokenizer taken apart.

    Raises:
        RecipeError: the tokenizer is of another kind, or cannot spell every text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.content: dict[str, Any] = json.loads(tokenizer.to_str())
        model = self.content["model"]
        if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise RecipeError(
                f"prune.vocabulary: the tokenizer's model is {model['type']}; only byte-pair encoding (BPE) "
                "without word prefixes and suffixes can be cut"
            )
        self.entries: dict[str, int] = model["vocab"]
        self.added = {token["content"]: token for token in self.content["added_tokens"]}
        self.names = {index: name for name, index in self.entries.items()}
        self.names |= {token["id"]: name for name, token in self.added.items()}
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        self.ranks: dict[tuple[str, ...], int] = {pair: rank for rank, pair in enumerate(pairs)}
        self.alphabet = self._alphabet(byte_fallback=bool(model.get("byte_fallback")))
        self.unknown: str | None = model.get("unk_token")

    def _alphabet(self, *, byte_fallback: bool) -> set[str]:
        from tokenizers.pre_tokenizers import ByteLevel

        byte_level = set(ByteLevel.alphabet()) & self.entries.keys()
        bytes_named = {name for name in self.entries if BYTE.fullmatch(name)}
        found = bytes_named if byte_fallback else byte_level
        if len(found) != 256:
            raise RecipeError(
                f"prune.vocabulary: the tokenizer has {len(found)} of the 256 bytes as tokens; without them a "
                "text whose tokens were dropped could not be spelt"
            )
        return found

    def choose(self, counts: Ids, wanted: int | None) -> Ids:
        """The ids of the tokens to keep, ascending: so many of the most used, or all that are used.

        Bytes, special tokens, and the tokens on the way to a kept one stay. `counts` is how often each token is
        used [V or more].

        Raises:
            RecipeError: fewer are wanted than must stay, or more than there are.
        """
        must = {*self.alphabet, *(name for name, token in self.added.items() if token["special"])}
        must |= {self.unknown} if self.unknown is not None else set()
        used = [index for index in self.names if counts[index]]
        must |= {self.names[index] for index in used if self.names[index] in self.added}
        if wanted is None:
            kept = must.union(*(self.way_to(self.names[index]) for index in used))
        else:
            kept = self._most_used(counts, must, wanted)
        return np.array(sorted(index for index, name in self.names.items() if name in kept), dtype=np.int64)

    def _most_used(self, counts: Ids, must: set[str], wanted: int) -> set[str]:
        if not len(must) <= wanted <= len(self.names):
            raise RecipeError(
                f"prune.vocabulary: {wanted} wanted; bytes and special tokens are {len(must)}, all are "
                f"{len(self.names)}"
            )
        kept = set(must)
        for index in sorted(self.names, key=lambda index: (-counts[index], index)):
            more = self.way_to(self.names[index]) - kept
            if len(kept) + len(more) <= wanted:
                kept |= more
        return kept

    def way_to(self, name: str) -> set[str]:
        """The token and those that are merged on the way to it."""
        return {name} if name in self.added else {name, *self._merge(name, self.ranks, trace=True)}

    def _merge(self, name: str, ranks: dict[tuple[str, ...], int], *, trace: bool) -> list[str]:
        """The pieces that merging ends in, or with `trace` all pieces on the way."""
        if BYTE.fullmatch(name):
            return [name]
        pieces = list(name)
        seen = [piece for piece in pieces if piece in self.entries]
        while len(pieces) > 1:
            best, place = min((ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(pairwise(pieces)))
            if best == len(self.ranks):
                break
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
            seen.append(pieces[place])
        return seen if trace else pieces

    def cut(self, kept: Ids) -> tuple[Tokenizer, TokenMap]:
        """The tokenizer of the kept tokens, numbered in their order, and what the others became.

        Raises:
            RecipeError: the tokenizers library numbers the tokens otherwise.
        """
        from tokenizers import Tokenizer as Tokenizers

        number = {self.names[index]: new for new, index in enumerate(kept.tolist())}
        entries = {name: number[name] for name in self.entries if name in number}
        merges = [pair for pair in self.ranks if {*pair, "".join(pair)} <= entries.keys()]
        content = {
            **self.content,
            "added_tokens": [
                {**token, "id": number[name]}
                for name, token in sorted(self.added.items(), key=lambda item: item[1]["id"])
                if name in number
            ],
            "post_processor": _renumbered(self.content["post_processor"], number),
            "model": {**self.content["model"], "vocab": entries, "merges": merges},
        }
        tokenizer = Tokenizers.from_str(json.dumps(content, ensure_ascii=False))
        moved = [name for name, index in number.items() if tokenizer.token_to_id(name) != index]
        if moved:
            raise RecipeError(f"prune.vocabulary: the tokenizer gives {moved[0]!r} another number than its place")
        return tokenizer, self._map(number, merges)

    def _map(self, number: dict[str, int], merges: list[tuple[str, ...]]) -> TokenMap:
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        spelt: list[list[int]] = [[] for _ in range(max(self.names) + 1)]
        for index, name in self.names.items():
            if name in number:
                spelt[index] = [number[name]]
            elif name not in self.added:
                pieces = self._merge(name, ranks, trace=False)
                spelt[index] = [number[part] for piece in pieces for part in _spell(piece, number)]
        first = np.cumsum([0, *map(len, spelt)], dtype=np.int64)
        return TokenMap(first, np.array([new for ids in spelt for new in ids], dtype=np.int64))


def _spell(piece: str, number: dict[str, int]) -> Iterator[str]:
    """The piece, or its UTF-8 bytes where it was dropped."""
    if piece in number:
        yield piece
    else:
        yield from (f"<0x{byte:02X}>" for byte in piece.encode())


def _renumbered(part: Any, number: dict[str, int]) -> Any:
    """A post-processor with the new ids of the special tokens that its templates add."""
    if isinstance(part, list):
        return [_renumbered(entry, number) for entry in part]
    if not isinstance(part, dict):
        return part
    if "special_tokens" in part:
        special = {
            name: {**entry, "ids": [number[token] for token in entry["tokens"]]}
            for name, entry in part["special_tokens"].items()
        }
        return {**part, "special_tokens": special}
    return {key: _renumbered(value, number) for key, value in part.items()}
