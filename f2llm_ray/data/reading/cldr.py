"""Names in the Unicode CLDR, as Babel carries them: of countries, languages, currencies and so on.

The text is read at run time from the installed package; its licence stays Unicode's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, get_args

import pyarrow as pa
from pydantic import Field

from f2llm_ray.base.optional import require
from f2llm_ray.base.section import Output
from f2llm_ray.data.language import iso639_3
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase, rows_table
from f2llm_ray.data.schema import Task
from f2llm_ray.run.inputs import InputFile

Kind = Literal["territories", "languages", "scripts", "currencies", "units", "cities", "months", "weekdays"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABEL: dict[Kind, str] = {
    "territories": "name of a country or region",
    "languages": "name of a language",
    "scripts": "name of a writing system",
    "currencies": "name of a currency",
    "units": "name of a unit of measurement",
    "cities": "name of a city",
    "months": "name of a month",
    "weekdays": "name of a weekday",
}


class LocalesSource(SourceBase):
    """What both sources of names share: a language is a piece.

    Its base locale is read first and then its variants (another script or territory), which mostly repeat
    it: each name counts once per language.
    """

    pieces_per_part: ClassVar[int] = 12

    language: Output[None] = None
    """Each locale says its own language."""
    kinds: Output[tuple[Kind, ...]] = KINDS
    """What the names are of."""

    def inputs(self, name: str) -> list[InputFile]:
        """Babel, known by its version."""
        del name
        return [InputFile("package:Babel", None, require("babel", extra="quickstart").__version__)]

    def pieces(self, name: str) -> list[Piece]:
        """One per language, English left out."""
        del name
        languages: dict[str, list[str]] = {}
        for locale in sorted(require("babel.localedata", extra="quickstart").locale_identifiers()):
            languages.setdefault(locale.partition("_")[0], []).append(locale)
        return [
            {"language": language, "locales": languages[language]} for language in languages if language != "en"
        ]

    def names(self, piece: Piece) -> dict[tuple[Kind, str, str], None]:
        """Kind, English name and own name of all that a language names, in a fixed order, each once.

        Names that equal their code, the English one or the root locale's stand-in say nothing.
        """
        found: dict[tuple[Kind, str, str], None] = {}
        for kind in dict.fromkeys(self.kinds):
            english_names, stand_ins = _names("en", kind), _names("root", kind)
            for locale in piece["locales"]:
                for code, (own, *_) in _names(locale, kind).items():
                    english = english_names.get(code) or _spelled_out(code, kind)
                    if english and own not in {code, *english, *stand_ins.get(code, ())}:
                        found[kind, english[0], own] = None
        return found


class CldrNamesSource(LocalesSource):
    """From a name in some language to the English name."""

    format: Output[Literal["cldr_names"]] = "cldr_names"

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one language."""
        del bad_row
        language = iso639_3(piece["language"])
        rows = [
            {"language": language, "query": own, "passage": english, "passage_language": "eng"}
            for english, own in dict.fromkeys((english, own) for _, english, own in self.names(piece))
        ]
        yield rows_table(rows, source=name, task=self.task)


class CldrKindSource(LocalesSource):
    """From a name in some language to what it is a name of; negatives are the other kinds.

    A name of two kinds, such as a language and its script, is left out.
    """

    format: Output[Literal["cldr_kind"]] = "cldr_kind"
    task: Output[Task] = "classification"
    """What the pairs are for: it decides the losses and how negatives are found."""
    kinds: Output[tuple[Kind, ...]] = Field(default=KINDS, min_length=2)
    """What the names are of."""

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one language."""
        del bad_row
        kinds: dict[str, set[Kind]] = {}
        for kind, _, own in self.names(piece):
            kinds.setdefault(own, set()).add(kind)
        rows = [
            {
                "language": iso639_3(piece["language"]),
                "query": own,
                "passage": LABEL[kind],
                "negatives": [LABEL[other] for other in dict.fromkeys(self.kinds) if other != kind],
                "passage_language": "eng",
            }
            for own, (kind, *others) in kinds.items()
            if not others
        ]
        yield rows_table(rows, source=name, task=self.task)


def _names(locale_name: str, kind: Kind) -> dict[str, tuple[str, ...]]:
    """Code to names in a locale, the one to use first."""
    locale = require("babel", extra="quickstart").Locale.parse(locale_name)
    if kind == "units":
        units = {
            unit: tuple(names[width] for width in ("long", "short", "narrow") if width in names)
            for unit, names in locale.unit_display_names.items()
        }
        return {unit: names for unit, names in units.items() if names}
    if kind == "cities":
        zones = locale.time_zones.items()
        return {zone: (names["city"],) for zone, names in zones if "city" in names}
    if kind in {"months", "weekdays"}:
        # Not "stand-alone": in most locales it is an alias, and Babel writes what an alias stands for in one
        # locale into data that locales share, so that what is read would depend on what was read before.
        widths = locale.months if kind == "months" else locale.days
        return {str(number): (name,) for number, name in widths["format"]["wide"].items()}
    return {str(code): (name,) for code, name in getattr(locale, kind).items()}


def _spelled_out(code: str, kind: Kind) -> tuple[str, ...]:
    """English names that the CLDR leaves to the code: of cities, such as Europe/Isle_of_Man."""
    return (code.rpartition("/")[2].replace("_", " "),) if kind == "cities" else ()
