"""Every record of a file becomes rows that are kept, or dropped for the reason that was planted: none is lost."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.data.clean import clean, normalize
from f2llm_ray.data.reading.columns import Columns
from f2llm_ray.data.reading.files import TableSource
from f2llm_ray.data.settings import Data
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe
from tests.corpus import write_recipe
from tests.tiny import tiny_model

LIMIT = 200
"""Characters of the longest text that is kept."""
COLUMNS = Columns(negatives="negatives", language="language")
NAMES = ("query", "passage", "negatives", "language")
JSON, CELLS = ("jsonl", "json"), ("csv", "tsv")
FORMATS = ("parquet", *JSON, *CELLS)


@dataclass(frozen=True)
class Record:
    """One record of a file, and what must become of it."""

    values: dict[str, Any]
    drop: str | None = None
    """What its rows are dropped for."""
    rows: int = 1
    """How many rows it reads as."""
    broken: Callable[[str], str] | None = None
    """Breaks its line."""


def record(kind: str, form: str, number: int, inside: str, word: str, share: float) -> Record:
    """A record with one thing wrong with it; a good one where the format cannot have that.

    All texts begin with the number, so that no two are equal; `inside` and `word` are parts of them, and `share`
    says where a line is cut.
    """
    query, passage = f"{number} asks {inside} this", f"{number} is told {word}."
    good = {"query": query, "passage": passage, "negatives": ["no", None, " "], "language": "deu"}
    if form in CELLS:
        good["negatives"] = "no"
    plain = {**good, "query": f"{number} a", "passage": f"{number} b"}
    mark = "\t" if form == "tsv" else ","
    anywhere = {
        "no text": Record({**good, "query": "" if form in CELLS else None}, "read: empty query"),
        "blank text": Record({**good, "passage": " \u3000"}, "read: empty passage"),
        "no language": Record({**good, "language": "klingonish"}, "read: unknown language"),
        "too long": Record({**good, "passage": f"{number} " + "abc " * LIMIT}, "clean: passage too long"),
        "equal": Record({**good, "passage": f" {query} "}, "clean: query equals passage"),
        "invisible": Record({**good, "query": "\u200e\u00ad"}, "clean: query too short"),
    }
    in_lists = {
        "several": Record({**good, "passage": [f"{number}.{n} {word}." for n in range(3)]}, rows=3),
        "none of several": Record({**good, "passage": []}, "read: empty passage"),
    }
    in_json = {
        "wrong type": Record(
            {**good, "query": (7, 0.5, True, {"a": 1}, ["a"])[number % 5]}, "read: query is not text"
        ),
        "no key": Record({name: good[name] for name in NAMES[1:]}, "read: no query"),
    }
    in_lines = {
        "cut line": Record(good, "read: not JSON", broken=lambda line: line[: max(1, int(share * len(line)))]),
        "key twice": Record(plain, "read: a key twice", broken=lambda line: line[:-1] + ', "query": "again"}'),
        "no object": Record(plain, "read: not a JSON object", broken=lambda _: "7"),
    }
    in_cells = {
        "too many": Record(plain, "read: too many fields", broken=lambda line: line + mark),
        "too few": Record(plain, "read: too few fields", broken=lambda line: line.rpartition(mark)[0]),
    }
    in_csv = {"stray quote": Record(plain, "read: not CSV", broken=lambda line: '"' + line)}
    in_bytes = {"not utf-8": Record(plain, "read: not UTF-8", broken=lambda line: line.replace("a", "\udcff", 1))}
    can = {
        **anywhere,
        **(in_lists if form not in CELLS else {}),
        **(in_json if form in JSON else {}),
        **(in_lines if form == "jsonl" else {}),
        **(in_cells if form in CELLS else {}),
        **(in_csv if form == "csv" else {}),
        **(in_bytes if form in ("jsonl", *CELLS) else {}),
    }
    return can.get(kind, Record(good))


KINDS = (
    *("no text", "blank text", "no language", "too long", "equal", "invisible", "several", "none of several"),
    *(
        "wrong type",
        "no key",
        "cut line",
        "key twice",
        "no object",
        "too many",
        "too few",
        "stray quote",
        "not utf-8",
    ),
)


def write(records: Sequence[Record], form: str) -> bytes:
    """The file of the records."""
    rows = [each.values for each in records]
    if form == "parquet":
        several = any(isinstance(row["passage"], list) for row in rows)
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in NAMES}
        if several:
            columns["passage"] = [text if isinstance(text, list) else [text] for text in columns["passage"]]
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out, row_group_size=7)
        return out.getvalue()
    if form == "json":
        return json.dumps(rows, ensure_ascii=False).encode()
    lines = [_line(row, form) for row in rows]
    lines = [each.broken(line) if each.broken else line for each, line in zip(records, lines, strict=True)]
    header = {"csv": [",".join(NAMES)], "tsv": ["\t".join(NAMES)]}.get(form, [])
    return "".join(f"{line}\n" for line in [*header, *lines]).encode(errors="surrogateescape")


def _line(row: dict[str, Any], form: str) -> str:
    if form == "jsonl":
        return json.dumps(row, ensure_ascii=False)
    if form == "tsv":
        return "\t".join(row.values())
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(row.values())
    return out.getvalue()[:-1]


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return bytes(out.getvalue().to_pybytes())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def expected(records: Sequence[Record]) -> list[str | None]:
    return [each.drop for each in records for _ in range(each.rows)]


def as_planted(drop: str | None) -> str | None:
    """A quote that nobody closes is known by what comes after it: another quote, or lines that read like rows."""
    return "read: not CSV" if drop == "read: a quote that is not closed" else drop


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<&"), max_size=12)
INSIDE = st.sampled_from(["", ', "', "\n", '"', "; |", "\n\n,", "\\"])


@st.composite
def files(draw: st.DrawFn, form: str) -> list[Record]:
    kinds = draw(st.lists(st.sampled_from((*KINDS, *["good"] * len(KINDS))), min_size=1, max_size=30))
    return [
        record(
            kind,
            form,
            number,
            draw(TEXTS) + ("" if form == "tsv" else draw(INSIDE)),
            draw(TEXTS),
            draw(st.floats(0.05, 0.95)),
        )
        for number, kind in enumerate(kinds)
    ]


@settings(max_examples=200)
@given(data=st.data(), form=st.sampled_from(FORMATS), packed=st.sampled_from(list(COMPRESS)))
def test_rows_in_are_rows_kept_and_rows_dropped_by_reason(data: st.DataObject, form: str, packed: str) -> None:
    records = data.draw(files(form))
    ending = "" if form == "parquet" else packed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{form}{ending}"
        path.write_bytes(COMPRESS[ending](write(records, form)))
        source = TableSource.model_validate({"format": form, "paths": [str(path)], "columns": COLUMNS})
        tables = [table for piece in source.pieces("s") for table in source.read("s", piece, "skip")]
    found = clean(pa.concat_tables(tables), Data(max_chars=LIMIT)).to_pylist()
    assert [as_planted(row["drop"]) for row in found] == expected(records)
    texts = [
        (each.values["query"], passage)
        for each in records
        if each.drop is None
        for passage in (each.values["passage"] if each.rows > 1 else [each.values["passage"]])
    ]
    kept = [row for row in found if row["drop"] is None]
    assert [(row["query"], row["passage"]) for row in kept] == [(normalize(q), normalize(p)) for q, p in texts]
    assert all(row["negatives"] == ["no"] and row["language"] == "deu" for row in kept)


@pytest.mark.usefixtures("ray_here")
def test_a_run_counts_every_record_of_every_file(tmp_path: Path) -> None:
    """All kinds in all formats at once; each good record of the first file stands in a second one again."""
    sources, planted = {}, {}
    for place, (form, packed) in enumerate(zip(FORMATS, COMPRESS, strict=True)):
        records = [
            record(kind, form, 100 * place + number, '"in", \n' if form != "tsv" else "in", "word", 0.5)
            for number, kind in enumerate([*KINDS, *["good"] * 20])
        ]
        again = [each for each in records if each.drop is None]
        folder = tmp_path / form
        folder.mkdir()
        ending = "" if form == "parquet" else packed
        for name, some in (("a", records), ("b", again)):
            (folder / f"{name}.{form}{ending}").write_bytes(COMPRESS[ending](write(some, form)))
        columns = COLUMNS.model_dump(exclude_unset=True)
        sources[form] = {"format": form, "paths": [str(folder)], "columns": columns}
        planted[form] = Counter([*expected(records), *["dedup: same row"] * len(expected(again))])
    content = {
        "name": "counted",
        "sources": sources,
        "data": {"max_chars": LIMIT, "max_tokens": 32, "shards": 2, "on_bad_row": "skip"},
        "tokenizer": {"path": str(tiny_model(tmp_path / "tiny"))},
        "backbone": {"shape": {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}},
        "stages": {"stage1": {"engine": {"precision": "fp32"}}},
    }
    pipeline = Pipeline(load_recipe(str(write_recipe(tmp_path, content))), str(tmp_path / "root"))
    pipeline.job("prepare")
    prepared = pipeline.run.folder(pipeline.graph.prepare)
    card = prepared.read_json("card.json")
    for form, counts in planted.items():
        found: Counter[str | None] = Counter()
        for row in card["rows"]:
            if row["source"] == form:
                found[as_planted(row["drop"])] += row["rows"]
        assert found == counts, form
        assert len(prepared.read_table(f"table/{form}.parquet")) == counts[None]
    written = [prepared.read_table(f"rows/{file}") for file in (prepared / "rows").files(".parquet")]
    assert sum(map(len, written)) == card["steps"][0]["in"] == sum(map(Counter.total, planted.values()))
    assert card["steps"][-1]["out"] == sum(counts[None] for counts in planted.values())
    assert all(pc.all(pc.is_valid(table["row_key"])).as_py() for table in written)
