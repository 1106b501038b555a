"""Rows drawn from the training table: each source gives as many, and in it each language in turn.

So the few rows of a small language are among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.language import UNKNOWN
from f2llm_ray.data.ragged import Ints, numbered
from f2llm_ray.data.schema import key_numbers, rng
from f2llm_ray.data.tokens.store import Tokens, TokenStore
from f2llm_ray.run.folder import Folder


def calibration_tokens(sources: Sequence[str], seed: int, prepared: Folder, rows: int) -> list[Tokens]:
    """Distinct token lists of queries (with instructions) and passages of about so many rows."""
    columns = ["instructed_key", "passage_key"]
    keys = [
        key_numbers(drawn[name]) for drawn in _drawn(sources, seed, prepared, rows, columns) for name in columns
    ]
    return _texts(prepared, np.unique(np.concatenate(keys), axis=0))


def pair_tokens(
    sources: Sequence[str], seed: int, prepared: Folder, rows: int
) -> tuple[list[Tokens], list[Tokens]]:
    """Token lists of the queries (without instructions) and passages of about so many training rows."""
    columns = ["query_key", "passage_key"]
    drawn = _drawn(sources, seed, prepared, rows, [*columns, "validation"])
    trained = pa.concat_tables(table.filter(pc.invert(table["validation"])) for table in drawn)
    keys = np.concatenate([key_numbers(trained[name]) for name in columns])
    distinct, places = np.unique(keys, axis=0, return_inverse=True)
    texts = _texts(prepared, distinct)
    listed = [texts[place] for place in places.reshape(-1)]
    return listed[: len(trained)], listed[len(trained) :]


def _drawn(
    sources: Sequence[str], seed: int, prepared: Folder, rows: int, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Columns of the rows that each source gives."""
    share = -(-rows // len(sources))
    for source in sources:
        table = (prepared / "table").read_table(f"{source}.parquet", [*columns, "language"])
        yield table.take(by_turns(_codes(table["language"]), rng(seed, "calibration", source))[:share])


def _texts(prepared: Folder, keys_n2: np.ndarray[tuple[int, int], np.dtype[np.uint64]]) -> list[Tokens]:
    with (prepared / "tokens").as_local() as store:
        # Copied, since the store may be a temporary copy of a remote one.
        return [text.copy() for text in TokenStore(store).lookup(keys_n2)]


def _codes(languages: pa.ChunkedArray) -> Ints:
    return languages.combine_chunks().fill_null(UNKNOWN).dictionary_encode().indices.to_numpy().astype(np.int64)


def by_turns(groups: Ints, generator: np.random.Generator) -> Ints:
    """All rows in random order, but so that each group has given n before one gives its n + 1-st."""
    order = generator.permutation(len(groups))
    by_group = order[np.argsort(groups[order], kind="stable")]
    place = np.empty(len(groups), np.int64)
    place[by_group] = numbered(np.bincount(groups))
    return order[np.argsort(place[order], kind="stable")]
