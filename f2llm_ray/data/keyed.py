"""Values by key, in files that a worker maps from disk; nothing of them is held in memory.

The keys fall into equal ranges, the shards (`keys.shard_of`). Of each shard one file holds the sorted keys [2, n],
and one or more hold the values, rows of one dtype and width in the order of the keys. A look-up is one binary
search in a mapped array and one read. The token store, the teacher's vectors and near-duplicate groups are such.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.keys import Keys, find_keys, shard_of

Names = tuple[str, str]
Values = np.ndarray[Any, np.dtype[Any]]

META = "store.json"
"""Facts of a finished store, written last of its files."""
OPEN_FILES = 512
"""Files that a reader keeps mapped; a system allows 1,024 in all by default."""


def write_shard(folder: Path, shard: int, names: Names, keys_n2: Keys, values_n: Values) -> None:
    """Writes the keys of one shard, which come in any order, and their values."""
    order = np.lexsort((keys_n2[:, 1], keys_n2[:, 0]))
    for name, array in zip(names, (np.ascontiguousarray(keys_n2[order].T), values_n[order]), strict=True):
        np.save(folder / name.format(shard), array)


def read_meta(folder: Path, what: str) -> dict[str, int]:
    """The facts of a finished store.

    Raises:
        RunError: the store has none.
    """
    if not (folder / META).is_file():
        raise RunError(f"{folder}: not a finished {what}: it has no {META}")
    facts: dict[str, int] = json.loads((folder / META).read_text())
    return facts


class KeyedStore:
    """The values in a folder on a local disk.

    Args:
        folder: where the files are.
        shards: number of key ranges.
        names: formats of the names of a shard's file of keys, and of its files of values: number of the shard, and
            of the file.
        rows_per_file: rows in each file of values but a shard's last; by default all are in one.
    """

    def __init__(self, folder: Path, shards: int, names: Names, rows_per_file: int = 1 << 62) -> None:
        self.folder, self.shards, self.rows_per_file = folder, shards, rows_per_file
        self._keys_name, self._values_name = names
        self._open: OrderedDict[str, Values] = OrderedDict()

    def fill(self, values_n: Values, keys: Keys, *, required: str | None = None) -> None:
        """Writes the value of each key into its row.

        Args:
            values_n: gets the values [n, ..]; rows of keys that are not in the store stay as they are.
            keys: the keys [n, 2].
            required: what has such a key, for the error; None where a key may be missing.

        Raises:
            RunError: a required key is not in the store.
        """
        shards = shard_of(keys, self.shards)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            places = find_keys(self._file(self._keys_name.format(shard)), keys[rows])
            there = places >= 0
            if required is not None and not there.all():
                high, low = (int(half) for half in keys[rows[~there][0]])
                raise RunError(f"{self.folder}: no {required} with key {high:016x}{low:016x}")
            rows, (files, places) = rows[there], np.divmod(places[there], self.rows_per_file)
            for file in np.unique(files).tolist():
                here = files == file
                values_n[rows[here]] = self._file(self._values_name.format(shard, file))[places[here]]

    def _file(self, name: str) -> Values:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            if len(self._open) == OPEN_FILES:
                self._open.popitem(last=False)
            self._open[name] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        return self._open[name]
