"""Global batches: every row once, no text twice in a batch, and the seed alone decides the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.batches.table import (
    MOST_REPEATS,
    BatchTable,
    by_length,
    draw_negatives,
    epoch_rows,
    fill_batches,
    mix,
    rank_slice,
    row_rates,
    write_source,
)
from f2llm_ray.data.schema import rng, text_key


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=80), st.integers(2, 8))
def test_no_row_is_lost_and_all_batches_are_full(texts: list[tuple[int, int]], size: int) -> None:
    pairs = np.array([[query, 100 + passage] for query, passage in texts])
    order = rng("t").permutation(len(pairs))
    batches = fill_batches(order, pairs, size)
    assert all(len(batch) == size for batch in batches)
    assert set(np.concatenate(batches).tolist()) == set(range(len(pairs)))
    assert sum(map(len, batches)) - len(pairs) < size, "only the last batch is filled up with rows seen already"


def test_texts_stand_once_in_a_batch_while_there_are_enough_of_them() -> None:
    generator = np.random.default_rng(0)
    texts = np.stack([np.arange(1000), 10_000 + generator.integers(0, 200, 1000)], axis=1)
    batches = fill_batches(generator.permutation(1000), texts, 50)
    repeats = [50 - len(np.unique(texts[batch, 1])) for batch in batches]
    assert sum(repeats[:-3]) == 0


def test_weights_say_how_often_a_row_is_seen() -> None:
    half = epoch_rows(np.full(1000, 0.5), rng("a"))
    assert len(set(half.tolist())) == len(half) == 500
    more = np.bincount(epoch_rows(np.full(1000, 2.25), rng("a")))
    assert more.sum() == 2250
    assert set(more.tolist()) == {2, 3}
    assert sorted(epoch_rows(np.ones(1000), rng("a")).tolist()) == list(range(1000))


def test_a_temperature_evens_out_languages_and_keeps_the_weight() -> None:
    languages = np.repeat([0, 1, 2], [8000, 1600, 400])
    assert (row_rates(languages, 0.5, 1.0) == 0.5).all()
    for weight in (0.5, 1.0, 3.0):
        rates = row_rates(languages, weight, 2.0)
        taken = np.bincount(languages[epoch_rows(rates, rng("a"))])
        expected = weight * 10_000 * np.sqrt([8000, 1600, 400]) / np.sqrt([8000, 1600, 400]).sum()
        np.testing.assert_allclose(taken, expected, rtol=0.01)
    rare = row_rates(np.repeat([0, 1], [10_000, 3]), 1.0, 5.0)
    assert rare.max() == MOST_REPEATS


def test_sorting_by_length_within_windows_keeps_every_row() -> None:
    order, lengths = rng("o").permutation(1000), rng("l").integers(1, 500, 1000)
    found = by_length(order, lengths, 200)
    assert sorted(found.tolist()) == sorted(order.tolist())
    for first in range(0, 1000, 200):
        assert set(found[first : first + 200].tolist()) == set(order[first : first + 200].tolist())
        assert (np.diff(lengths[found[first : first + 200]]) >= 0).all()


@given(st.lists(st.lists(st.integers(0, 99), max_size=9, unique=True), min_size=1, max_size=9), st.integers(0, 5))
def test_negatives_are_drawn_from_the_rows_own(lists: list[list[int]], count: int) -> None:
    keys = [[text_key(str(n)) for n in row] for row in lists]
    array = pa.array([[b"\0" * 16], *keys], pa.list_(pa.binary(16))).slice(1)
    names = pa.array([[-1], *lists], pa.list_(pa.int64())).slice(1)
    drawn, beside = (found.to_pylist() for found in draw_negatives([array, names], count, rng("x")))
    assert drawn == [[text_key(str(n)) for n in row] for row in beside], (
        "what stands beside them is drawn with them"
    )
    for own, found in zip(keys, drawn, strict=True):
        assert len(found) == min(len(own), count) == len(set(found))
        assert set(found) <= set(own)


def test_mixing_keeps_every_batch_and_its_epoch() -> None:
    order = mix([[3, 2], [3, 2]], seed="s")
    assert order["epoch"].tolist() == [0] * 5 + [1] * 5
    for epoch in (0, 1):
        entries = order[order["epoch"] == epoch]
        assert sorted(zip(entries["source"].tolist(), entries["batch"].tolist(), strict=True)) == [
            (0, 0),
            (0, 1),
            (0, 2),
            (1, 0),
            (1, 1),
        ]
    assert np.array_equal(order, mix([[3, 2], [3, 2]], seed="s"))
    assert len(mix([[3, 2]], seed="s", max_steps=4)) == 4


def table_of(rows: int) -> pa.Table:
    keys = [text_key(f"{kind}{n}") for kind in "qp" for n in range(rows)]
    negatives = [[text_key(f"n{n}{k}") for k in range(n % 4)] for n in range(rows)]
    return pa.table(
        {
            "query": pa.array(keys[:rows], pa.binary(16)),
            "passage": pa.array(keys[rows:], pa.binary(16)),
            "query_group": pa.array(keys[:rows], pa.binary(16)),
            "passage_group": pa.array(keys[rows:], pa.binary(16)),
            "negatives": pa.array(negatives, pa.list_(pa.binary(16))),
        }
    )


def test_files_hold_whole_batches_in_the_order_of_the_seed(tmp_path: Path) -> None:
    (tmp_path / "epoch-000").mkdir()
    path = tmp_path / "epoch-000" / "s.arrow"
    arguments = {"source": "s", "task": "retrieval", "negatives": 2, "size": 8, "seed": "1/a/0"}
    assert write_source(path, table_of(50), np.arange(50), **arguments) == 7
    first = path.read_bytes()
    write_source(path, table_of(50), np.arange(50), **arguments)
    assert path.read_bytes() == first
    write_source(path, table_of(50), np.arange(50), **{**arguments, "seed": "1/a/1"})
    assert path.read_bytes() != first

    np.save(tmp_path / "order.npy", mix([[7]], seed="x"))
    table = BatchTable(tmp_path, ("s",))
    seen = [key for entry in table.order() for key in table.batch(entry)["query"].to_pylist()]
    assert len(seen) == 56
    assert set(seen) == set(table_of(50)["query"].to_pylist())
    with pytest.raises(RunError, match=r"order\.npy"):
        BatchTable(tmp_path / "none", ("s",)).order()


def test_a_source_of_a_single_row_still_makes_a_batch(tmp_path: Path) -> None:
    count = write_source(
        tmp_path / "s.arrow",
        table_of(1),
        np.arange(1),
        source="s",
        task="retrieval",
        negatives=1,
        size=4,
        seed="x",
    )
    assert count == 1


@given(st.integers(1, 16), st.integers(1, 8))
def test_ranks_share_a_batch_without_overlap(share: int, world: int) -> None:
    rows = [row for rank in range(world) for row in range(share * world)[rank_slice(share * world, rank, world)]]
    assert rows == list(range(share * world))
