"""Kinds of subword models, taken apart: which tokens must stay, and what spells a token that went.

In each a text whose tokens are all kept gets the same tokens from the cut model:

- BPE merges the pair of lowest rank first, and a final token is made by merges inside it alone: with every token
  on the way to a kept one, the same merges happen in the same order.
- Unigram takes the likeliest way to cut a word. It is still there, and no new way is.
- WordPiece takes the longest token that fits, from the left. The longest is still there.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from f2llm_ray.base.errors import RecipeError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How sentencepiece names the tokens of single bytes."""


Speller = Callable[[str], list[str]]
"""Gives the kept tokens that spell one that went."""


class Subwords(ABC):
    """The model of a tokenizer, as tokenizer.json has it."""

    entries: dict[str, int]
    """Its tokens, with their ids."""
    alphabet: set[str]
    """Tokens without which a text could become unknown that was not."""
    unknown: str | None
    """The token of what cannot be spelt, where there is one."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.model = model

    def way_to(self, name: str) -> set[str]:
        """The token, and those without which it would not be made."""
        return {name}

    @abstractmethod
    def cut(self, number: dict[str, int]) -> dict[str, Any]:
        """The model of the kept tokens alone, by their new ids."""

    @abstractmethod
    def speller(self, number: dict[str, int]) -> Speller:
        """Spells with the kept tokens."""


def take_apart(model: dict[str, Any]) -> Subwords:
    """The subword model of a tokenizer.json.

    Raises:
        RecipeError: it is of another kind, or cannot spell every text.
    """
    kinds: dict[str, type[Subwords]] = {"BPE": Bpe, "Unigram": Unigram, "WordPiece": WordPiece}
    if model["type"] not in kinds:
        raise RecipeError(
            f"prune.vocabulary: the tokenizer's model is {model['type']}; only {', '.join(kinds)} can be cut"
        )
    return kinds[model["type"]](model)


class Bpe(Subwords):
    """Byte-pair encoding over bytes, or over characters with bytes to fall back on.

    Raises:
        RecipeError: it marks words by a prefix or suffix, or has no tokens for all bytes.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__(model)
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise RecipeError("prune.vocabulary: byte-pair encoding with word prefixes or suffixes cannot be cut")
        self.entries: dict[str, int] = model["vocab"]
        self.unknown: str | None = model.get("unk_token")
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        self.ranks: dict[tuple[str, ...], int] = {pair: rank for rank, pair in enumerate(pairs)}
        self.alphabet = self._alphabet(byte_fallback=bool(model.get("byte_fallback")))

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

    def way_to(self, name: str) -> set[str]:
        """The token, and all that are merged on the way to it."""
        return {name, *self._merge(name, self.ranks, trace=True)}

    def _merge(self, name: str, ranks: dict[tuple[str, ...], int], *, trace: bool = False) -> list[str]:
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

    def _merges(self, number: dict[str, int]) -> list[tuple[str, ...]]:
        kept = number.keys() & self.entries.keys()
        return [pair for pair in self.ranks if {*pair, "".join(pair)} <= kept]

    def cut(self, number: dict[str, int]) -> dict[str, Any]:
        """The model of the kept tokens alone."""
        entries = {name: number[name] for name in self.entries if name in number}
        return {**self.model, "vocab": entries, "merges": self._merges(number)}

    def speller(self, number: dict[str, int]) -> Speller:
        """Merges what it can, and spells the rest in bytes."""
        ranks = {pair: rank for rank, pair in enumerate(self._merges(number))}

        def spell(name: str) -> list[str]:
            pieces = self._merge(name, ranks)
            return [part for piece in pieces for part in ([piece] if piece in number else _bytes(piece))]

        return spell


class Unigram(Subwords):
    """The unigram language model of sentencepiece, as XLM-RoBERTa has it.

    Single characters stay, and so does the least likely token: what an unknown character costs is counted from it.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__(model)
        pieces: list[tuple[str, float]] = [(piece, score) for piece, score in model["vocab"]]
        self.entries = {piece: place for place, (piece, _) in enumerate(pieces)}
        self.unknown: str | None = None if model.get("unk_id") is None else pieces[model["unk_id"]][0]
        least = min(pieces, key=lambda entry: entry[1])[0]
        self.alphabet = {least, *(name for name in self.entries if len(name) == 1 or BYTE.fullmatch(name))}

    def cut(self, number: dict[str, int]) -> dict[str, Any]:
        """The model of the kept tokens alone."""
        kept = [[piece, score] for piece, score in self.model["vocab"] if piece in number]
        unknown = None if self.unknown is None else number[self.unknown]
        return {**self.model, "vocab": kept, "unk_id": unknown}

    def speller(self, number: dict[str, int]) -> Speller:
        """Takes the likeliest of the kept pieces."""
        from tokenizers.models import Unigram as Model

        cut = self.cut(number)
        pieces = [(piece, score) for piece, score in cut["vocab"]]
        model = Model(pieces, cut["unk_id"], bool(cut.get("byte_fallback")))
        return lambda name: [pieces[token.id][0] for token in model.tokenize(name)]


class WordPiece(Subwords):
    """WordPiece, as BERT has it: a token inside a word has a prefix. Single characters stay, in both forms."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__(model)
        self.entries: dict[str, int] = model["vocab"]
        self.unknown: str | None = model["unk_token"]
        self.prefix: str = model["continuing_subword_prefix"]
        self.alphabet = {name for name in self.entries if len(name.removeprefix(self.prefix)) == 1}

    def cut(self, number: dict[str, int]) -> dict[str, Any]:
        """The model of the kept tokens alone."""
        return {**self.model, "vocab": {name: number[name] for name in self.entries if name in number}}

    def speller(self, number: dict[str, int]) -> Speller:
        """Takes the longest kept token, from the left."""

        def spell(name: str) -> list[str]:
            inside, rest, found = name.startswith(self.prefix), name.removeprefix(self.prefix), list[str]()
            while rest:
                start = self.prefix if inside or found else ""
                fitting = (rest[:end] for end in range(len(rest), 0, -1) if start + rest[:end] in number)
                longest = next(fitting, None)
                if longest is None:
                    return [] if self.unknown is None else [self.unknown]
                found.append(start + longest)
                rest = rest[len(longest) :]
            return found

        return spell


def _bytes(piece: str) -> list[str]:
    """The tokens of the UTF-8 bytes of a character."""
    return [f"<0x{byte:02X}>" for byte in piece.encode()]
