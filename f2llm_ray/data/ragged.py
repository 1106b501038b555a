"""Lists of different lengths, laid end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Ints = np.ndarray[Any, np.dtype[np.int64]]


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """The numbers start, start + 1, ... of each range, one range after the other.

    Args:
        starts: first number of each range [n].
        lengths: how many numbers each has [n].
    """
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def numbered(lengths: Ints) -> Ints:
    """The place of every item within its own list: 0, 1, ... for each list."""
    return ranges(np.zeros(len(lengths), np.int64), lengths)


def lengths_of(lists: pa.ListArray) -> Ints:
    """The length of each list."""
    return np.asarray(pc.list_value_length(lists).to_numpy(zero_copy_only=False), np.int64)


def list_array(values: pa.Array, lengths: Ints) -> pa.ListArray:
    """Lists of values that lie end to end."""
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)), pa.int32()), values)


def filter_beside(values: pa.ListArray, lengths: Ints, keep: np.ndarray[Any, np.dtype[np.bool_]]) -> pa.ListArray:
    """Lists of values that stand beside those of a `filter_lists`, less the same items; null ones stay null.

    Args:
        values: lists as long as the others, or null.
        lengths: of the others.
        keep: which of the others' items are kept.
    """
    there = values.is_valid()
    some = there.to_numpy(zero_copy_only=False)
    if not some.any():
        return values
    filled = pc.fill_null(values, pa.scalar([], values.type))
    return pc.if_else(there, filter_lists(filled, keep[np.repeat(some, lengths)]), pa.scalar(None, values.type))


def filter_lists(lists: pa.ListArray, keep: np.ndarray[Any, np.dtype[np.bool_]]) -> pa.ListArray:
    """The lists with only the items that are kept, whose mask lies end to end as the items do."""
    lengths = lengths_of(lists)
    left = np.bincount(np.repeat(np.arange(len(lists)), lengths)[keep], minlength=len(lists))
    return list_array(lists.flatten().filter(pa.array(keep)), left)
