"""A smaller vocabulary: the tokens that a corpus uses, with a tokenizer that splits their texts as before.

A text whose tokens are all kept gets the same tokens (`model.subwords` says why). What was dropped is spelt with
smaller tokens, down to bytes or characters, so no text becomes unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.model.subwords import take_apart

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from f2llm_ray.data.tokens.store import Tokens
    from f2llm_ray.run.folder import Folder

Ids = np.ndarray[Any, np.dtype[np.int64]]
MAP_FILE = "f2llm/token_map.safetensors"
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


def composed(before: TokenMap | None, after: TokenMap) -> TokenMap:
    """The map of a model whose vocabulary was pruned twice, from the prepared tokens to its own.

    A token that either map cannot spell has no tokens.
    """
    if before is None:
        return after
    lengths = np.diff(before.first)
    owner, spelt = np.repeat(np.arange(len(lengths)), lengths), np.diff(after.first)[before.ids]
    taken = np.bincount(owner, weights=spelt == 0, minlength=len(lengths))[owner] == 0
    (ids,) = remap([before.ids[taken].astype(np.uint32)], after)
    lengths = np.bincount(owner[taken], weights=spelt[taken], minlength=len(lengths)).astype(np.int64)
    return TokenMap(np.cumsum([0, *lengths], dtype=np.int64), ids.astype(np.int64))


def save_map(table: TokenMap, folder: Path) -> None:
    """Writes the map into a model folder."""
    from safetensors.numpy import save_file

    path = folder / MAP_FILE
    path.parent.mkdir(exist_ok=True)
    save_file({"first": table.first, "ids": table.ids}, path)


def load_map(folder: Folder) -> TokenMap | None:
    """The map of a model folder, None where the model has its parent's tokens."""
    from safetensors.numpy import load

    return TokenMap(**load(folder.read_bytes(MAP_FILE))) if folder.exists(MAP_FILE) else None


def count_tokens(store: Path, vocabulary: int, table: TokenMap | None = None) -> Ids:
    """How often each token of a vocabulary stands in the distinct texts of a token store [V].

    The store is read through the model's map, where it has one.
    """
    counts = np.zeros(vocabulary if table is None else len(table.first) - 1, np.int64)
    for path in sorted(store.glob("*.bin")):
        tokens = np.memmap(path, dtype="<u4", mode="r") if path.stat().st_size else np.empty(0, "<u4")
        for first in range(0, len(tokens), COUNTED_AT_ONCE):
            counts += np.bincount(tokens[first : first + COUNTED_AT_ONCE], minlength=len(counts))
    if table is None:
        return counts
    return np.bincount(table.ids, np.repeat(counts, np.diff(table.first)), vocabulary).astype(np.int64)


class Vocabulary:
    """A tokenizer taken apart.

    Raises:
        RecipeError: its model is of another kind than `model.subwords` knows, or cannot spell every text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.content: dict[str, Any] = json.loads(tokenizer.to_str())
        self.subwords = take_apart(self.content["model"])
        self.added = {token["content"]: token for token in self.content["added_tokens"]}
        self.names = {index: name for name, index in self.subwords.entries.items()}
        self.names |= {token["id"]: name for name, token in self.added.items()}

    def choose(self, counts: Ids, wanted: int | None) -> Ids:
        """The ids of the tokens to keep, ascending: so many of the most used, or all that are used.

        Bytes or characters, special tokens, and the tokens on the way to a kept one stay. `counts` is how often
        each token is used [V or more].

        Raises:
            RecipeError: fewer are wanted than must stay, or more than there are.
        """
        unknown = self.subwords.unknown
        must = {*self.subwords.alphabet, *(name for name, token in self.added.items() if token["special"])}
        must |= {unknown} if unknown is not None else set()
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
                f"prune.vocabulary: {wanted} wanted; characters and special tokens are {len(must)}, all are "
                f"{len(self.names)}"
            )
        kept = set(must)
        for index in sorted(self.names, key=lambda index: (-counts[index], index)):
            more = self.way_to(self.names[index]) - kept
            if len(kept) + len(more) <= wanted:
                kept |= more
        return kept

    def way_to(self, name: str) -> set[str]:
        """The token and those without which it would not be made."""
        return {name} if name in self.added else self.subwords.way_to(name)

    def cut(self, kept: Ids) -> tuple[Tokenizer, TokenMap]:
        """The tokenizer of the kept tokens, numbered in their order, and what the others became.

        Raises:
            RecipeError: the tokenizers library numbers the tokens otherwise.
        """
        from tokenizers import Tokenizer as Tokenizers

        number = {self.names[index]: new for new, index in enumerate(kept.tolist())}
        content = {
            **self.content,
            "added_tokens": [
                {**token, "id": number[name]}
                for name, token in sorted(self.added.items(), key=lambda item: item[1]["id"])
                if name in number
            ],
            "post_processor": _renumbered(self.content["post_processor"], number),
            "model": self.subwords.cut(number),
        }
        tokenizer = Tokenizers.from_str(json.dumps(content, ensure_ascii=False))
        moved = [name for name, index in number.items() if tokenizer.token_to_id(name) != index]
        if moved:
            raise RecipeError(f"prune.vocabulary: the tokenizer gives {moved[0]!r} another number than its place")
        return tokenizer, self._map(number)

    def _map(self, number: dict[str, int]) -> TokenMap:
        spell = self.subwords.speller(number)
        spelt: list[list[int]] = [[] for _ in range(max(self.names) + 1)]
        for index, name in self.names.items():
            if name in number:
                spelt[index] = [number[name]]
            elif name not in self.added:
                spelt[index] = [number[piece] for piece in spell(name)]
        first = np.cumsum([0, *map(len, spelt)], dtype=np.int64)
        return TokenMap(first, np.array([new for ids in spelt for new in ids], dtype=np.int64))


def _renumbered(part: Any, number: dict[str, int]) -> Any:
    """A post-processor with the new ids of the special tokens that it adds."""
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
    if part.get("type") in {"BertProcessing", "RobertaProcessing"}:
        return {**part, **{end: [part[end][0], number[part[end][0]]] for end in ("cls", "sep")}}
    return {key: _renumbered(value, number) for key, value in part.items()}
