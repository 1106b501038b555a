"""Laws of the file sources: what is written comes back as rows, and every fault is named or counted."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import socket
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading.base import BadRow, SourceBase
from f2llm_ray.data.reading.columns import Columns
from f2llm_ray.data.reading.datasets import DatasetsSource
from f2llm_ray.data.reading.files import F2llmSource, TableSource
from f2llm_ray.data.reading.judged import JudgedSource
from f2llm_ray.data.reading.parallel import ParallelSource
from f2llm_ray.data.reading.tables import TABLE_ROWS
from f2llm_ray.data.schema import ROW, TASKS
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.folder import Folder

FULL = Columns(negatives="negatives", language="language", passage_language="passage_language")
PAIRS = [{"query": f"question {i}", "passage": f"answer {i}"} for i in range(5)]
MIXED = [
    {
        "query": "wie spät?",
        "passage": "noon",
        "negatives": ["a", None, " ", "b"],
        "language": "deu",
        "passage_language": "eng",
    },
    {"query": "何時", "passage": "正午", "negatives": None, "language": "jpn", "passage_language": "jpn"},
    {"query": "q", "passage": "p", "negatives": [], "language": None, "passage_language": ""},
]


def rows(source: SourceBase, bad_row: BadRow = "error") -> list[dict[str, Any]]:
    """All rows of a source, each table checked against the schema."""
    pieces = source.pieces("s")
    assert pieces == source.pieces("s")
    assert pieces == json.loads(json.dumps(pieces))
    found: list[dict[str, Any]] = []
    for piece in pieces:
        for table in source.read("s", piece, bad_row):
            assert table.schema == ROW
            table.validate(full=True)
            found += table.to_pylist()
    return found


def drops(source: SourceBase) -> list[str | None]:
    """The drop column; a dropped row has empty texts."""
    found = rows(source, "skip")
    assert all((row["query"], row["passage"], row["negatives"]) == ("", "", []) for row in found if row["drop"])
    return [row["drop"] for row in found]


def pairs(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["query"], row["passage"]) for row in found]


def write_parquet(path: Path, table: pa.Table | list[dict[str, Any]], group: int | None = None) -> str:
    pq.write_table(pa.Table.from_pylist(table) if isinstance(table, list) else table, path, row_group_size=group)
    return str(path)


def write_lines(path: Path, *lines: str | bytes | dict[str, Any]) -> str:
    data = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return str(path)


def parquet(*paths: Path | str, **settings: Any) -> TableSource:
    return TableSource(format="parquet", paths=tuple(map(str, paths)), **settings)


def jsonl(*paths: Path | str, **settings: Any) -> TableSource:
    return TableSource(format="jsonl", paths=tuple(map(str, paths)), **settings)


def table_csv(*paths: Path | str, **settings: Any) -> TableSource:
    return TableSource(format="csv", paths=tuple(map(str, paths)), **settings)


def tsv(*paths: Path | str, **settings: Any) -> TableSource:
    return TableSource(format="tsv", paths=tuple(map(str, paths)), **settings)


# --- what is written comes back -------------------------------------------------------------------------


def test_all_layouts_give_the_same_rows(tmp_path: Path) -> None:
    cells = [
        ",".join(
            '"' + (json.dumps(v) if isinstance(v, list) else v or "").replace('"', '""') + '"'
            for v in row.values()
        )
        for row in MIXED
    ]
    datasets.Dataset.from_list(MIXED).save_to_disk(tmp_path / "saved")
    found = [
        rows(source)
        for source in (
            parquet(write_parquet(tmp_path / "a.parquet", MIXED, group=2), columns=FULL, language="fra"),
            jsonl(write_lines(tmp_path / "a.jsonl", *MIXED), columns=FULL, language="fra"),
            table_csv(write_lines(tmp_path / "a.csv", ",".join(MIXED[0]), *cells), columns=FULL, language="fra"),
            DatasetsSource(path=str(tmp_path / "saved"), columns=FULL, language="fra"),
        )
    ]
    assert all(other == found[0] for other in found)
    assert [row["negatives"] for row in found[0]] == [["a", "b"], [], []]
    assert [row["language"] for row in found[0]] == ["deu", "jpn", "fra"]
    assert [row["passage_language"] for row in found[0]] == ["eng", None, None]
    assert {row["source"] for row in found[0]} == {"s"}


def test_a_row_group_is_a_piece_and_keeps_the_order(tmp_path: Path) -> None:
    source = parquet(write_parquet(tmp_path / "a.parquet", PAIRS, group=2))
    assert [piece["row_group"] for piece in source.pieces("s")] == [0, 1, 2]
    assert pairs(rows(source)) == [(row["query"], row["passage"]) for row in PAIRS]


def test_columns_and_task_of_the_recipe_are_used(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"q": "x", "label": "y", "other": 1})
    (row,) = rows(jsonl(path, task="classification", columns=Columns(query="q", passage="label")))
    assert (row["query"], row["passage"], row["task"], row["drop"]) == ("x", "y", "classification", None)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_text_type_of_arrow_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["x", "y"]).cast(kind)
    path = write_parquet(tmp_path / "a.parquet", pa.table({"query": column, "passage": pa.array(["1", "2"])}))
    assert pairs(rows(parquet(path))) == [("x", "1"), ("y", "2")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_classes_may_be_numbers(tmp_path: Path, suffix: str) -> None:
    found = [{**pair, "class": number} for number, pair in enumerate(PAIRS)]
    write_lines(tmp_path / "a.jsonl", *found)
    cells = [",".join(map(str, row.values())) for row in found]
    write_lines(tmp_path / "a.csv", ",".join(found[0]), *cells)
    write_parquet(tmp_path / "a.parquet", found)
    settings = {"format": suffix, "paths": (str(tmp_path),), "task": "clustering", "columns": {"label": "class"}}
    assert [row["label"] for row in rows(TableSource.model_validate(settings))] == ["0", "1", "2", "3", "4"]
    write_parquet(tmp_path / "a.parquet", [{**PAIRS[0], "class": 1.5}])
    if suffix == "parquet":
        with pytest.raises(
            DataError, match=r"a\.parquet: row 0 .*class: found float 1\.5, expected text or a whole"
        ):
            rows(TableSource.model_validate(settings))


def test_long_files_come_in_several_tables_with_right_line_numbers(tmp_path: Path) -> None:
    lines = [*PAIRS[:1] * (TABLE_ROWS + 1), {"query": 1, "passage": "x"}]
    source = jsonl(write_lines(tmp_path / "a.jsonl", *lines))
    assert [len(table) for table in source.read("s", source.pieces("s")[0], "skip")] == [TABLE_ROWS, 2]
    with pytest.raises(DataError, match=rf"a\.jsonl:{TABLE_ROWS + 2}: query"):
        rows(source)


def test_folders_and_globs_are_sorted_and_leave_other_files_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, {"query": name, "passage": "p"})
    folder = [query for query, _ in pairs(rows(jsonl(tmp_path)))]
    assert folder == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert [query for query, _ in pairs(rows(jsonl(tmp_path / "*.jsonl")))] == folder[:2]
    assert [query for query, _ in pairs(rows(jsonl(tmp_path / "**" / "[bc].jsonl")))] == folder[1:]
    assert [query for query, _ in pairs(rows(jsonl(tmp_path.as_uri())))] == folder
    both = jsonl(tmp_path / "b.jsonl", tmp_path / "*.jsonl")
    assert [query for query, _ in pairs(rows(both))] == ["b.jsonl", "a.jsonl"]


def test_a_link_leads_to_a_file_once_and_to_nothing_never(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", PAIRS[0])
    (tmp_path / "0.jsonl").symlink_to("a.jsonl")
    (tmp_path / "above").symlink_to(".")
    write_lines(tmp_path.parent / "elsewhere.jsonl", PAIRS[1])
    (tmp_path / "b.jsonl").symlink_to(tmp_path.parent / "elsewhere.jsonl")
    (tmp_path.parent / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "**" / "*.jsonl", tmp_path.parent / "link"):
        assert [Path(file.uri).name for file in jsonl(path).inputs("s")] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.jsonl").symlink_to("nowhere.jsonl")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=r"c\.jsonl: found a link that leads to nothing, expected a file"):
            jsonl(path).inputs("s")
    (tmp_path / "c.jsonl").rename(tmp_path / "c.txt")
    assert len(jsonl(tmp_path).inputs("s")) == 2


def test_fsspec_uris_are_read(tmp_path: Path) -> None:
    for name in "ba":
        write_parquet(tmp_path / f"{name}.parquet", [{"query": name, "passage": "p"}])
    assert pairs(rows(parquet(f"local://{tmp_path}/*.parquet"))) == [("a", "p"), ("b", "p")]


def test_paths_of_the_hub_open_without_a_network_and_fail_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    uri = "hf://datasets/owner/name/folder"
    folder = Folder.at(uri)
    assert (folder.path, folder.uri, folder.local) == ("datasets/owner/name/folder", uri, None)
    for path in (f"{uri}/*.parquet", f"{uri}/a.parquet", uri, "hf://name"):
        started = time.monotonic()
        with pytest.raises(DataError, match=rf"^source 's': {re.escape(path)}: cannot be opened: \S"):
            parquet(path).pieces("s")
        assert time.monotonic() - started < 10


def test_csv_fields_may_hold_quotes_commas_and_line_ends(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", b"\xef\xbb\xbfquery,passage\r", '"a ""b"", c","d\ne"', "", "f,g")
    assert pairs(rows(table_csv(path))) == [('a "b", c', "d\ne"), ("f", "g")]


def test_f2llm_layout_takes_any_number_of_negatives(tmp_path: Path) -> None:
    wide = {"query": "q", "passage": "p", **{f"negative_{i}": f"n{i}" for i in range(1, 25)}, "negative_3": None}
    write_parquet(tmp_path / "a.parquet", [wide, {**wide, "negative_1": " "}])
    write_parquet(tmp_path / "b.parquet", [{"query": "q", "passage": "p", "negative_1": "n"}])
    write_parquet(tmp_path / "c.parquet", [{"query": "q", "passage": "p"}])
    found = [row["negatives"] for row in rows(F2llmSource(paths=(str(tmp_path),), language="eng"))]
    all_but_3 = [f"n{i}" for i in range(1, 25) if i != 3]
    assert found == [all_but_3, all_but_3[1:], ["n"], []]


def test_f2llm_rows_may_have_fewer_negatives_than_their_file(tmp_path: Path) -> None:
    counts = [24, 0, 7]
    columns = {f"negative_{i}": [f"n{i}" if i <= count else None for count in counts] for i in range(1, 25)}
    table = pa.table({"query": ["a", "b", "c"], "passage": ["p"] * 3, **columns})
    table = table.set_column(25, "negative_24", table["negative_24"].cast(pa.large_string()))
    found = rows(F2llmSource(paths=(write_parquet(tmp_path / "a.parquet", table),)))
    assert [row["negatives"] for row in found] == [[f"n{i}" for i in range(1, count + 1)] for count in counts]
    nulls = pa.table({"query": ["a"], "passage": ["p"], **{name: pa.nulls(1) for name in columns}})
    (bare,) = rows(F2llmSource(paths=(write_parquet(tmp_path / "b.parquet", nulls),)))
    assert bare["negatives"] == []


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv", "tsv", "f2llm"])
def test_inputs_are_the_files_of_the_pieces_in_their_order(tmp_path: Path, suffix: str) -> None:
    for name in "ba":
        path = tmp_path / name
        write_parquet(path.with_suffix(".parquet"), PAIRS, group=2)
        write_lines(path.with_suffix(".jsonl"), *PAIRS)
        write_lines(path.with_suffix(".csv"), "query,passage", "q,p")
        write_lines(path.with_suffix(".tsv"), "query\tpassage", "q\tp")
    form = {"paths": (str(tmp_path),), "format": suffix}
    source = (F2llmSource if suffix == "f2llm" else TableSource).model_validate(form)
    inputs = source.inputs("s")
    assert [Path(file.uri).stem for file in inputs] == ["a", "b"]
    assert [file.size for file in inputs] == [Path(file.uri).stat().st_size for file in inputs]
    assert {file.version for file in inputs} == {""}
    read = [uri for piece in source.pieces("s") for uri in source.piece_inputs(piece)]
    assert list(dict.fromkeys(read)) == [file.uri for file in inputs]


def test_inputs_of_a_saved_dataset_are_its_files(tmp_path: Path) -> None:
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "d")
    source = DatasetsSource(path=str(tmp_path / "d"))
    inputs = [file.uri for file in source.inputs("s")]
    assert inputs == sorted(str(path) for path in (tmp_path / "d").iterdir())
    assert [source.piece_inputs(piece) for piece in source.pieces("s")] == [inputs]


def test_a_local_copy_of_a_dataset_of_the_hub_is_known_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name alone, rows that come in later would never be read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = [write_lines(tmp_path / "d" / f"{split}.jsonl", *PAIRS) for split in ("test", "train")]
    source = DatasetsSource(path=str(tmp_path / "d"))
    assert [file.uri for file in source.inputs("s")] == files
    assert pairs(rows(source)) == [(row["query"], row["passage"]) for row in PAIRS]


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.tsv", b"\xef\xbb\xbfquery\tpassage\r", '"a\tb"\r', "", "c\td")
    assert pairs(rows(tsv(path))) == [('"a', 'b"'), ("c", "d")]
    with pytest.raises(DataError, match=r"a\.tsv:2: found 1 fields, expected 2"):
        rows(tsv(write_lines(tmp_path / "a.tsv", "query\tpassage", "a")))
    with pytest.raises(DataError, match=r"a\.tsv:1: found a blank line, expected names of columns"):
        rows(tsv(write_lines(tmp_path / "a.tsv", "", "a\tb")))


# --- templates --------------------------------------------------------------------------------------------

ARTICLES = [
    {"title": "Mond", "body": "Er kreist.", "answer": "x", "lang": "go"},
    {"title": None, "body": "Ohne Titel.", "answer": "x", "lang": None},
    {"title": "Sonne {1}", "body": " ", "answer": "x", "lang": ""},
]
TEMPLATES = Columns(query="{{{title}}}: {body}", passage="answer", language="code:{lang}")


def layouts(folder: Path, records: list[dict[str, Any]], columns: Columns) -> list[SourceBase]:
    """The same records in every layout that has `columns`."""
    cells = [",".join(f'"{value or ""}"' for value in record.values()) for record in records]
    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
    return [
        parquet(write_parquet(folder / "a.parquet", records), columns=columns),
        jsonl(write_lines(folder / "a.jsonl", *records), columns=columns),
        table_csv(write_lines(folder / "a.csv", ",".join(records[0]), *cells), columns=columns),
        DatasetsSource(path=str(folder / "saved"), columns=columns),
    ]


def test_a_field_may_be_made_of_several_columns(tmp_path: Path) -> None:
    for source in layouts(tmp_path, ARTICLES, TEMPLATES):
        found = rows(source)
        assert [row["query"] for row in found] == ["{Mond}: Er kreist.", "{}: Ohne Titel.", "{Sonne {1}}:  "]
        assert [row["language"] for row in found] == ["code:go", None, None]


def test_a_template_without_any_text_is_an_empty_field(tmp_path: Path) -> None:
    empty = [*ARTICLES, {"title": None, "body": "\t", "answer": "x", "lang": "go"}]
    for source in layouts(tmp_path, empty, TEMPLATES):
        with pytest.raises(DataError, match=r"query: found (null|blank text), expected text"):
            rows(source)
        assert drops(source) == [None, None, None, "read: empty query"]


def test_json_keys_of_a_template_may_be_missing_from_a_row_but_not_from_all(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"title": "a", "passage": "p"}, {"body": "b", "passage": "p"})
    assert pairs(rows(jsonl(path, columns=Columns(query="{title} {body}")))) == [("a ", "p"), (" b", "p")]
    for bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=r"a\.jsonl: no row has the key 'titel' of the template"):
            rows(jsonl(path, columns=Columns(query="{title}{titel}{body}")), bad_row)


@pytest.mark.parametrize("source", [parquet, table_csv])
def test_a_missing_column_of_a_template_is_named(tmp_path: Path, source: Any) -> None:
    path = (
        write_parquet(tmp_path / "a.parquet", [{"title": "x", "passage": "y"}])
        if source is parquet
        else write_lines(tmp_path / "a.csv", "title,passage", "x,y")
    )
    with pytest.raises(DataError, match=r"no column 'body'; the columns are \['title', 'passage'\]"):
        source(path, columns=Columns(query="{title}{body}")).pieces("s")


def test_values_of_a_template_are_text(tmp_path: Path) -> None:
    record = {"title": "x", "year": 1969, "passage": "y"}
    columns = Columns(query="{title} {year}")
    with pytest.raises(DataError, match="column 'year': found int64, expected text"):
        parquet(write_parquet(tmp_path / "a.parquet", [record]), columns=columns).pieces("s")
    source = jsonl(write_lines(tmp_path / "a.jsonl", record), columns=columns)
    with pytest.raises(DataError, match=r"a\.jsonl:1: year: found int 1969, expected text"):
        rows(source)
    assert drops(source) == ["read: query is not text"]


def test_bytes_of_a_template_that_are_not_utf8_are_a_fault_of_their_row(tmp_path: Path) -> None:
    data = pa.array([b"a", b"b\xff", b"c"], pa.binary())
    broken = pa.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    table = pa.table({"title": broken, "passage": ["x", "y", "z"]})
    source = parquet(write_parquet(tmp_path / "a.parquet", table), columns=Columns(query="<{title}>"))
    assert drops(source) == [None, "read: not UTF-8", None]


@pytest.mark.parametrize("text", ["{title", "title}", "{}", "{title:>5}", "{title!r}", "{{title}}"])
def test_a_template_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"such as \{title\}"):
        Columns(query=text)
    assert Columns(negatives=text).kinds()[text] == "texts", "lists are never made of templates"


# --- faults of files: always an error -------------------------------------------------------------------


@pytest.mark.parametrize("bad_row", ["error", "skip"])
@pytest.mark.parametrize("source", [parquet, jsonl, table_csv])
def test_a_path_that_matches_nothing(tmp_path: Path, source: Any, bad_row: BadRow) -> None:
    for path in ("nothing", "*.x", "nothing/**/x.parquet"):
        with pytest.raises(DataError, match="found no file"):
            rows(source(tmp_path / path), bad_row)
    with pytest.raises(DataError, match="found no file"):
        rows(source(tmp_path), bad_row)
    with pytest.raises(DataError, match="cannot be opened"):
        rows(source("nosuchscheme://x/y"), bad_row)


@pytest.mark.parametrize(("source", "suffix"), [(parquet, "parquet"), (jsonl, "jsonl"), (table_csv, "csv")])
def test_an_empty_file(tmp_path: Path, source: Any, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").touch()
    with pytest.raises(DataError, match=rf"a\.{suffix}: found an empty file"):
        rows(source(tmp_path), "skip")


def test_a_file_without_rows(tmp_path: Path) -> None:
    empty = pa.table({"query": pa.array([], pa.string()), "passage": pa.array([], pa.string())})
    for source in (
        parquet(write_parquet(tmp_path / "a.parquet", empty)),
        jsonl(write_lines(tmp_path / "a.jsonl", "", "  ")),
        table_csv(write_lines(tmp_path / "a.csv", "query,passage")),
    ):
        with pytest.raises(DataError, match="found no rows"):
            rows(source, "skip")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"query": "x" * 2000, "passage": f"{i}"} for i in range(100)])
    whole = path.read_bytes()
    for data in (whole[:-50], b"query,passage\n1,2\n", whole[:4] + b"\xff" * 400 + whole[404:]):
        path.write_bytes(data)
        with pytest.raises(
            DataError, match=r"a\.parquet: found a damaged file or another format, expected Parquet"
        ):
            rows(parquet(path), "skip")


@pytest.mark.parametrize("source", [parquet, table_csv])
def test_a_missing_column_lists_those_that_are_there(tmp_path: Path, source: Any) -> None:
    path = (
        write_parquet(tmp_path / "a.parquet", [{"query": "x", "text": "y"}])
        if source is parquet
        else write_lines(tmp_path / "a.csv", "query,text", "x,y")
    )
    with pytest.raises(DataError, match=r"no column 'passage'; the columns are \['query', 'text'\]"):
        source(path).pieces("s")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": 7, "passage": "p"}, "column 'query': found int64, expected text"),
        ({"query": "q", "passage": b"p"}, "column 'passage': found binary, expected text"),
        ({"query": "q", "passage": "p", "negatives": 1}, "found int64, expected text or a list of text"),
        ({"query": "q", "passage": "p", "negatives": [1]}, "expected text or a list of text"),
        ({"query": "q", "passage": "p", "language": 1}, "column 'language': found int64"),
    ],
)
def test_a_parquet_column_of_another_type(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    columns = Columns(**{key: key for key in row})
    with pytest.raises(DataError, match=message):
        parquet(write_parquet(tmp_path / "a.parquet", [row]), columns=columns).pieces("s")


@pytest.mark.parametrize("negatives", [None, []])
def test_optional_columns_without_any_value_are_absent(tmp_path: Path, negatives: Any) -> None:
    row = {"query": "q", "passage": "p", "negatives": negatives, "language": None, "passage_language": None}
    (found,) = rows(parquet(write_parquet(tmp_path / "a.parquet", [row]), columns=FULL, language="eng"))
    assert (found["negatives"], found["language"], found["passage_language"]) == ([], "eng", None)


def test_an_f2llm_negative_of_another_type(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"query": "q", "passage": "p", "negative_1": 1}])
    with pytest.raises(DataError, match="'negative_1': found int64"):
        F2llmSource(paths=(path,)).pieces("s")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"qu\xffery,passage", "found byte 0xff at byte 3 of the line"),
        (b"", "found a blank line"),
        (b'"q', "not CSV"),
    ],
)
def test_a_csv_header_that_cannot_be_read(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.csv:1: .*{message}"):
        table_csv(write_lines(tmp_path / "a.csv", header)).pieces("s")


# --- faults of rows: an error with a place, or a counted row ----------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ("{not json", "not JSON", "found a line that is not JSON"),
        ("[" * 100_000, "not JSON", "found a line that is not JSON"),
        ('["q", "p"]', "no query", r"no key 'query', expected it beside \['0', '1'\]"),
        ("7", "not a JSON object", "found int, expected a JSON object or array"),
        ({"query": "q"}, "no passage", r"no key 'passage', expected it beside \['query'\]"),
        ({"query": 7, "passage": "p"}, "query is not text", "query: found int 7, expected text"),
        ({"query": "q", "passage": ["p", 1]}, "passage is not text or a list of text", "passage: found list"),
        ({"query": "q", "passage": []}, "empty passage", "passage: found null, expected text"),
        ('{"query": "q", "passage": "p", "query": "r"}', "a key twice", "found the key 'query' twice"),
        ({"query": None, "passage": "p"}, "empty query", "query: found null, expected text"),
        ({"query": "q", "passage": ""}, "empty passage", "passage: found blank text"),
        ({"query": " \u3000\n", "passage": ""}, "empty query", "query: found blank text"),
        (b'{"query": "q\xff", "passage": "p"}', "not UTF-8", "found byte 0xff at byte 13 of the line"),
        (r'{"query": "\ud800", "passage": "p"}', "not UTF-8", "query: found half of a surrogate pair"),
    ],
)
def test_a_bad_json_line(tmp_path: Path, line: Any, reason: str, message: str) -> None:
    source = jsonl(write_lines(tmp_path / "a.jsonl", PAIRS[0], line, PAIRS[1]))
    with pytest.raises(DataError, match=rf"source 's': .*a\.jsonl:2: .*{message}"):
        rows(source)
    assert drops(source) == [None, f"read: {reason}", None]


@pytest.mark.parametrize("negatives", [3, ["n", 3], {"n": 1}, [{"text": "n"}]])
def test_json_negatives_that_are_no_texts(tmp_path: Path, negatives: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"query": "q", "passage": "p", "negatives": negatives})
    source = jsonl(path, columns=Columns(negatives="negatives"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: negatives: found .*, expected text or a list of text"):
        rows(source)
    assert drops(source) == ["read: negatives is not text or a list of text"]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ("q", "too few fields", "found 1 fields, expected 2"),
        ("q,p,x", "too many fields", "found 3 fields, expected 2"),
        ("q, ", "empty passage", "passage: found blank text"),
        (b"q,\xe9t\xe9", "not UTF-8", "found byte 0xe9 at byte 3 of the line"),
        ('"q"x,p', "not CSV", "not CSV"),
    ],
)
def test_a_bad_csv_row(tmp_path: Path, line: str | bytes, reason: str, message: str) -> None:
    source = table_csv(write_lines(tmp_path / "a.csv", "query,passage", "a,b", line, "c,d"))
    with pytest.raises(DataError, match=rf"a\.csv:3: .*{message}"):
        rows(source)
    assert drops(source) == [None, f"read: {reason}", None]


def test_a_csv_quote_left_open_does_not_swallow_the_file_silently(tmp_path: Path) -> None:
    source = table_csv(write_lines(tmp_path / "a.csv", "query,passage", "a,b", '"c,d', "e,f"))
    with pytest.raises(DataError, match=r"a\.csv:3: found a line that is not CSV"):
        rows(source)
    assert drops(source) == [None, "read: not CSV", None]


TABLE = [f"where is {n},near {n}" for n in range(2000)]


def every_line(rows_: list[dict[str, Any]], bad: set[int]) -> None:
    """Each line of `TABLE` is a row, and the bad ones are counted."""
    assert len(rows_) == len(TABLE)
    assert {n for n, row in enumerate(rows_) if row["drop"]} == bad
    for n, row in enumerate(rows_):
        if n not in bad:
            assert (row["query"].strip('"'), row["passage"]) == tuple(TABLE[n].split(","))


@pytest.mark.parametrize("closed", [None, 12, 700])
def test_a_stray_quote_costs_its_own_line(tmp_path: Path, closed: int | None) -> None:
    """Whether nothing closes it, or another quote hundreds of rows later does."""
    lines = [*TABLE]
    lines[5] = f'"{lines[5]}'
    if closed is not None:
        lines[closed] = lines[closed].replace(",", '",')
    source = table_csv(write_lines(tmp_path / "a.csv", "query,passage", *lines))
    with pytest.raises(DataError, match=r"a\.csv:7: found a (quote after which|line that is not CSV)"):
        rows(source)
    every_line(rows(source, "skip"), {5})


@pytest.mark.parametrize("closed", [6, 8])
def test_a_stray_quote_that_a_near_line_closes_costs_no_other_row(tmp_path: Path, closed: int) -> None:
    """As inches do: `"24 inch,a` and then `b,27"` are one row of one field, where two of two were meant."""
    lines = [*TABLE]
    lines[5] = f'"{lines[5]}'
    lines[closed] += '"'
    source = table_csv(write_lines(tmp_path / "a.csv", "query,passage", *lines))
    found = rows(source, "skip")
    assert [n for n, row in enumerate(found) if row["drop"]] == [5]
    assert found[5]["drop"] == "read: a quote that is not closed"
    assert found[closed]["passage"] == f'{TABLE[closed].split(",")[1]}"'
    assert len(found) == len(TABLE)


def test_texts_over_many_lines_are_texts(tmp_path: Path) -> None:
    """Also long ones, with commas here and there."""
    text = "\n".join("line, with commas," if n % 3 else "line without" for n in range(1500))
    source = table_csv(write_lines(tmp_path / "a.csv", "query,passage", f'q,"{text}"', "a,b"))
    assert pairs(rows(source)) == [("q", text), ("a", "b")]


def test_a_broken_row_gives_its_lines_back(tmp_path: Path) -> None:
    lines = ["a,b", '"c', 'd" e,f', "g,h"]
    source = table_csv(write_lines(tmp_path / "a.csv", "query,passage", *lines))
    assert drops(source) == [None, "read: not CSV", None, None]
    assert pairs(rows(source, "skip"))[2:] == [('d" e', "f"), ("g", "h")]


@pytest.mark.parametrize(("delimiter", "suffix"), [("\t", "tsv"), (";", "csv"), ("|", "csv"), (",", "csv")])
def test_the_delimiter_is_found(tmp_path: Path, delimiter: str, suffix: str) -> None:
    lines = [f"what, or who{delimiter}p {n}" if delimiter != "," else f"what{delimiter}p {n}" for n in range(30)]
    expected = [tuple(line.split(delimiter)) for line in lines]
    headed = write_lines(tmp_path / f"h.{suffix}", f"query{delimiter}passage", *lines)
    bare = write_lines(tmp_path / f"n.{suffix}", *lines)
    assert pairs(rows(table_csv(headed))) == expected
    assert pairs(rows(table_csv(bare, columns=Columns(query="0", passage="1")))) == expected
    assert pairs(rows(table_csv(bare, names=("query", "passage")))) == expected
    assert pairs(rows(table_csv(headed, delimiter=delimiter))) == expected
    other = ";" if delimiter == "," else ","
    with pytest.raises(DataError, match="no column"):
        table_csv(headed, delimiter=other).pieces("s")


def test_quotes_and_encodings_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('query,passage\n"é,ü"\n'.encode("cp1252"))
    source = table_csv(tmp_path / "a.csv", encoding="windows-1252", quotes=False)
    assert pairs(rows(source)) == [('"é', 'ü"')]
    (tmp_path / "b.csv").write_bytes("query\tpassage\nдом\thouse\n".encode("utf-16"))
    assert pairs(rows(table_csv(tmp_path / "b.csv", encoding="utf-16"))) == [("дом", "house")]
    with pytest.raises(ValidationError, match="found 'klingon', expected an encoding"):
        table_csv("a.csv", encoding="klingon")
    with pytest.raises(ValidationError, match="delimiter: parquet has none; it is for csv and tsv"):
        parquet("a.parquet", delimiter=";")


def test_what_is_no_encoding_of_text_is_refused() -> None:
    for name in ("utf-9", "rot13", "hex"):
        with pytest.raises(ValidationError, match=f"found '{name}', expected an encoding such as utf-8"):
            table_csv("a", encoding=name)


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1: found the column 'query' twice"):
        table_csv(write_lines(tmp_path / "a.csv", "query,passage,query", "a,b,c")).pieces("s")
    twice = pa.Table.from_arrays([pa.array(["x"])] * 3, names=["query", "passage", "query"])
    with pytest.raises(DataError, match="found the column 'query' twice"):
        parquet(write_parquet(tmp_path / "a.parquet", twice)).pieces("s")


# --- layouts ----------------------------------------------------------------------------------------------


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def test_a_folder_has_its_compressed_files_too(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"query": "plain", "passage": "p"})
    for ending, compress in COMPRESSED.items():
        line = json.dumps({"query": ending, "passage": "p"}).encode()
        (tmp_path / f"b.jsonl{ending}").write_bytes(compress(line + b"\n"))
    zstd = pa.Codec("zstd").compress(b'{"query": ".zst", "passage": "p"}\n', asbytes=True)
    (tmp_path / "b.jsonl.zst").write_bytes(zstd)
    assert {query for query, _ in pairs(rows(jsonl(tmp_path)))} == {"plain", ".zst", *COMPRESSED}
    assert pairs(rows(jsonl(tmp_path / "b.jsonl.xz"))) == [(".xz", "p")]
    (tmp_path / "b.jsonl.xz").write_bytes(b"\xfd7zXZ\x00 no")
    with pytest.raises(DataError, match=r"b\.jsonl\.xz: cannot be read"):
        rows(jsonl(tmp_path / "b.jsonl.xz"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"query": "a", "passage": "b"},\n', "not JSON"),
        (b'{"query": "a", "query": "b"}\n', "key 'query' twice"),
        (b'{\n "query": "a",\n "passage": "b"\n}\n', "not JSON"),
        ('{"query": "a", "passage": "b"}\n'.encode("utf-16"), "byte 0xff"),
        (gzip.compress(b'{"query": "a", "passage": "b"}\n', mtime=0), "byte 0x8b"),
    ],
)
def test_a_file_whose_first_lines_are_no_rows_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jsonl:1: found .*{message}"):
        jsonl(tmp_path).check_columns("s")


def test_a_first_file_of_blank_lines_is_no_fault(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", "", " ")
    assert "has no rows" in (jsonl(tmp_path).check_columns("s") or "")
    with pytest.raises(DataError, match="found no rows"):
        rows(jsonl(tmp_path))
    write_lines(tmp_path / "b.jsonl", PAIRS[0])
    assert pairs(rows(jsonl(tmp_path))) == [("question 0", "answer 0")]


def test_one_empty_file_among_many_is_no_fault_and_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", PAIRS[0])
    (tmp_path / "b.jsonl").touch()
    write_lines(tmp_path / "c.jsonl", "")
    (tmp_path / "notes.txt").write_text("no rows")
    source = jsonl(tmp_path)
    assert len(rows(source)) == 1
    empty, other = source.notes("s")
    assert re.fullmatch(r"source 's': 1 files empty, such as .*b\.jsonl", empty)
    assert re.fullmatch(
        r"source 's': 1 files passed over, having another ending than \.jsonl, such as .*\.txt", other
    )
    assert jsonl(tmp_path / "a.jsonl").notes("s") == []


def parallel(folder: Path, one: str, other: str, **settings: Any) -> ParallelSource:
    (folder / "x.de").write_text(one, encoding="utf-8")
    (folder / "x.en.gz").write_bytes(gzip.compress(other.encode()))
    return ParallelSource(queries=str(folder / "x.de"), passages=str(folder / "x.en.gz"), **settings)


def test_lines_of_two_files_translate_each_other(tmp_path: Path) -> None:
    text = ("eins\n\nzwei\r\ndrei", "one\n\ntwo\r\nthree\n")
    source = parallel(tmp_path, *text, language="deu", passage_language="en")
    found = rows(source)
    assert pairs(found) == [("eins", "one"), ("zwei", "two"), ("drei", "three")]
    assert {(row["language"], row["passage_language"]) for row in found} == {("deu", "eng")}
    assert [file.uri for file in source.inputs("s")] == source.piece_inputs(source.pieces("s")[0])


def beir(folder: Path, *, jsonl_: bool = True) -> Path:
    (folder / "qrels").mkdir(parents=True)
    if jsonl_:
        write_lines(folder / "queries.jsonl", {"_id": "q1", "text": "when"}, {"_id": "q2", "text": "where"})
        corpus = [{"_id": 1, "title": "Noon", "text": "at twelve"}, {"_id": 2, "title": "", "text": "here"}]
        lines = [json.dumps(line).encode() for line in corpus]
        (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    else:
        write_parquet(folder / "queries.parquet", [{"_id": "q1", "text": "when"}, {"_id": "q2", "text": "where"}])
        write_parquet(
            folder / "corpus.parquet",
            [{"_id": "1", "title": "Noon", "text": "at twelve"}, {"_id": "2", "title": None, "text": "here"}],
        )
    lines = ["query-id\tcorpus-id\tscore", "q1\t1\t1", "q2\t2\t2", "q2\t1\t0", "q9\t1\t1", "q1\t7\t1"]
    write_lines(folder / "qrels" / "train.tsv", *lines)
    write_lines(folder / "qrels" / "test.tsv", lines[0], "q1\t2\t1")
    return folder


@pytest.mark.parametrize("jsonl_", [True, False])
def test_judgements_join_queries_and_passages(tmp_path: Path, *, jsonl_: bool) -> None:
    source = JudgedSource(folder=str(beir(tmp_path / "set", jsonl_=jsonl_)), language="eng")
    found = rows(source, "skip")
    assert pairs(found)[:2] == [("when", "Noon at twelve"), ("where", "here")]
    assert [row["drop"] for row in found] == [None, None, "read: not in the queries", "read: not in the corpus"]
    with pytest.raises(DataError, match=r"train\.tsv:5: found the id 'q9', which is not in the queries"):
        rows(source)
    assert pairs(rows(JudgedSource(folder=str(tmp_path / "set"), split="test"))) == [("when", "here")]
    with pytest.raises(DataError, match=r"\(qrels\): found .* expected qrels/dev or qrels-dev among them"):
        JudgedSource(folder=str(tmp_path / "set"), split="dev").inputs("s")
    assert len(source.inputs("s")) == 3
    assert {file.uri for file in source.inputs("s")} == set(source.piece_inputs(source.pieces("s")[0]))


def judged(folder: Path, *qrels: str | dict[str, Any], name: str = "train.tsv") -> JudgedSource:
    """A set of two queries and two passages with judgements of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "qrels").mkdir(exist_ok=True)
    write_lines(folder / "queries.jsonl", {"_id": "1", "text": "when"}, {"_id": "2", "text": "where"})
    write_lines(folder / "corpus.jsonl", {"_id": "a", "text": "noon"}, {"_id": "b", "text": "here"})
    write_lines(folder / "qrels" / name, *qrels)
    return JudgedSource(folder=str(folder))


