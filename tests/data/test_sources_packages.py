"""Laws of the sources that installed packages carry, on the real packages."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from pydantic import ValidationError

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.optional import require
from f2llm_ray.data.language import iso639_3
from f2llm_ray.data.reading.base import Piece, SourceBase
from f2llm_ray.data.reading.cldr import LABEL, CldrKindSource, CldrNamesSource
from f2llm_ray.data.reading.docstrings import DocstringsSource
from f2llm_ray.data.reading.gettext import GettextDomainSource, GettextSource
from f2llm_ray.data.schema import ROW
from f2llm_ray.run.inputs import InputFile

CATALOG = r"""
msgid ""
msgstr ""
"PO-Revision-Date: YEAR-MO-DA HO:MI +ZONE\n"
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\n"

msgid "Good morning"
msgstr "Guten Morgen"

#. Some note.
#. Default: "Say \"hello\""
msgid "label_hello"
msgstr "Sag »hallo«"

msgid "label_without_english"
msgstr "ohne Englisch"

#. Default: ""
#. "over several lines"
msgid "label_long"
msgstr "über mehrere Zeilen"

#, fuzzy
msgid "Unsure"
msgstr "Unsicher"

msgid "Untranslated"
msgstr ""

msgid "Internet"
msgstr "Internet"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d Tag"
msgstr[1] "%d Tage"

#~ msgid "Obsolete"
#~ msgstr "Veraltet"
"""


def read(source: SourceBase, pieces: Iterable[Piece] | None = None) -> list[dict[str, Any]]:
    """Rows of some pieces (all by default), each checked for what holds for every package source."""
    found: list[dict[str, Any]] = []
    for piece in source.pieces("s") if pieces is None else pieces:
        for table in source.read("s", piece, "error"):
            assert table.schema == ROW
            found += table.to_pylist()
    assert found
    for row in found:
        assert re.fullmatch("[a-z]{3}", row["language"])
        assert row["passage_language"] in {None, "eng", "code:python"}
        assert row["query"].strip()
        assert row["passage"].strip()
        assert row["query"] != row["passage"]
        assert row["drop"] is None
    return found


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package with catalogs: de .po and .mo, fr .mo only."""
    monkeypatch.syspath_prepend(tmp_path)
    for locale in ("de", "fr"):
        folder = tmp_path / "tiny_catalogs" / "locale" / locale / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "app.po").write_text(CATALOG, encoding="utf-8")
        lines = [line for line in CATALOG.splitlines() if "Revision" not in line]
        with (folder / "app.mo").open("wb") as file:
            write_mo(file, read_po(iter(f"{line}\n" for line in lines)))
    (folder / "app.po").unlink()
    (tmp_path / "tiny_catalogs" / "__init__.py").touch()
    return "tiny_catalogs"


