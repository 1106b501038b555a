"""Translated messages that installed packages carry in gettext catalogs.

The text is read at run time from the installed package; its licence stays the package's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from gettext import c2py
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.optional import not_installed, require
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.language import iso639_3
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase, rows_table
from f2llm_ray.data.schema import Task, seeded_key
from f2llm_ray.run.inputs import InputFile

# Babel refuses the dates of some headers ("YEAR-MO-DA", "GMT"), which nothing here needs: their names are
# overwritten by as many bytes, since a .mo file is addressed by offset.
DATE = re.compile(rb"(?:POT-Creation|PO-Revision)-Date(?=:)")
DEFAULT = re.compile(r'Default: (".+")')
COPIED = re.compile(r"[%{}<>\d]|\$")
MESSAGE_ID = re.compile(r"\S*_\S*")


class CatalogsSource(SourceBase):
    """What both sources of catalogs share."""

    pieces_per_part: ClassVar[int] = 12

    language: Output[None] = None
    """Each catalog says its own language."""
    package: Content[str] = Field(min_length=1)
    """Name of an installed package ("django") or distribution ("plone.app.locales")."""
    domains: Output[tuple[str, ...] | None] = None
    """Names of the catalogs that are read, without suffix; all when unset."""
    languages: Output[tuple[str, ...] | None] = None
    """ISO 639-3 of the languages that are read; all when unset."""

    def inputs(self, name: str) -> list[InputFile]:
        """The package, known by its version; all its catalogs where no installed distribution has its name.

        Raises:
            DataError: as `catalogs`.
        """
        try:
            return [InputFile(f"package:{self.package}", None, metadata.version(self.package))]
        except metadata.PackageNotFoundError:
            place = f"source {name!r}: package {self.package!r}"
            files = [_located(self.package, path.as_posix(), place) for path in self.catalogs(name)]
            return [InputFile(str(file), file.stat().st_size) for file in files]

    def catalogs(self, name: str) -> list[Path]:
        """Paths of the catalogs below the package's root, sorted.

        Raises:
            DataError: the package is not installed or has no catalogs, or a domain is not among them.
        """
        place = f"source {name!r}: package {self.package!r}"
        files = sorted(_files(self.package, place), key=lambda path: path.suffix)
        # One file per catalog: the .po, which has comments, where both are there.
        catalogs = {path.with_suffix("").as_posix(): path for path in files}
        found = [catalogs[catalog] for catalog in sorted(catalogs)]
        if not found:
            raise DataError(f"{place}: found no catalogs, expected <locale>/LC_MESSAGES/<domain>.po or .mo")
        there = sorted({path.stem for path in found})
        for domain in self.domains or ():
            if domain not in there:
                raise DataError(f"{place}: no domain {domain!r}; the domains are {there}")
        if self.languages is not None:
            known = {iso639_3(_locale(path)) for path in found}
            for language in self.languages:
                if language not in known:
                    raise DataError(f"{place}: no language {language!r}; the languages are {sorted(known)}")
            found = [path for path in found if iso639_3(_locale(path)) in self.languages]
        return [path for path in found if self.domains is None or path.stem in self.domains]

    def messages(self, name: str, catalog: str) -> Iterator[tuple[str, str]]:
        """English text and translation of each message that is translated and not fuzzy."""
        place = f"source {name!r}: package {self.package!r}"
        path = _located(self.package, catalog, place)
        try:
            parsed = _parsed(path)
            singular = c2py(parsed.plural_expr)(1)
        except (ValueError, OSError) as error:
            raise DataError(f"{place}: {catalog}: found a catalog that cannot be read ({error})") from None
        for message in parsed:
            if not message.id or message.fuzzy:
                continue
            english = _english(message)
            forms = (message.string,) if isinstance(message.string, str) else message.string
            text = forms[min(singular, len(forms) - 1)]
            if english.strip() and text.strip() and text.strip() != english.strip():
                yield english, text


class GettextSource(CatalogsSource):
    """From a message in some language to its English original; a catalog is a piece."""

    format: Output[Literal["gettext"]] = "gettext"
    plain: Output[bool] = False
    """Leave out messages with a placeholder, markup or a digit, which are found without being understood."""

    def pieces(self, name: str) -> list[Piece]:
        """One per catalog."""
        return [{"catalog": path.as_posix()} for path in self.catalogs(name)]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one catalog; a message without a translation is no row."""
        del bad_row
        language = iso639_3(_locale(Path(piece["catalog"])))
        rows = [
            {
                "language": language,
                "query": text,
                "passage": english,
                "passage_language": None if language == "eng" else "eng",
            }
            for english, text in self.messages(name, piece["catalog"])
            if not (self.plain and COPIED.search(english))
        ]
        yield rows_table(rows, source=name, task=self.task)


