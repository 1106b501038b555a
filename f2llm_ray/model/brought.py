"""What a backbone brings beside its weights: pooling, prompts and longest text, as its folder says them.

A folder of sentence-transformers says them in modules.json and the files beside it, one of ours in f2llm.json. A
bare checkpoint says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.checkpoint import CONFIG_FILE, INFO_FILE, POOLING_FLAGS, check_family, load_info
from f2llm_ray.model.families import Part, Pooling, family_of
from f2llm_ray.run.folder import Folder

MODULES = {"Transformer", "Pooling", "Normalize"}
"""Modules of sentence-transformers that make the vectors that the engine makes."""
POOLING_MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
"""Names of sentence-transformers 6; those before it have a flag for each (`checkpoint.POOLING_FLAGS`)."""
FLAG = "pooling_mode_"
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""What sentence-transformers calls the prompt of a passage; the first that a model has."""


@dataclass(frozen=True)
class Brought:
    """What a backbone brings."""

    pooling: Pooling
    """Its own, or that of its family."""
    query: str = ""
    """Its prompt for queries."""
    document: str = ""
    """Its prompt for passages."""
    max_tokens: int | None = None
    """Tokens of the longest text that it has positions for; None where there is no such bound."""
    cannot_cut: Mapping[Part, str] = field(default_factory=dict)
    """Parts that pruning cannot cut, and why."""


def brought_by(path: str) -> Brought:
    """What a backbone brings, a local folder or a name on the hub; its weights are not read.

    Raises:
        RunError: its family is not known here, or it has modules or a pooling that the engine does not compute.
    """
    from transformers import AutoConfig

    check_family(Folder.at(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be loaded as a model: {str(error).splitlines()[0]}") from None
    family = family_of(config, path)
    bare = Brought(family.pooling, max_tokens=family.max_tokens(config), cannot_cut=family.cannot_cut)
    if (Path(path) / INFO_FILE).is_file():
        info = load_info(Path(path))
        prompts = info.prompts
        query = "" if info.instructions else prompts.get("query", "")
        return replace(bare, pooling=info.pooling, query=query, document=prompts.get("document", ""))
    modules = _read(path, "modules.json")
    if modules is None:
        return bare
    kinds = {entry["type"].rpartition(".")[2]: entry.get("path") or "" for entry in modules}
    others = sorted(kinds.keys() - MODULES)
    if others:
        known = ", ".join(sorted(MODULES))
        raise RunError(f"{path}/modules.json: found {', '.join(others)}, which would be lost; expected {known}")
    if "Pooling" not in kinds:
        raise RunError(f"{path}/modules.json: found {', '.join(sorted(kinds))}, expected a Pooling among them")
    pooling = _pooling(f"{path}/{kinds['Pooling']}", _read(path, f"{kinds['Pooling']}/{CONFIG_FILE}") or {})
    said = _read(path, "config_sentence_transformers.json") or {}
    prompts = {name: text for name, text in (said.get("prompts") or {}).items() if text}
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), "")
    return replace(bare, pooling=pooling, query=prompts.get("query", ""), document=document)


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


def _read(path: str, name: str) -> Any:
    """A JSON file of a model, downloaded where it is on the hub; None where the model has none."""
    from transformers.utils.hub import cached_file

    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}/{name}: not JSON: {error}") from None