@pytest.mark.parametrize(
    "source",
    [
        GettextSource(package="plone.app.locales"),
        GettextDomainSource(package="plone.app.locales"),
        GettextSource(package="django"),
        CldrNamesSource(),
        CldrKindSource(),
        DocstringsSource(),
    ],
    ids=lambda source: source.format,
)
def test_pieces_and_rows_are_the_same_twice(source: SourceBase) -> None:
    pieces = source.pieces("s")
    assert pieces == source.pieces("s")
    assert pieces == json.loads(json.dumps(pieces))
    assert not re.search(r'"/', json.dumps(pieces)), "a piece must not name a path of this machine"
    some = pieces[:: len(pieces) // 3]
    assert read(source, some) == read(source, some)


@pytest.mark.parametrize(
    ("source", "uri", "version"),
    [
        (
            GettextSource(package="plone.app.locales"),
            "package:plone.app.locales",
            metadata.version("plone.app.locales"),
        ),
        (GettextDomainSource(package="django"), "package:django", metadata.version("django")),
        (CldrNamesSource(), "package:Babel", metadata.version("babel")),
        (CldrKindSource(), "package:Babel", metadata.version("babel")),
        (DocstringsSource(modules=("json",)), "python", platform.python_version()),
    ],
    ids=lambda value: getattr(value, "format", None),
)
def test_packages_are_known_by_their_version(source: SourceBase, uri: str, version: str) -> None:
    assert source.inputs("s") == [InputFile(uri, None, version)]
    assert source.piece_inputs(source.pieces("s")[0]) == [uri]


def test_a_package_without_a_version_is_known_by_its_catalogs(package: str, tmp_path: Path) -> None:
    source = GettextSource(package=package)
    files = [str(tmp_path / package / piece["catalog"]) for piece in source.pieces("s")]
    assert [(file.uri, file.version) for file in source.inputs("s")] == [(file, "") for file in files]
    assert source.piece_inputs(source.pieces("s")[0]) == files


# --- gettext --------------------------------------------------------------------------------------------


def test_a_catalog_gives_its_translated_messages_with_their_english(package: str) -> None:
    source = GettextSource(package=package)
    assert [piece["catalog"][-6:] for piece in source.pieces("s")] == ["app.po", "app.mo"]
    german = [(row["query"], row["passage"]) for row in read(source) if row["language"] == "deu"]
    assert german == [
        ("Guten Morgen", "Good morning"),
        ("Sag »hallo«", 'Say "hello"'),
        ("%d Tag", "%d day"),
    ]
    french = {row["query"] for row in read(source) if row["language"] == "fra"}
    assert french == {"Guten Morgen", "%d Tag"}


def test_plone_speaks_at_least_40_languages() -> None:
    found = read(GettextSource(package="plone.app.locales", domains=("plonelocales", "cmfeditions")))
    assert len({row["language"] for row in found} - {"und"}) >= 40
    assert not any("_" in row["passage"] and " " not in row["passage"] for row in found)
    assert all(row["passage_language"] == ("eng" if row["language"] != "eng" else None) for row in found)


def test_a_distribution_name_is_as_good_as_a_package_name() -> None:
    by_package, by_distribution = GettextSource(package="django"), GettextSource(package="Django")
    german = "conf/locale/de/LC_MESSAGES/django.po"
    below = [piece for piece in by_distribution.pieces("s") if piece["catalog"].endswith(f"/{german}")]
    assert read(by_package, [{"catalog": german}]) == read(by_distribution, below)


def test_a_package_that_is_not_installed_names_the_extra() -> None:
    for package in ("no_such_package", "no.such.package"):
        with pytest.raises(DataError, match=rf"'{package}' is not installed.*f2llm-ray\[quickstart\]"):
            GettextSource(package=package).pieces("s")


def test_a_package_without_catalogs_and_an_unknown_domain() -> None:
    with pytest.raises(DataError, match="found no catalogs"):
        GettextSource(package="yaml").pieces("s")
    with pytest.raises(DataError, match=r"no domain 'nope'; the domains are \['cmfeditions', "):
        GettextSource(package="plone.app.locales", domains=("plone", "nope")).pieces("s")


def test_a_damaged_catalog_is_named(package: str, tmp_path: Path) -> None:
    source = GettextSource(package=package)
    pieces = source.pieces("s")
    (tmp_path / package / "locale/fr/LC_MESSAGES/app.mo").write_bytes(b"nothing of the kind, at all, whatever")
    with pytest.raises(DataError, match=r"locale/fr/LC_MESSAGES/app\.mo: found a catalog that cannot be read"):
        read(source, pieces)


def test_a_language_for_all_catalogs_is_refused() -> None:
    with pytest.raises(ValidationError, match="language"):
        GettextSource.model_validate({"format": "gettext", "package": "django", "language": "deu"})


# --- gettext_domain -------------------------------------------------------------------------------------


def test_pairs_share_a_domain_and_negatives_never_do() -> None:
    source = GettextDomainSource(package="plone.app.locales", negatives=3)
    catalogs = GettextSource(package="plone.app.locales")
    for piece in [piece for piece in source.pieces("s") if piece["locale"] in {"de", "ja", "pt_BR"}]:
        domains = [{row["query"] for row in read(catalogs, [{"catalog": path}])} for path in piece["catalogs"]]
        found = read(source, [piece])
        assert len(found) == sum(map(len, domains))
        for row in found:
            shared = [texts for texts in domains if {row["query"], row["passage"]} <= texts]
            assert any(not texts.intersection(row["negatives"]) for texts in shared)
            assert len(set(row["negatives"])) == 3


def test_one_domain_alone_has_no_negatives(package: str) -> None:
    assert all(row["negatives"] == [] for row in read(GettextDomainSource(package=package)))


# --- cldr -----------------------------------------------------------------------------------------------


def test_cldr_names_in_some_languages() -> None:
    source = CldrNamesSource()
    wanted = [piece for piece in source.pieces("s") if piece["language"] in {"de", "ja", "sr"}]
    found = {(row["language"], row["query"], row["passage"]) for row in read(source, wanted)}
    assert {
        ("deu", "Deutschland", "Germany"),
        ("jpn", "ドイツ語", "German"),
        ("deu", "Kyrillisch", "Cyrillic"),
        ("jpn", "米ドル", "US Dollar"),
        ("deu", "Quadratkilometer", "square kilometers"),
        ("deu", "Tokio", "Tokyo"),
        ("jpn", "1月", "January"),
        ("deu", "Dienstag", "Tuesday"),
        ("srp", "Nemačka", "Germany"),
        ("srp", "Немачка", "Germany"),
    } <= found
    assert len(found) == len(read(source, wanted)), "a variant must not repeat its base locale"


def test_cldr_covers_hundreds_of_languages() -> None:
    found = read(CldrNamesSource(kinds=("weekdays", "months")))
    languages = {row["language"] for row in found}
    assert len(languages) > 150
    assert "eng" not in languages
    assert not {row["query"] for row in found} & {"M01", "Mon", "1", "January"}


def test_a_kind_is_told_by_one_label_and_contradicted_by_the_others() -> None:
    kinds = ("languages", "scripts", "currencies")
    source = CldrKindSource(kinds=kinds)
    found = read(source, [piece for piece in source.pieces("s") if piece["language"] in {"de", "hi"}])
    labels = {LABEL[kind] for kind in kinds}
    assert {row["passage"] for row in found} == labels
    for row in found:
        assert set(row["negatives"]) == labels - {row["passage"]}
    queries = [(row["language"], row["query"]) for row in found]
    assert len(set(queries)) == len(queries)
    assert ("deu", "Koptisch") not in queries, "both a language and a script"


def test_kinds_must_be_known_and_several() -> None:
    with pytest.raises(ValidationError, match="territories"):
        CldrNamesSource.model_validate({"format": "cldr_names", "kinds": ["planets"]})
    with pytest.raises(ValidationError, match="at least 2"):
        CldrKindSource(kinds=("months",))


# --- docstrings -----------------------------------------------------------------------------------------


def test_docstrings_lead_to_code_without_them() -> None:
    found = read(DocstringsSource(modules=("textwrap", "json")))
    passages = {row["query"]: row["passage"] for row in found}
    code = passages["Remove any common leading whitespace from every line in `text`."]
    assert code.startswith("def dedent(text):")
    assert "common leading whitespace from every line" not in code
    assert any(row["passage"].startswith("def loads(") for row in found)
    assert {(row["language"], row["passage_language"]) for row in found} == {("eng", "code:python")}
    for row in found:
        compile(row["passage"], "passage", "exec")


def test_the_library_leaves_tests_and_site_packages_out() -> None:
    files = [file for piece in DocstringsSource().pieces("s") for file in piece["files"]]
    assert len(files) == len(set(files)) > 300
    assert not any(re.search(r"(^|/)(tests?|site-packages)/", file) for file in files)
    with pytest.raises(DataError, match="no module 'nosuchmodule'"):
        DocstringsSource(modules=("nosuchmodule",)).pieces("s")


# --- languages and optional packages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("de", "deu"),
        ("pt_BR", "por"),
        ("pt-BR", "por"),
        ("zh", "zho"),
        ("zh_Hans", "zho"),
        ("sr@latin", "srp"),
        ("no", "nor"),
        ("nb", "nob"),
        ("nb_NO", "nob"),
        ("iw", "heb"),
        ("ger", "deu"),
        ("deu", "deu"),
        ("fil", "fil"),
        ("xx", "und"),
        ("", "und"),
        ("klingonese", "und"),
    ],
)
def test_language_codes(code: str, expected: str) -> None:
    assert iso639_3(code) == expected


def test_a_missing_library_names_itself_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'no_such_library' is not installed.*f2llm-ray\[datasets\]"):
        require("no_such_library.part", extra="datasets")
    monkeypatch.setitem(sys.modules, "babel", None)  # how Python marks a package that must not be found
    monkeypatch.setitem(sys.modules, "babel.localedata", None)
    with pytest.raises(DataError, match=r"'babel' is not installed.*f2llm-ray\[quickstart\]"):
        CldrNamesSource().pieces("s")