@pytest.mark.parametrize("score", ["score", "relevance", "rel", "label"])
def test_a_judgement_of_0_is_none_whatever_its_column_is_called(tmp_path: Path, score: str) -> None:
    source = judged(tmp_path, f"qid\tpid\t{score}", "1\ta\t2", "1\tb\t0", "2\ta\t-1")
    assert pairs(rows(source)) == [("when", "noon")]


@pytest.mark.parametrize("other", ["qrels/train_hard.tsv", "qrels/train2-old.tsv"])
def test_files_of_like_names_are_not_of_the_split(tmp_path: Path, other: str) -> None:
    source = judged(tmp_path, "qid\tpid", "1\ta")
    write_lines(tmp_path / other, "qid\tpid", "2\tb")
    write_lines(tmp_path / "corpus_backup.jsonl", {"_id": "a", "text": "old"})
    assert pairs(rows(source)) == [("when", "noon")]


def test_parts_of_a_split_are_read_in_order_and_named(tmp_path: Path) -> None:
    judged(tmp_path, {"query-id": 1, "corpus-id": "a"}, name="train-00000-of-00002.jsonl")
    source = judged(tmp_path, {"query-id": 2, "corpus-id": "b"}, name="train-00001-of-00002.jsonl")
    assert pairs(rows(source)) == [("when", "noon"), ("where", "here")]
    source = judged(tmp_path, {"query-id": 2, "corpus-id": "c"}, name="train-00001-of-00002.jsonl")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.jsonl:1: found the id 'c'"):
        rows(source)


