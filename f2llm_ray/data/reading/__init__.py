"""Sources: where rows come from. One file per layout; each gives rows of `schema.ROW`.

A reader splits its source into pieces (a row group, a file, a catalog, a locale), and a piece is read by a
pure function on whichever worker gets it. Pieces keep the order of the recipe and of the file names.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from f2llm_ray.data.reading.cldr import CldrKindSource, CldrNamesSource
from f2llm_ray.data.reading.datasets import DatasetsSource
from f2llm_ray.data.reading.docstrings import DocstringsSource
from f2llm_ray.data.reading.documents import DocumentsSource
from f2llm_ray.data.reading.files import F2llmSource, TableSource
from f2llm_ray.data.reading.gettext import GettextDomainSource, GettextSource
from f2llm_ray.data.reading.judged import JudgedSource
from f2llm_ray.data.reading.parallel import ParallelSource
from f2llm_ray.data.reading.tmx import TmxSource

Source: TypeAlias = Annotated[
    TableSource
    | F2llmSource
    | DatasetsSource
    | JudgedSource
    | ParallelSource
    | TmxSource
    | DocumentsSource
    | GettextSource
    | GettextDomainSource
    | CldrNamesSource
    | CldrKindSource
    | DocstringsSource,
    Field(discriminator="format"),
]
"""Any source of a recipe, told apart by its `format`."""
