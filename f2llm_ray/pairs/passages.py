"""The passages that queries are wanted for: read as training reads them, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.formatting import ranked
from f2llm_ray.data.clean import fault, normalize
from f2llm_ray.data.flow import Part, Tables, checked, map_parts, parts_of
from f2llm_ray.data.language import CODE
from f2llm_ray.data.schema import KEY, text_key

if TYPE_CHECKING:
    from f2llm_ray.data.reading.base import SourceBase
    from f2llm_ray.data.settings import Data

FOUND = pa.schema(
    [
        ("part", pa.int64()),
        ("row", pa.int64()),
        ("key", KEY),  # of the text
        ("text", pa.string()),  # null where it is not drawn
        ("language", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("drop", pa.string()),
    ]
)
TWICE = "a passage that came before"
NOT_DRAWN = "not among those drawn (--limit)"


@dataclass(frozen=True)
class Passage:
    """A passage to ask about."""

    text: str
    """As training has it: normalised."""
    language: str | None
    source: str
    file: str
    """Where it was read; "" where the source has no files."""


@dataclass(frozen=True)
class Passages:
    """All passages of some sources."""

    drawn: list[Passage]
    """In the order of the sources."""
    read: int
    skipped: dict[str, int]
    """Those that are not asked about, by reason: `read` less `drawn`."""


def find_passages(sources: Mapping[str, SourceBase], settings: Data, limit: int | None) -> Passages:
    """Reads the sources on the cluster and leaves out what is no passage, or came before.

    Args:
        sources: by name.
        settings: the limits that a passage must keep.
        limit: at most so many are drawn, by content hash: a larger limit draws the same ones and more.

    Raises:
        DataError: a source that cannot be read, or a malformed row with on_bad_row "error".
    """
    work = partial(_of_part, sources=dict(sources), settings=settings, limit=limit)
    read = map_parts(parts_of(sources), work)
    tables = list(checked(read.iter_batches(batch_size=None, batch_format="pyarrow")))
    found = pa.concat_tables([FOUND.empty_table(), *tables]).sort_by([("part", "ascending"), ("row", "ascending")])
    floor = _largest_drawn(found, limit)
    skipped, seen, drawn = Counter[str](), set[bytes](), list[Passage]()
    for row in found.to_pylist():
        if row["drop"] is not None:
            skipped[row["drop"]] += 1
        elif row["key"] in seen:
            skipped[TWICE] += 1
        elif floor is not None and row["key"] > floor:
            skipped[NOT_DRAWN] += 1
            seen.add(row["key"])
        else:
            seen.add(row["key"])
            drawn.append(Passage(row["text"], row["language"], row["source"], row["file"]))
    return Passages(drawn, len(found), ranked(skipped))


def _of_part(part: Part, *, sources: Mapping[str, SourceBase], settings: Data, limit: int | None) -> Tables:
    source, found, first = sources[part.source], FOUND.empty_table(), 0
    for piece in part.pieces:
        for rows in source.read_passages(part.source, piece, settings.on_bad_row):
            some = _checked(rows, settings)
            columns = {
                "part": pa.repeat(pa.scalar(part.number, pa.int64()), len(rows)),
                "row": pa.array(range(first, first + len(rows)), pa.int64()),
                **some,
                "source": pa.repeat(part.source, len(rows)),
                "file": pa.repeat(str(piece.get("file", "")), len(rows)),
            }
            first += len(rows)
            found = pa.concat_tables([found, pa.table([columns[name] for name in FOUND.names], schema=FOUND)])
            floor = _largest_drawn(found, limit)
            if floor is not None:
                texts = [
                    text if key <= floor else None
                    for key, text in zip(found["key"].to_pylist(), found["text"].to_pylist(), strict=True)
                ]
                found = found.set_column(FOUND.get_field_index("text"), "text", pa.array(texts, pa.string()))
    yield found


def _checked(rows: pa.Table, settings: Data) -> dict[str, pa.Array]:
    """Key, text, language and fault of each passage of rows of `schema.ROW`."""
    languages = pc.coalesce(rows["passage_language"], rows["language"]).to_pylist()
    texts = [normalize(text or "") for text in rows["passage"].to_pylist()]
    drops = [
        drop or fault("passage", text, settings, code=(language or "").startswith(CODE))
        for drop, text, language in zip(rows["drop"].to_pylist(), texts, languages, strict=True)
    ]
    return {
        "key": pa.array([text_key(text) for text in texts], KEY),
        "text": pa.array(texts, pa.string()),
        "language": pa.array(languages, pa.string()),
        "drop": pa.array(drops, pa.string()),
    }


def _largest_drawn(found: pa.Table, limit: int | None) -> bytes | None:
    """The key up to which passages are drawn; None where all are."""
    if limit is None:
        return None
    keys = sorted(set(found["key"].filter(pc.is_null(found["drop"])).to_pylist()))
    return None if len(keys) <= limit else bytes(keys[limit - 1])