def test_an_id_of_several_texts_is_a_fault_of_its_judgements(tmp_path: Path) -> None:
    source = judged(tmp_path, "qid\tpid", "1\ta", "2\tb")
    again = [{"_id": "a", "text": "midnight"}, {"_id": "b", "text": "here"}]
    write_lines(tmp_path / "corpus.jsonl", {"_id": "a", "text": "noon"}, *again, again[1])
    assert drops(source) == ["read: several texts of one id in the corpus", None]
    with pytest.raises(DataError, match=r"train\.tsv:2: found the id 'a', which several texts have in the corpus"):
        rows(source)


def test_bad_rows_of_a_judged_set_are_named_or_counted(tmp_path: Path) -> None:
    source = judged(tmp_path, "qid\tpid\tscore", "1\ta\thigh", "1\ta", "2\tb\t1")
    assert drops(source) == ["read: score is not a number", "read: too few fields", None]
    with pytest.raises(DataError, match=r"train\.tsv:2: score: found str 'high', expected a number"):
        rows(source)
    source = judged(tmp_path, "qid\tpid", "1\ta", "2\tb")
    write_lines(tmp_path / "corpus.jsonl", '{"_id": "a", "text": "noon"', {"_id": "b", "text": "here"})
    assert drops(source) == ["read: not in the corpus", None]
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: found a line that is not JSON"):
        rows(source)


