"""The data steps as pure functions: what each tags, and what no order of rows can change."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.data.account import Counts, count_tags
from f2llm_ray.data.clean import clean, normalize
from f2llm_ray.data.decontaminate import decontaminate
from f2llm_ray.data.dedup import dedup
from f2llm_ray.data.keys import add_keys, shard_of
from f2llm_ray.data.negatives import label_negatives
from f2llm_ray.data.schema import key_numbers, query_text, seeded_key, text_key
from f2llm_ray.data.sources.base import rows_table
from f2llm_ray.data.split import is_validation
from f2llm_ray.recipe import Data


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert once == once.strip()


def test_normal_form_keeps_what_spelling_needs() -> None:
    assert normalize("a\u0301 \u00a0\t b\r\n\n\n\nc\ufeff\x00") == "á b\n\nc"
    assert normalize("می\u200cخواهم 👩\u200d💻 क\u094dष") == "می\u200cخواهم 👩\u200d💻 क\u094dष"
    assert normalize("\u202bשלום\u202c") == "שלום"


def row(query: str, passage: str, **fields: object) -> dict[str, object]:
    return {"language": "deu", "query": query, "passage": passage, **fields}


def tags(rows: list[dict[str, object]], **settings: object) -> list[str | None]:
    table = rows_table(rows, source="s", task="retrieval")
    return clean(table, Data(**settings))["drop"].to_pylist()


def test_cleaning_tags_each_fault_and_keeps_earlier_tags() -> None:
    rows = [
        row("a", "b"),
        row(" \u200e ", "b"),
        row("a", "x" * 11),
        row("same", " same "),
        row("", "", drop="read: empty query"),
    ]
    assert tags(rows, max_chars=10) == [
        None,
        "clean: query too short",
        "clean: passage too long",
        "clean: query equals passage",
        "read: empty query",
    ]


def test_keys_are_of_content_alone() -> None:
    table = rows_table([row("q", "p", negatives=["n"]), row("p", "q")], source="s", task="retrieval")
    keyed = add_keys(table, "Find it.")
    assert keyed["query_key"].to_pylist() == [text_key("q"), text_key("p")]
    assert keyed["instructed_key"][0].as_py() == text_key(query_text("q", "Find it."))
    assert keyed["negative_keys"].to_pylist() == [[text_key("n")], []]
    assert keyed["row_key"][0] != keyed["row_key"][1]
    assert seeded_key("ab", "c") != seeded_key("a", "bc")


@given(st.integers(1, 64), st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=50))
def test_shards_are_key_ranges_in_order(shards: int, keys: list[bytes]) -> None:
    ordered = sorted(keys)
    numbers = key_numbers(pa.array(ordered, pa.binary(16)))
    assert [int(high).to_bytes(8, "big") + int(low).to_bytes(8, "big") for high, low in numbers] == ordered
    found = shard_of(numbers, shards)
    assert (np.diff(found) >= 0).all()
    assert found.min() >= 0
    assert found.max() < shards


def ids(entries: list[tuple[str, int, str, int, int]]) -> pa.Table:
    columns = list(zip(*entries, strict=True))
    names = ("row_key", "source_rank", "language", "piece", "position")
    keys = [text_key(text) for text in columns[0]]
    table = pa.table({"row_key": pa.array(keys, pa.binary(16)), **dict(zip(names[1:], columns[1:], strict=True))})
    return table.append_column("drop", pa.nulls(len(keys), pa.string()))


def test_dedup_keeps_one_row_whatever_the_order() -> None:
    entries = [
        (text, rank, language, n, n)
        for n, (text, rank, language) in enumerate(
            [("a", 1, "deu"), ("a", 0, "fra"), ("b", 1, "deu"), ("a", 0, "deu"), ("c", 0, "eng"), ("a", 0, "deu")]
        )
    ]
    results = []
    for seed in range(5):
        shuffled = random.Random(seed).sample(entries, len(entries))
        found = dedup(ids(shuffled))
        results.append(sorted((r["piece"], r["drop"]) for r in found.to_pylist() if r["drop"] is None))
    assert results == [[(2, None), (3, None), (4, None)]] * 5


def test_decontamination_tags_rows_that_hold_a_test_query() -> None:
    table = rows_table([row("test q", "b"), row("a", "test q"), row("a", "b")], source="s", task="retrieval")
    found = decontaminate(add_keys(table, ""), {"set1": frozenset({text_key("test q")})})
    assert found["drop"].to_pylist() == ["decontaminate: set1", "decontaminate: set1", None]


def test_label_negatives_are_other_labels_of_the_language() -> None:
    labels = ["x", "y", "z", "x", "ä", "ö"]
    languages = ["eng", "eng", "eng", "eng", "deu", "deu"]
    keys = [text_key(label) for label in labels]
    table = pa.table(
        {
            "passage_key": pa.array(keys, pa.binary(16)),
            "passage_language": languages,
            "negative_keys": pa.array([[]] * 5 + [[keys[0]]], pa.list_(pa.binary(16))),
        }
    )
    found = label_negatives(table, source="s", seed=1)["negative_keys"].to_pylist()
    english = {text_key(label) for label in "xyz"}
    for own, negatives in zip(keys[:4], found[:4], strict=True):
        assert set(negatives) == english - {own}
    assert found[4] == [text_key("ö")]
    assert found[5] == [keys[0]], "what a row brought itself stays"
    assert label_negatives(table, source="s", seed=1).equals(label_negatives(table, source="s", seed=1))


def test_validation_split_is_by_key_and_of_the_right_size() -> None:
    keys = pa.array([text_key(str(n)) for n in range(20_000)], pa.binary(16))
    held = np.array(is_validation(keys, 0.1).to_pylist())
    assert abs(held.mean() - 0.1) < 0.01
    more = np.array(is_validation(keys, 0.2).to_pylist())
    assert (more >= held).all(), "a larger share only adds rows"
    assert is_validation(keys[5:9], 0.1).to_pylist() == held[5:9].tolist()


def test_the_account_balances() -> None:
    counts = Counts()
    table = pa.table(
        {"source": ["s"] * 4, "language": ["deu", "deu", None, "fra"], "drop": [None, None, None, "clean: x"]}
    )
    for entry in count_tags(table).to_pylist():
        counts.add(entry)
    counts.drop({"source": "s", "language": "deu", "drop": "dedup: same row", "rows": 1})
    steps = {step["step"]: step for step in counts.steps()}
    assert steps["read"]["in"] == counts.rows == 4
    assert steps["clean"] == {"step": "clean", "in": 4, "out": 3, "dropped": {"x": 1}}
    assert steps["dedup"]["dropped"] == {"same row": 1}
    assert steps["cap"]["out"] == counts.kept("s") == 2
    assert counts.languages() == {"deu": 1, "und": 1}
