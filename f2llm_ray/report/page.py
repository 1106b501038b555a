"""Texts from templates: HTML pages that need no other file, and Markdown."""

from __future__ import annotations

import re
from typing import Any

from f2llm_ray.base import formatting

Cells = list[list[str]]
"""The rows of a table, each a text per column."""


def render_page(template: str, **values: Any) -> str:
    """Fills a template; in HTML all text is escaped and plots are not, in Markdown what passes the filter `plain`.

    Args:
        template: its name in this package.
        values: what it names; a template that extends `page.html` needs `name`, `facts` and `headline`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("f2llm_ray.report", ""),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": _plain, "count": formatting.count, "plural": formatting.plural}
    return environment.get_template(template).render(**values)


def _plain(text: str) -> str:
    """Text that neither ends a cell of a Markdown table nor is markup."""
    return re.sub(r"([|`*_<>\[\]\\])", r"\\\1", text.replace("\n", " "))