def test_pairs_of_sentences_as_tatoeba_has_them(tmp_path: Path) -> None:
    """Numbered columns: id, text, id, text; and a language for each side."""
    path = write_lines(
        tmp_path / "a.tsv", "1276\tLet's go.\t2481\t¡Vamos!", '1277\tI "must" go.\t2482\tTengo que ir.'
    )
    columns = Columns(query="1", passage="3")
    found = rows(tsv(path, columns=columns, language="en", passage_language="es"))
    assert pairs(found) == [("Let's go.", "¡Vamos!"), ('I "must" go.', "Tengo que ir.")]
    assert {(row["language"], row["passage_language"]) for row in found} == {("eng", "spa")}


def test_the_files_of_ms_marco(tmp_path: Path) -> None:
    """No names of columns anywhere; quotes are part of the texts."""
    files = {
        "queries": write_lines(tmp_path / "queries.tsv", '1\twhat is "x', "2\twhy"),
        "corpus": write_lines(tmp_path / "collection.tsv", "10\ta letter", "11\tbecause"),
        "qrels": write_lines(tmp_path / "qrels.tsv", "1\t0\t10\t1", "2\t0\t11\t1", "2\t0\t10\t0"),
    }
    assert pairs(rows(JudgedSource(**files))) == [('what is "x', "a letter"), ("why", "because")]
    with pytest.raises(ValidationError, match=r"set either folder, or queries, corpus and qrels"):
        JudgedSource(folder="f", **files)
    with pytest.raises(ValidationError, match=r"set either folder, or queries, corpus and qrels"):
        JudgedSource(queries="q")
    files["qrels"] = write_lines(tmp_path / "odd.tsv", "a\tb\tc\td\te")
    with pytest.raises(
        DataError, match=r"odd\.tsv:1: found the columns \['a', 'b', 'c', 'd', 'e'\], expected one of"
    ):
        rows(JudgedSource(**files))


