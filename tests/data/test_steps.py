"""The data steps as pure functions: what each tags, and what no order of rows can change."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.data.account import Account, part_account
from f2llm_ray.data.keys import add_keys, shard_of
from f2llm_ray.data.negatives import class_negatives, label_negatives
from f2llm_ray.data.reading.base import rows_table
from f2llm_ray.data.schema import key_numbers, query_text, seeded_key, text_key
from f2llm_ray.data.table import is_validation


def row(query: str, passage: str, **fields: object) -> dict[str, object]:
    return {"language": "deu", "query": query, "passage": passage, **fields}


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


def test_label_negatives_are_other_labels_of_the_language() -> None:
    labels = ["x", "y", "z", "x", "ä", "ö"]
    languages = ["eng", "eng", "eng", "eng", "deu", "deu"]
    keys = [text_key(label) for label in labels]
    table = pa.table(
        {
            "query_group": pa.array([text_key(name) for name in ("1", "2", "3", "4", "5", "6")], pa.binary(16)),
            "passage_key": pa.array(keys, pa.binary(16)),
            "language": [*languages[:5], "eng"],
            "passage_language": pa.array([None] * 5 + ["deu"], pa.string()),
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


def test_class_negatives_are_texts_of_other_classes_in_the_language() -> None:
    count = 60
    passages = [text_key(str(n)) for n in range(count)]
    classes = [None if n % 10 == 9 else f"class {n % 3}" for n in range(count)]
    table = pa.table(
        {
            "label": pa.array(classes, pa.string()),
            "passage_key": pa.array(passages, pa.binary(16)),
            "passage_group": pa.array([passages[n // 2 * 2] for n in range(count)], pa.binary(16)),
            "language": ["eng" if n < 40 else "deu" if n < 50 else "fra" for n in range(count)],
            "passage_language": pa.array([None if n < 50 else "deu" for n in range(count)], pa.string()),
            "negative_keys": pa.array([[text_key("own")]] + [[]] * (count - 1), pa.list_(pa.binary(16))),
        }
    )
    found = class_negatives(table, source="s", seed=1, count=5)["negative_keys"].to_pylist()
    place = {key: n for n, key in enumerate(passages)}
    assert found[0] == [text_key("own")], "what a row brought itself stays"
    for row, negatives in enumerate(found[1:], start=1):
        others = [place[key] for key in negatives]
        assert len(others) == len({n // 2 for n in others}), "one text of each near-duplicate group"
        assert all(classes[n] not in (None, classes[row]) for n in others)
        assert all((n < 40) == (row < 40) and n // 2 != row // 2 for n in others)
        assert len(others) in ([0] if classes[row] is None else [1, 2, 3, 4, 5])
    again = class_negatives(table, source="s", seed=1, count=5)
    assert again["negative_keys"].to_pylist() == found


def test_a_text_with_two_labels_gets_neither_as_its_negative() -> None:
    keys = [text_key(label) for label in ("x", "y", "z")]
    table = pa.table(
        {
            "query_group": pa.array([text_key(name) for name in ("both", "both", "one")], pa.binary(16)),
            "passage_key": pa.array(keys, pa.binary(16)),
            "language": ["eng"] * 3,
            "passage_language": pa.nulls(3, pa.string()),
            "negative_keys": pa.array([[]] * 3, pa.list_(pa.binary(16))),
        }
    )
    found = label_negatives(table, source="s", seed=1)["negative_keys"].to_pylist()
    assert found[:2] == [[keys[2]]] * 2
    assert set(found[2]) == set(keys[:2])


def test_validation_split_is_by_key_and_of_the_right_size() -> None:
    keys = pa.array([text_key(str(n)) for n in range(20_000)], pa.binary(16))
    held = np.array(is_validation(keys, 0.1).to_pylist())
    assert abs(held.mean() - 0.1) < 0.01
    more = np.array(is_validation(keys, 0.2).to_pylist())
    assert (more >= held).all(), "a larger share only adds rows"
    assert is_validation(keys[5:9], 0.1).to_pylist() == held[5:9].tolist()


def written(drops: list[str | None], languages: list[str | None]) -> pa.Table:
    count = len(drops)
    return pa.table(
        {
            "language": pa.array(languages, pa.string()),
            "detected": pa.array(["fra"] * count, pa.string()),
            "verdict": pa.array(["filled" if name is None else "differs" for name in languages], pa.string()),
            "drop": pa.array(drops, pa.string()),
            "query": ["ab"] * count,
            "passage": ["abcd"] * count,
            "given_negatives": pa.array([2] * count, pa.int32()),
            "dropped_negatives": pa.array([1] * count, pa.int32()),
            "screened_negatives": pa.array([["set"], *[[]] * (count - 1)], pa.list_(pa.string())),
        }
    )


def test_the_account_balances() -> None:
    account = Account()
    account.add_part("s", part_account(written([None, None, None, "clean: x"], ["deu", "deu", None, "fra"])))
    account.drop("s", "deu", "dedup: same row", 1)
    account.add_negatives("s", **{"the query or a positive of it": 2})
    steps = {step["step"]: step for step in account.steps()}
    assert steps["read"]["in"] == account.rows == 4
    assert steps["clean"] == {"step": "clean", "in": 4, "out": 3, "dropped": {"x": 1}}
    assert steps["dedup"]["dropped"] == {"same row": 1}
    assert steps["cap"]["out"] == account.kept("s") == account.left == 2
    assert account.languages() == {"deu": 1, "und": 1}
    card = account.card()
    assert sum(row["rows"] for row in card["rows"]) == 4
    assert card["lengths"]["s"]["query"][:3] == [0, 3, 0]
    assert card["lengths"]["s"]["passage"][:3] == [0, 0, 3]
    assert card["negatives"] == {
        "s": {
            "given": 6,
            "dropped": {"near-equal to the positive": 3, "a text of set": 1, "the query or a positive of it": 2},
        }
    }
    checks = {(row["claimed"], row["detected"], row["verdict"]): row["rows"] for row in card["language_check"]}
    assert checks == {(None, "fra", "filled"): 1, ("deu", "fra", "differs"): 2}
