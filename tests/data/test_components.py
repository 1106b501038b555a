"""Connected components: the fast, the distributed and the obvious way agree."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.data.account import told
from f2llm_ray.data.near.components import EDGE, smallest, spread, stars
from f2llm_ray.data.schema import text_key

Edges = list[tuple[int, int]]


def slow(nodes: int, edges: Edges) -> list[int]:
    label = list(range(nodes))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return label


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2))))
)
def test_smallest_equals_the_slow_way(graph: tuple[int, Edges]) -> None:
    nodes, edges = graph
    a, b = np.array(edges, np.int64).reshape(-1, 2).T
    assert smallest(nodes, a, b).tolist() == slow(nodes, edges)


def test_a_chain_of_a_million() -> None:
    order = np.random.default_rng(0).permutation(1_000_000)
    assert (smallest(len(order), order[:-1], order[1:]) == 0).all()


def table(edges: Edges) -> pa.Table:
    ends = [[text_key(str(end)) for end in side] for side in zip(*edges, strict=True)]
    return pa.table({"a": pa.array(ends[0], pa.binary(16)), "b": pa.array(ends[1], pa.binary(16))}, EDGE)


def planted() -> Edges:
    """Random edges, a shuffled chain, a giant star, a complete graph, a loop and a double."""
    generator = random.Random(0)
    chain = generator.sample(range(1000, 1200), 200)
    edges = [(generator.randrange(300), generator.randrange(300)) for _ in range(150)]
    edges += list(pairwise(chain))
    edges += [(2000, other) for other in range(2001, 3000)]
    edges += [(a, b) for a in range(4000, 4020) for b in range(4000, a)]
    return [*edges, (5000, 5000), (5001, 5002), (5002, 5001)]


@pytest.mark.usefixtures("ray_here")
def test_spread_over_shards_equals_one_process() -> None:
    import ray.data

    edges = planted()
    expected = stars(table(edges))
    roots = dict(zip(expected["b"].to_pylist(), expected["a"].to_pylist(), strict=True))
    label = {text_key(str(node)): text_key(str(node)) for edge in edges for node in edge}
    for _ in range(400):
        for a, b in edges:
            ends = text_key(str(a)), text_key(str(b))
            label[ends[0]] = label[ends[1]] = min(label[ends[0]], label[ends[1]])
        if all(label[text_key(str(a))] == label[text_key(str(b))] for a, b in edges):
            break
    assert roots == {node: root for node, root in label.items() if node != root}
    random.Random(1).shuffle(edges)
    blocks = [table(edges[start : start + 300]) for start in range(0, len(edges), 300)]
    found = spread(ray.data.from_arrow(blocks), shards=3)
    rows = pa.concat_tables([block for block in ray.get(found.to_arrow_refs()) if block.num_columns]).select(
        ["a", "b"]
    )
    order = [("a", "ascending"), ("b", "ascending")]
    assert rows.sort_by(order).equals(expected.combine_chunks())


def test_the_account_of_all_steps_in_a_line() -> None:
    steps = [
        {"step": "read", "in": 1_005, "out": 1_000, "dropped": {"bad row": 5}},
        {"step": "clean", "in": 1_000, "out": 900, "dropped": {"passage too long": 90, "query is markup": 10}},
    ]
    assert told(steps) == (
        "1,005 rows read, 900 kept; left out: clean: passage too long 90, clean: query is markup 10, "
        "read: bad row 5"
    )
    assert told([{"step": "read", "in": 3, "out": 3, "dropped": {}}]) == "3 rows read, 3 kept"