def test_lines_that_do_not_match_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"x\.de:3: found a line in one of .* alone, expected as many lines in both"
    ):
        rows(parallel(tmp_path, "a\nb\n", "a\nb\nc\n"))
    half = parallel(tmp_path, "a\n \nc\n", "x\ny\nz\n")
    assert drops(half) == [None, "read: empty query", None]
    with pytest.raises(DataError, match=r"x\.de:2: query: found blank text"):
        rows(half)
    with pytest.raises(ValidationError, match=r"passage_language\n.*found 'klingonisch'"):
        parallel(tmp_path, "a", "b", passage_language="klingonisch")


POSITIVES = [
    {"query": "a", "pos": ["1", "2"], "neg": ["x"]},
    {"query": "b", "pos": ["3"], "neg": []},
    {"query": "c", "pos": ["4", None, " "], "neg": ["y", "z"]},
]


def test_each_of_several_passages_makes_a_row(tmp_path: Path) -> None:
    columns = Columns(passage="pos", negatives="neg")
    for source in layouts_of_lists(tmp_path, POSITIVES, columns):
        found = rows(source, "skip")
        assert [(row["query"], row["passage"], row["negatives"]) for row in found if not row["drop"]] == [
            ("a", "1", ["x"]),
            ("a", "2", ["x"]),
            ("b", "3", []),
            ("c", "4", ["y", "z"]),
        ]
        assert [row["drop"] for row in found if row["drop"]] == ["read: empty passage"] * 2
        with pytest.raises(DataError, match=r"(:3|row 2 \(counted from 0\)): passage: found null"):
            rows(source)


