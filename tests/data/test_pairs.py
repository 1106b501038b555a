"""Dedup and negatives by groups, and decontamination: planted cases, whatever the order of the rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.data.decontaminate import Screened, decontaminate, make_screen
from f2llm_ray.data.dedup import NEAR, SAME, dedup
from f2llm_ray.data.keys import find_keys
from f2llm_ray.data.near.groups import Groups, write_members
from f2llm_ray.data.near.shingles import shingle
from f2llm_ray.data.pairs import drop_near_positives, drop_positives
from f2llm_ray.data.reading.base import rows_table
from f2llm_ray.data.schema import key_array, key_numbers, rng, text_key
from f2llm_ray.data.settings import Decontamination
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet

KEY = pa.binary(16)


def keys(*names: str) -> pa.Array:
    return pa.array([text_key(name) for name in names], KEY)


def test_keys_are_found_where_they_are() -> None:
    numbers = rng("find").integers(0, 2**64, size=(500, 2), dtype=np.uint64)
    numbers[:100, 0] = numbers[0, 0]  # many with the same first half
    ordered = numbers[np.lexsort((numbers[:, 1], numbers[:, 0]))]
    there, missing = ordered[::2], ordered[1::2]
    asked = np.concatenate([ordered, numbers[:5] + np.uint64(1)])
    places = find_keys(np.ascontiguousarray(there.T), asked)
    expected = {tuple(key): place for place, key in enumerate(there.tolist())}
    assert places.tolist() == [expected.get(tuple(key), -1) for key in asked.tolist()]
    assert (find_keys(np.empty((2, 0), np.uint64), missing) == -1).all()


def test_groups_map_members_and_leave_the_rest(tmp_path: Path) -> None:
    names = [str(n) for n in range(50)]
    own = keys(*names)
    table = pa.table({"a": keys(*["0"] * 20), "b": keys(*names[1:21])})
    shards = 4
    groups = Groups(tmp_path, shards)
    from f2llm_ray.data.keys import shard_of

    owner = shard_of(key_numbers(table["b"]), shards)
    for shard in range(shards):
        write_members(tmp_path, shard, table.filter(pa.array(owner == shard)))
    assert groups.of_array(own).to_pylist() == [text_key("0")] * 21 + own[21:].to_pylist()
    assert Groups(None, shards).of_array(own).equals(own)
    assert key_array(key_numbers(own)).equals(own)


def entry(query: str, passage: str, *, rank: int = 0, position: int = 0) -> dict[str, Any]:
    """A row whose texts' groups are the first letters of the texts."""
    return {
        "row_key": f"{query}/{passage}".ljust(16).encode(),
        "query_group": text_key(query[0]),
        "passage_group": text_key(passage[0]),
        "source_rank": rank,
        "language": "deu",
        "piece": rank,
        "position": position,
    }


def table(entries: list[dict[str, Any]]) -> pa.Table:
    found = pa.Table.from_pylist(entries)
    for name in ("row_key", "query_group", "passage_group"):
        found = found.set_column(found.schema.get_field_index(name), name, found[name].cast(KEY))
    return found


def test_both_sides_must_be_near_equal_for_a_row_to_go() -> None:
    entries = [
        entry("q1", "p1", position=1),
        entry("q2", "p2", position=2),  # near-equal to the first on both sides, and of a larger key
        entry("q1", "p1", position=3),  # the first again
        entry("q1", "x", position=4),  # another answer to the same question
        entry("r", "p1", position=5),  # another question with the same answer, as a label has
        entry("q3", "p3", rank=1, position=0),  # of a later source
    ]
    for seed in range(5):
        found = dedup(table(random.Random(seed).sample(entries, len(entries))))
        tags = {(row["piece"], row["position"]): row["drop"] for row in found.to_pylist()}
        assert tags == {(0, 1): None, (0, 2): NEAR, (0, 3): SAME, (0, 4): None, (0, 5): None, (1, 0): NEAR}
        kept = {(row["kept_piece"], row["kept_position"]) for row in found.to_pylist() if row["drop"]}
        assert kept == {(0, 1)}


def test_no_positive_of_a_query_is_a_negative_of_it(tmp_path: Path) -> None:
    groups = Groups(tmp_path, 1)
    write_members(tmp_path, 0, pa.table({"a": keys("other answer"), "b": keys("other answer!")}))
    rows = pa.table(
        {
            "query_key": keys("q", "Q", "r"),
            "query_group": keys("q", "q", "r"),
            "passage_group": keys("answer", "other answer", "third"),
            "negative_keys": pa.array(
                [
                    [text_key(t) for t in ("other answer!", "wrong", "third", "q", "Q")],
                    [text_key(t) for t in ("answer", "other answer")],
                    [text_key(t) for t in ("answer", "third", "wrong")],
                ],
                pa.list_(KEY),
            ),
            "negative_scores": pa.array([[1, 2, 3, 4, 5], None, [4, 5, 6]], pa.list_(pa.float32())),
        }
    )
    found = drop_positives(rows, groups)
    assert found["negative_keys"].to_pylist() == [
        [text_key("wrong"), text_key("third"), text_key("Q")],
        [],
        [text_key("answer"), text_key("wrong")],
    ]
    assert found["dropped_negatives"].to_pylist() == [2, 2, 1]
    assert found["negative_scores"].to_pylist() == [[2, 3, 5], None, [4, 6]], "scores go with their texts"


