"""What a backbone brings beside its weights: pooling, prompts and longest text, as its folder says them.

A folder of sentence-transformers says them in modules.json and the files beside it, one of ours in f2llm.json. A
bare checkpoint says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.checkpoint import INFO_FILE, check_family, load_info
from f2llm_ray.model.described import described, read_stock
from f2llm_ray.model.families import Part, Pooling, family_of
from f2llm_ray.run.folder import Folder


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
    said = described(partial(read_stock, path), path)
    if said is None:
        return bare
    return replace(bare, pooling=said.pooling, query=said.query, document=said.document)