def layouts_of_lists(folder: Path, records: list[dict[str, Any]], columns: Columns) -> list[SourceBase]:
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
    return [
        parquet(write_parquet(folder / "a.parquet", records), columns=columns),
        jsonl(write_lines(folder / "a.jsonl", *records), columns=columns),
        DatasetsSource(path=str(folder / "saved"), columns=columns),
    ]


def test_passages_may_be_objects(tmp_path: Path) -> None:
    records = [
        {
            "query": "a",
            "positive_passages": [
                {"docid": "1", "title": "T", "text": "one"},
                {"docid": "2", "title": "", "text": "two"},
            ],
            "negative_passages": [{"docid": "3", "title": "N", "text": "no"}],
        }
    ]
    columns = Columns(passage="positive_passages", negatives="negative_passages", item="{title}: {text}")
    for source in layouts_of_lists(tmp_path, records, columns):
        found = rows(source)
        assert pairs(found) == [("a", "T: one"), ("a", ": two")]
        assert [row["negatives"] for row in found] == [["N: no"]] * 2


@pytest.mark.parametrize("negatives", [("no_1", "no_2", "no_10"), "no_*"])
def test_negatives_in_several_columns(tmp_path: Path, negatives: str | tuple[str, ...]) -> None:
    records = [
        {"anchor": "a", "positive": "p", "no_1": "x", "no_10": "z", "no_2": "y"},
        {"anchor": "b", "positive": "q", "no_1": None, "no_10": " ", "no_2": "w"},
    ]
    columns = Columns(query="anchor", passage="positive", negatives=negatives)
    for source in layouts_of_lists(tmp_path, records, columns):
        assert [row["negatives"] for row in rows(source)] == [["x", "y", "z"], ["w"]]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_pattern_that_no_column_has_is_refused(tmp_path: Path, suffix: str) -> None:
    """A slip in it would leave all negatives out."""
    first, second = {"query": "q", "passage": "p"}, {"query": "q", "passage": "p", "neg_2": "n"}
    for name, row in (("a", first), ("b", second)):
        write_lines(tmp_path / f"{name}.jsonl", row)
        write_lines(tmp_path / f"{name}.csv", ",".join(row), ",".join(row.values()))
        write_parquet(tmp_path / f"{name}.parquet", [row])
    settings = {"format": suffix, "paths": (str(tmp_path),)}
    found = rows(TableSource.model_validate({**settings, "columns": {"negatives": "neg_*"}}))
    assert [row["negatives"] for row in found] == [[], ["n"]]
    slip = TableSource.model_validate({**settings, "columns": {"negatives": "negs_*"}})
    message = rf"a\.{suffix}: no column is called 'negs_\*' with a number for the \*, here or in another file"
    with pytest.raises(DataError, match=rf"{message}; the columns are \['query', 'passage'\]"):
        slip.pieces("s")