def test_negatives_near_equal_to_the_positive_go() -> None:
    words = [f"word{n}" for n in range(40)]
    positive = " ".join(words)
    near, far = " ".join([*words[:-1], "else"]), " ".join(words[::-1])
    rows = rows_table(
        [
            {
                "query": "q",
                "passage": positive,
                "negatives": [near, far, positive.upper() + "."],
                "negative_scores": [3, 1, 2],
            },
            {"query": "q", "passage": "short"},
            {"query": "q", "passage": "short", "negatives": ["Short!", "shorter"]},
        ],
        source="s",
        task="retrieval",
    )
    found = drop_near_positives(rows, size=5, min_jaccard=0.7)
    assert found["negatives"].to_pylist() == [[far], [], ["shorter"]]
    assert found["dropped_negatives"].to_pylist() == [2, 0, 1]
    assert found["negative_scores"].to_pylist() == [[1], None, None]
    assert drop_near_positives(rows.slice(1, 1), size=5, min_jaccard=0.7)["dropped_negatives"].to_pylist() == [0]


def screen_of(queries: list[str], corpus: list[str], **settings: Any) -> Any:
    found = RetrievalSet(
        name="set1",
        instruction="",
        query_ids=[str(n) for n in range(len(queries))],
        query_texts=queries,
        query_languages=["und"] * len(queries),
        corpus_ids=[str(n) for n in range(len(corpus))],
        corpus_texts=corpus,
        relevant=np.array([[0, 0]]),
    )
    return make_screen({found.name: found.screened()}, Decontamination(**settings))


def test_rows_that_hold_a_text_of_a_set_are_tagged() -> None:
    long = "the quick brown fox jumps over the lazy dog and then it sleeps for a while"
    screen = screen_of(["test query", "猫が窓のそばで眠っていますね"], [long, "Save"])
    half = " ".join(long.split()[:9])
    pairs = [
        ("Test  query?", "b"),
        ("a", "test query"),
        ("a test query", "b"),  # a short query inside a longer text is no contamination
        ("a", f"before {long} after"),
        ("a", long.upper().replace(" ", ", ")),
        ("a", half),
        ("Save", "save"),
        ("猫が窓のそばで眠っています", "x"),
        ("clean", "row"),
    ]
    rows = rows_table([{"query": q, "passage": p} for q, p in pairs], source="s", task="retrieval")
    tag = "decontaminate: set1"
    found = decontaminate(rows, screen)["drop"].to_pylist()
    assert found == [tag, tag, None, tag, tag, None, None, tag, None]
    only_queries = decontaminate(rows, screen_of(["test query"], [long], passages=False))
    assert only_queries["drop"].to_pylist() == [tag, tag, *[None] * 7]
    nothing = decontaminate(rows, make_screen({}, Decontamination()))
    assert nothing.drop_columns(["screened_negatives"]).equals(rows)
    assert nothing["screened_negatives"].null_count == len(rows)


def test_negatives_that_hold_a_text_of_a_set_go_and_their_rows_stay() -> None:
    """Each with its score, and counted by its set; also those that a training set shares with many rows."""
    long = "the quick brown fox jumps over the lazy dog and then it sleeps for a while"
    other = "another set asks whether nine words of its own are found in the training rows"
    sets = {"one": Screened(["test query"], [long, "Save"]), "two": Screened([other], [])}
    negatives = [["fine", long, "Save"], [], ["Test query!", f"so {other}", f"{long} too", "fine"], ["fine"]]
    rows = rows_table(
        [
            {"query": f"q{n}", "passage": "p", "negatives": texts, "negative_scores": [*range(len(texts))]}
            for n, texts in enumerate(negatives)
        ],
        source="s",
        task="retrieval",
    )
    found = decontaminate(rows, make_screen(sets, Decontamination()))
    assert found["drop"].to_pylist() == [None] * 4
    assert found["negatives"].to_pylist() == [["fine", "Save"], [], ["fine"], ["fine"]]
    assert found["negative_scores"].to_pylist() == [[0, 2], [], [3], [0]]
    assert found["screened_negatives"].to_pylist() == [["one"], [], ["one", "two", "one"], []]


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=14), min_size=1, max_size=6), st.floats(0.1, 1))
def test_near_positives_are_those_whose_jaccard_says_so(texts: list[list[str]], least: float) -> None:
    """Whatever is told apart before: as the shingles of each pair, as sets, say it."""
    said = [" ".join(words) for words in texts]
    rows = rows_table(
        [{"query": "q", "passage": text, "negatives": said} for text in said], source="s", task="retrieval"
    )
    found = drop_near_positives(rows, size=2, min_jaccard=least)["negatives"].to_pylist()
    hashes, lengths = shingle(said, 2).distinct()
    sets = [set(part.tolist()) for part in np.split(hashes, np.cumsum(lengths)[:-1])]
    expected = [
        [text for text, theirs in zip(said, sets, strict=True) if len(own & theirs) / len(own | theirs) < least]
        for own in sets
    ]
    assert found == expected


def test_overlap_is_counted_as_python_sets_count_it() -> None:
    generator = random.Random(0)
    texts = [" ".join(generator.choices("abcde", k=generator.randint(1, 14))) for _ in range(80)]
    training = [" ".join(generator.choices("abcde", k=generator.randint(1, 14))) for _ in range(300)]

    def grams(text: str) -> set[tuple[str, ...]]:
        tokens = text.split()
        return {tuple(tokens[i : i + 3]) for i in range(max(len(tokens) - 2, 1))}

    screen = screen_of(texts, ["nothing"], ngram=3, overlap=0.5)
    expected = [any(2 * len(grams(t) & grams(text)) >= len(grams(text)) for text in texts) for t in training]
    assert (screen.find(training) >= 0).tolist() == expected
    assert any(expected)
    assert not all(expected)