class GettextDomainSource(CatalogsSource):
    """Two messages of one domain, in one language; negatives are messages of the other domains."""

    format: Output[Literal["gettext_domain"]] = "gettext_domain"
    task: Output[Task] = "clustering"
    """What the pairs are for: it decides the losses and how negatives are found."""
    negatives: Output[int] = Field(default=2, ge=0)
    """At most this many per row."""

    def pieces(self, name: str) -> list[Piece]:
        """One per locale."""
        locales: dict[str, list[str]] = {}
        for path in self.catalogs(name):
            locales.setdefault(_locale(path), []).append(path.as_posix())
        return [{"locale": locale, "catalogs": locales[locale]} for locale in sorted(locales)]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads all catalogs of one locale."""
        del bad_row
        language = iso639_3(piece["locale"])
        domains = {catalog: {text for _, text in self.messages(name, catalog)} for catalog in piece["catalogs"]}
        rows = [
            {"language": language, "query": query, "passage": passage, "negatives": negatives}
            for domain in domains
            for query, passage, negatives in _pairs(domain, domains, self.negatives)
        ]
        yield rows_table(rows, source=name, task=self.task)


def _pairs(domain: str, domains: dict[str, set[str]], count: int) -> Iterator[tuple[str, str, list[str]]]:
    """Pairs each message of a domain with the next in an order by hash, with negatives from the others."""
    inside = sorted(domains[domain], key=lambda text: seeded_key(domain, text))
    others = set().union(*domains.values()) - domains[domain]
    outside = sorted(others, key=lambda text: seeded_key(domain, text))
    if len(inside) < 2:
        return
    drawn = min(count, len(outside))
    for query, passage in zip(inside, [*inside[1:], inside[0]], strict=True):
        start = int.from_bytes(seeded_key("negatives", domain, query), "big")
        yield query, passage, [outside[(start + i) % len(outside)] for i in range(drawn)]


def _roots(package: str) -> list[Path]:
    """Folders of an importable package (a namespace package may have several); none when there is none."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []


def _files(package: str, place: str) -> list[Path]:
    """All catalog files, relative to the folders that `_located` looks in."""
    if roots := _roots(package):
        return [path.relative_to(root) for root in roots for path in root.rglob("LC_MESSAGES/*.[pm]o")]
    files = _distribution(package, place).files or ()
    return [Path(file) for file in files if file.parent.name == "LC_MESSAGES" and file.suffix in {".po", ".mo"}]


def _distribution(package: str, place: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise DataError(f"{place}: {not_installed(package, extra='quickstart')}") from None


def _located(package: str, catalog: str, place: str) -> Path:
    """A catalog's file on this machine; a piece names it relative to the package, wherever that is here."""
    for root in _roots(package) or [Path(str(_distribution(package, place).locate_file("")))]:
        if (root / catalog).is_file():
            return root / catalog
    raise DataError(f"{place}: no file {catalog}; the installed version differs between machines")


def _locale(catalog: Path) -> str:
    return catalog.parent.parent.name


def _parsed(path: Path) -> Any:
    """A Babel catalog."""
    content = io.BytesIO(DATE.sub(lambda match: b"X" * len(match[0]), path.read_bytes()))
    if path.suffix == ".mo":
        return require("babel.messages.mofile", extra="quickstart").read_mo(content)
    with redirect_stdout(io.StringIO()):  # Babel prints what it finds odd, such as a plural form too many
        return require("babel.messages.pofile", extra="quickstart").read_po(content, ignore_obsolete=True)


def _english(message: Any) -> str:
    """The English original, or "" where the catalog does not say it.

    It is the message's id, unless that is a name such as "label_add": then an extracted comment gives it,
    as `Default: "..."`. A default over several lines is left out, since Babel keeps equal lines only once.
    """
    unescape = require("babel.messages.pofile", extra="quickstart").unescape
    comments: list[str] = message.auto_comments
    for index, comment in enumerate(comments):
        if comment.startswith("Default:"):
            match = DEFAULT.fullmatch(comment)
            goes_on = index + 1 < len(comments) and comments[index + 1].startswith('"')
            return str(unescape(match[1])) if match and not goes_on else ""
    text = message.id if isinstance(message.id, str) else message.id[0]
    return "" if MESSAGE_ID.fullmatch(text) else str(text)
