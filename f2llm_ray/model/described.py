"""What a folder of sentence-transformers says of its model: pooling, a map after it, prompts and longest text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.dense import KIND, Dense, dense_among
from f2llm_ray.model.families import Pooling

MODULES_FILE = "modules.json"
CONFIG_FILE = "config.json"
SETTINGS_FILE = "config_sentence_transformers.json"
"""Prompts by name, and which one is used where none is asked for."""
MODULES = {"Transformer", "Pooling", KIND, "Normalize"}
"""Modules of sentence-transformers that make the vectors that the engine makes."""
POOLING_FLAGS: dict[Pooling, str] = {
    "last": "pooling_mode_lasttoken",
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
}
"""What sentence-transformers before version 6 calls them."""
POOLING_MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
"""What version 6 calls them."""
FLAG = "pooling_mode_"
OTHER_FLAGS = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
"""Poolings that the engine does not compute; some loaders want to read of each that it is off."""
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""What sentence-transformers calls the prompt of a passage; the first that a model has."""

Read = Callable[[str], Any]
"""Reads a JSON file of a model by its name; None where the model has none."""


@dataclass(frozen=True)
class Described:
    """What the files say."""

    pooling: Pooling
    query: str
    """The prompt of queries."""
    document: str
    """The prompt of passages."""
    max_tokens: int | None
    """Tokens that it cuts a text to, where it says so."""
    dense: Dense | None = None
    """The linear map after pooling, where there is one."""


def described(read: Read, place: str) -> Described | None:
    """What a model's files say; None where it is not one of sentence-transformers.

    Args:
        read: reads its files.
        place: what errors call it.

    Raises:
        RunError: it has modules or a pooling that the engine does not compute.
    """
    modules: list[dict[str, Any]] | None = read(MODULES_FILE)
    if modules is None:
        return None
    kinds = {entry["type"].rpartition(".")[2]: entry.get("path") or "" for entry in modules}
    others = sorted(kinds.keys() - MODULES)
    if others:
        known = ", ".join(sorted(MODULES))
        raise RunError(f"{place}/{MODULES_FILE}: found {', '.join(others)}, which would be lost; expected {known}")
    if "Pooling" not in kinds:
        raise RunError(f"{place}/{MODULES_FILE}: found {', '.join(sorted(kinds))}, expected a Pooling among them")
    dense = dense_among(modules, read, place, (MODULES_FILE, CONFIG_FILE))
    pooling = _pooling(f"{place}/{kinds['Pooling']}", read(f"{kinds['Pooling']}/{CONFIG_FILE}") or {})
    text = read("sentence_bert_config.json") or {}
    if text.get("do_lower_case"):
        raise RunError(f"{place}/sentence_bert_config.json: found do_lower_case true, expected false")
    said = (read(SETTINGS_FILE) or {}).get("prompts") or {}
    query, document = sides(said)
    return Described(pooling, query, document, text.get("max_seq_length"), dense)


def sides(prompts: Mapping[str, str | None]) -> tuple[str, str]:
    """The prompts of queries and of passages among those that a model names, "" for one without."""
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if prompts.get(name)), None)
    return prompts.get("query") or "", document or ""


def _pooling(place: str, said: Mapping[str, Any]) -> Pooling:
    flags = [name.removeprefix(FLAG) for name, on in said.items() if name.startswith(FLAG) and on is True]
    mode = said.get("pooling_mode", flags)
    modes = [mode] if isinstance(mode, str) else list(mode)
    known = {**POOLING_MODES, **{flag.removeprefix(FLAG): pooling for pooling, flag in POOLING_FLAGS.items()}}
    if len(modes) != 1 or modes[0] not in known:
        raise RunError(f"{place}/{CONFIG_FILE}: found pooling {modes}, expected one of {', '.join(POOLING_MODES)}")
    if said.get("include_prompt") is False:
        raise RunError(f"{place}/{CONFIG_FILE}: found include_prompt false, expected prompts to be pooled")
    return known[modes[0]]


def stock_file(path: str, name: str) -> str | None:
    """Where a file of a model is, downloaded where the model is on the hub; None where it has no such file."""
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return found


def read_stock(path: str, name: str) -> Any:
    """A JSON file of a model, in a local folder or on the hub; None where the model has none.

    Raises:
        RunError: it is not JSON.
    """
    found = stock_file(path, name)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}/{name}: not JSON: {error}") from None