def test_triplets_have_one_negative_as_text(tmp_path: Path) -> None:
    records = [
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"anchor": "b", "positive": "q", "negative": None},
    ]
    columns = Columns(query="anchor", passage="positive", negatives="negative")
    for source in layouts_of_lists(tmp_path, records, columns):
        assert [row["negatives"] for row in rows(source)] == [["n"], []]


def test_an_array_per_line_and_paths_into_what_is_nested(tmp_path: Path) -> None:
    arrays = jsonl(write_lines(tmp_path / "a.jsonl", '["t", "b"]', '["u", "c", "more"]'))
    columns = Columns(query="0", passage="1")
    assert pairs(rows(arrays.model_copy(update={"columns": columns}))) == [("t", "b"), ("u", "c")]
    sets = jsonl(write_lines(tmp_path / "b.jsonl", {"set": ["x", "y"]}, {"set": ["z"]}))
    sets = sets.model_copy(update={"columns": Columns(query="set.0", passage="set.1")})
    assert drops(sets) == [None, "read: empty passage"]
    assert pairs(rows(sets, "skip"))[0] == ("x", "y")
    records = [{"q": "a", "answers": {"text": ["one", "two"], "start": [1, 2]}}]
    for path, expected in (("answers.text.1", ["two"]), ("answers.text", ["one", "two"])):
        for source in layouts_of_lists(
            tmp_path / path.replace(".", "-"), records, Columns(query="q", passage=path)
        ):
            assert [passage for _, passage in pairs(rows(source))] == expected


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_is_an_array_of_rows_or_lines(tmp_path: Path, indent: int | None) -> None:
    records = [*PAIRS[:2], {"query": 7, "passage": "p"}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=indent))
    source = TableSource(format="json", paths=(str(tmp_path),))
    assert drops(source) == [None, None, "read: query is not text"]
    with pytest.raises(DataError, match=r"a\.json: row 2 \(counted from 0\): query: found int 7"):
        rows(source)
    write_lines(tmp_path / "a.json", *PAIRS)
    assert pairs(rows(source)) == [(row["query"], row["passage"]) for row in PAIRS]
    write_lines(tmp_path / "a.json", '["a", "b"]', '["c", "d"]')
    assert pairs(rows(source.model_copy(update={"columns": Columns(query="0", passage="1")})))[1] == ("c", "d")
    (tmp_path / "a.json").write_text('[{"query": "q"')
    with pytest.raises(DataError, match=r"a\.json: found a file that is not JSON"):
        rows(source)


def test_numbers_of_a_dataset_that_stand_for_labels_are_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    saved = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    saved.save_to_disk(tmp_path / "d")
    source = DatasetsSource(path=str(tmp_path / "d"), columns=Columns(query="text", passage="label"))
    assert drops(source) == [None, None, "read: empty passage"]
    assert [passage for _, passage in pairs(rows(source, "skip"))] == ["yes", "no", ""]


def test_n_tuples_by_their_usual_names(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", [{"question": "q", "answer": "a", "negative_2": "y", "negative_1": "x"}]
    )
    (row,) = rows(F2llmSource(paths=(path,)))
    assert (row["query"], row["passage"], row["negatives"]) == ("q", "a", ["x", "y"])


# --- languages --------------------------------------------------------------------------------------------


def test_languages_are_one_code_each(tmp_path: Path) -> None:
    said = [
        "de",
        "deu",
        "ger",
        "de-AT",
        "de_CH.UTF-8",
        "German",
        "german",
        "code:Go",
        "Go",
        "python",
        "ts",
        "zh-Hans",
        "sr@latin",
        "eng-Latn",
        "nah",
    ]
    lines = [{"query": str(n), "passage": "p", "lang": code} for n, code in enumerate(said)]
    source = jsonl(write_lines(tmp_path / "a.jsonl", *lines), columns=Columns(language="lang"))
    assert [row["language"] for row in rows(source)] == ["deu"] * 7 + [
        *("code:go", "code:go", "code:python", "tso"),
        *("zho-Hans", "srp", "eng", "und"),
    ]


