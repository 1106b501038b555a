"""Connected components of a graph of texts: each text gets the smallest key it is connected to.

`smallest` works in one process on numbered nodes. `spread` works on edges of any number, by rounds of the
large-star and small-star steps of Kiveris et al. ("Connected Components in MapReduce and Beyond", 2014), each a
shuffle by node.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.flow import map_groups
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.near.shingles import mixed
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import KEY, key_numbers

if TYPE_CHECKING:
    import ray.data

EDGE = pa.schema([("a", KEY), ("b", KEY)])


def smallest(nodes: int, a: Ints, b: Ints) -> Ints:
    """The smallest node [nodes] that each node is connected to by the edges (a[i], b[i]); itself when by none.

    Labels sink along edges and are followed to their own labels, so the rounds grow with the logarithm of the
    longest chain.
    """
    label = np.arange(nodes)
    while True:
        low = np.minimum(label[a], label[b])
        before = label.copy()
        # Hooking the labels themselves, not only the ends, lets whole trees move at once.
        for end in (label[a], label[b], a, b):
            np.minimum.at(label, end, low)
        while (label != label[label]).any():
            label = label[label]
        if (label == before).all():
            return label


def stars(edges: pa.Table) -> pa.Table:
    """The same components as edges from the smallest key `a` of each to every other key `b`, sorted by (a, b)."""
    ends = pa.concat_arrays([*edges["a"].chunks, *edges["b"].chunks]).dictionary_encode()
    order = pc.sort_indices(ends.dictionary)
    keys = ends.dictionary.take(order)
    rank = np.empty(len(order), np.int64)
    rank[order.to_numpy()] = np.arange(len(order))
    a, b = rank[ends.indices.to_numpy()].reshape(2, -1)
    root = smallest(len(keys), a, b)
    others = np.flatnonzero(root != np.arange(len(keys)))
    table = pa.table({"a": keys.take(pa.array(root[others])), "b": keys.take(pa.array(others))}, EDGE)
    return table.sort_by([("a", "ascending"), ("b", "ascending")])


def spread(edges: ray.data.Dataset, shards: int) -> ray.data.Dataset:
    """`stars` of more edges than one process holds: every step sees the edges of one key range of nodes.

    Args:
        edges: blocks of `EDGE`.
        shards: key ranges.
    """
    before = None
    while True:
        edges = _step(_step(edges, shards, large=True), shards, large=False).materialize()
        sums = edges.map_batches(_fingerprint, batch_format="pyarrow", batch_size=None).take_all()
        state = (edges.count(), sum(row["sum"] for row in sums))
        if state == before:
            return edges
        before = state


def _step(edges: ray.data.Dataset, shards: int, *, large: bool) -> ray.data.Dataset:
    sent = edges.map_batches(partial(_send, shards=shards, both=large), batch_format="pyarrow", batch_size=None)
    return map_groups(sent, "shard", partial(_star, large=large))


def _send(edges: pa.Table, *, shards: int, both: bool) -> pa.Table:
    """Edges keyed by the node that will work on them: both ends in the large star, the larger one in the small."""
    if not edges.num_columns:
        return edges
    a, b = (edges[name].combine_chunks() for name in ("a", "b"))
    if both:
        node, other = pa.concat_arrays([a, b]), pa.concat_arrays([b, a])
    else:
        first = pc.less(a, b)
        node, other = pc.if_else(first, b, a), pc.if_else(first, a, b)
    shard = pa.array(shard_of(key_numbers(node), shards))
    return pa.table({"a": node, "b": other, "shard": shard})


def _star(edges: pa.Table, *, large: bool) -> pa.Table:
    """One star step for the nodes `a` of a shard, whose neighbours are `b`.

    Both tie neighbours to the smallest of the node and its neighbours: the large star those greater than the node,
    the small star those less, and the node itself.
    """
    edges = edges.select(["a", "b"]).sort_by([("a", "ascending"), ("b", "ascending")]).combine_chunks()
    node, other = (edges[name].combine_chunks() for name in ("a", "b"))
    changed = np.ones(len(node), bool)
    changed[1:] = pc.not_equal(node[1:], node[:-1]).to_numpy(zero_copy_only=False)
    first = np.flatnonzero(changed)
    least = other.take(pa.array(first[np.cumsum(changed) - 1]))
    least = pc.if_else(pc.less(node, least), node, least)
    if large:
        found = pa.table({"a": least, "b": other}, EDGE).filter(pc.greater(other, node))
    else:
        heads = pa.array(first)
        near = pa.concat_arrays([least, least.take(heads)])
        found = pa.table({"a": near, "b": pa.concat_arrays([other, node.take(heads)])}, EDGE)
        found = found.filter(pc.not_equal(found["a"], found["b"]))
    return found.group_by(["a", "b"]).aggregate([])


def _fingerprint(edges: pa.Table) -> pa.Table:
    """A number of a block of edges that adds up over blocks, whatever their order: a hash of each edge, summed."""
    if not edges.num_columns:
        return pa.table({"sum": pa.array([0], pa.int64())})
    (_, a), (_, b) = (key_numbers(edges[name]).T for name in ("a", "b"))
    total = int(mixed(a + mixed(b)).sum(dtype=np.uint64))
    return pa.table({"sum": pa.array([total >> 20], pa.int64())})
