"""Self-contained HTML pages: the report of a run and the data card of its corpus are drawn alike."""

from __future__ import annotations

from typing import Any

Cells = list[list[str]]
"""The rows of a table, each a text per column."""


def render_page(template: str, **values: Any) -> str:
    """Fills a template that extends `page.html`; all text in it is escaped, plots are not.

    Args:
        template: its name in this package.
        values: what it and `page.html` name: `name`, `facts` and `headline` at least.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("f2llm_ray.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