def test_an_unknown_language_is_a_fault_of_its_row(tmp_path: Path) -> None:
    lines = [{"query": "q", "passage": "p", "lang": code} for code in ("eng", "xx-klingon", None)]
    source = jsonl(write_lines(tmp_path / "a.jsonl", *lines), columns=Columns(language="lang"), language="fra")
    with pytest.raises(DataError, match=r"a\.jsonl:2: language: found 'xx-klingon', expected an ISO 639 code"):
        rows(source)
    assert drops(source) == [None, "read: unknown language", None]
    assert [row["language"] for row in rows(source, "skip")][::2] == ["eng", "fra"]


def test_the_language_of_a_source_is_a_code() -> None:
    assert jsonl("a", language="pt_BR").language == "por"
    assert jsonl("a", language="zh-Hant").language == "zho-Hant"
    assert jsonl("a", language="code:go").language == "code:go"
    assert jsonl("a", language="code:Go").language == "code:go"
    with pytest.raises(ValidationError, match="found 'english', expected an ISO 639 code such as eng"):
        jsonl("a", language="english")
    with pytest.raises(ValidationError, match="found 'klingonisch', expected an ISO 639 code such as deu"):
        jsonl("a", language="klingonisch")


@pytest.mark.parametrize("cell", ["['x', 'y']", "['x' 'y']", """['it', "isn't"]"""])
def test_a_list_of_csv_that_is_not_json_is_a_fault(tmp_path: Path, cell: str) -> None:
    """As pandas writes lists: it would be one negative, of brackets and quotes."""
    quoted = '"' + cell.replace('"', '""') + '"'
    source = table_csv(
        write_lines(tmp_path / "a.csv", "query,passage,neg", f"q,p,{quoted}", "q,p,[x]", "q,p,"),
        columns=Columns(negatives="neg"),
    )
    assert drops(source) == ["read: negatives is a list that is not JSON", None, None]
    assert [row["negatives"] for row in rows(source, "skip")][1:] == [["[x]"], []]
    with pytest.raises(
        DataError, match=r"a\.csv:2: neg: found .*, a list that is not JSON, expected text or a JSON"
    ):
        rows(source)


def test_csv_negatives_are_a_text_or_a_json_list(tmp_path: Path) -> None:
    lines = ["q,p,n", 'q,p,"[""a"", ""b""]"', "q,p,", "q,p,7"]
    path = write_lines(tmp_path / "a.csv", "query,passage,negatives", *lines)
    found = rows(table_csv(path, columns=Columns(negatives="negatives")))
    assert [row["negatives"] for row in found] == [["n"], ["a", "b"], [], ["7"]]


def test_bad_parquet_rows(tmp_path: Path) -> None:
    query = pa.array(["a", None, "b", " ", "c"])
    passage = pa.array(["a", "b", "", "d", "e"])
    source = parquet(write_parquet(tmp_path / "a.parquet", pa.table({"query": query, "passage": passage}), 2))
    with pytest.raises(DataError, match=r"a\.parquet: row 1 \(counted from 0\): query: found null, expected text"):
        rows(source)
    assert drops(source) == [None, "read: empty query", "read: empty passage", "read: empty query", None]
    with pytest.raises(DataError, match=r"row 2 \(counted from 0\): passage: found blank text"):
        list(source.read("s", source.pieces("s")[1], "error"))


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    def broken(*texts: bytes) -> pa.Array:
        array = pa.array(texts, pa.binary())
        return pa.StringArray.from_buffers(len(array), array.buffers()[1], array.buffers()[2])

    plain = pa.array(["x", "y", "z"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), broken(b"n", b"n", b"\xfe"))
    table = pa.table({"query": broken(b"a", b"b\xff", b"c"), "passage": plain, "negatives": lists})
    source = parquet(write_parquet(tmp_path / "a.parquet", table), columns=Columns(negatives="negatives"))
    with pytest.raises(
        DataError, match=r"row 1 \(counted from 0\): query: found byte 0xff at byte 2, expected UTF-8"
    ):
        rows(source)
    assert drops(source) == [None, "read: not UTF-8", "read: not UTF-8"]
    wide = pa.table({"query": plain, "passage": plain, "negative_1": broken(b"n", b"\xfe", b"n")})
    f2llm = F2llmSource(paths=(write_parquet(tmp_path / "b.parquet", wide),))
    assert drops(f2llm) == [None, "read: not UTF-8", None]


# --- datasets -------------------------------------------------------------------------------------------


def test_a_saved_dataset_is_read_in_ranges(tmp_path: Path) -> None:
    count = 50_001
    saved = datasets.Dataset.from_dict({"query": [f"q{i}" for i in range(count)], "passage": ["p"] * count})
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(tmp_path / "d")
    source = DatasetsSource(path=str(tmp_path / "d"))
    assert [(piece["start"], piece["stop"]) for piece in source.pieces("s")] == [(0, 50_000), (50_000, count)]
    (last,) = source.read("s", source.pieces("s")[1], "error")
    assert pairs(last.to_pylist()) == [("q50000", "p")]
    assert len(rows(DatasetsSource(path=str(tmp_path / "d"), split="test"))) == 3
    with pytest.raises(DataError, match=r"no split 'dev'; the splits are \['train', 'test'\]"):
        DatasetsSource(path=str(tmp_path / "d"), split="dev").pieces("s")


def test_faults_of_a_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"query": "q", "passage": "p"}, {"query": "", "passage": "p"}]).save_to_disk(
        tmp_path / "d"
    )
    source = DatasetsSource(path=str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): query: found blank text"):
        rows(source)
    assert drops(source) == [None, "read: empty query"]
    with pytest.raises(DataError, match=r"no column 'text'; the columns are \['query', 'passage'\]"):
        DatasetsSource(path=str(tmp_path / "d"), columns=Columns(passage="text")).pieces("s")
    with pytest.raises(DataError, match="neither a folder written by save_to_disk nor a dataset"):
        DatasetsSource(path=str(tmp_path / "nothing")).pieces("s")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValidationError, match="found '', expected a file, a folder or a glob"):
        jsonl("a.jsonl", "")


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="column"):
        TableSource.model_validate({"format": "parquet", "paths": ["a"], "column": {}})
    with pytest.raises(ValidationError, match="paths"):
        TableSource(format="parquet", paths=())


def test_the_recipe_of_the_f2llm_data_shows_each_task() -> None:
    recipe = load_recipe("f2llm-v2-data")
    assert {source.task for source in recipe.sources.values()} == set(TASKS)
    for source in recipe.sources.values():
        assert isinstance(source, F2llmSource)
        assert all(path.startswith("hf://datasets/codefuse-ai/F2LLM-v2/") for path in source.paths)
    assert recipe.data.language_id is not None
    assert recipe.data.near_dedup is not None
    assert [stage.instructions for stage in recipe.stages.values()] == [False, True]
