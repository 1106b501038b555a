"""YAML as recipes are read: a key stands once."""

from __future__ import annotations

from typing import Any

import yaml


def read_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        yaml.YAMLError: it is not YAML, or a key stands twice in one mapping.
    """
    return yaml.load(text, _EachKeyOnce)  # noqa: S506 - a SafeLoader


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML's own loader keeps the last, and a source is lost."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set[tuple[str, str]]()
        for key, _ in node.value if node is not None else ():
            said = (key.tag, str(key.value))
            if said in seen:
                problem = f"found the key {said[1]!r} twice in one mapping, expected each once"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add(said)
        return node
