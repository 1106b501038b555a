"""Building the token store: each distinct text of the table is tokenised once, where its row was written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import Progress
from f2llm_ray.data.flow import map_groups, part_file
from f2llm_ray.data.keyed import META
from f2llm_ray.data.keys import prompted, shard_of
from f2llm_ray.data.ragged import lengths_of
from f2llm_ray.data.schema import KEY, TextPrompts, key_numbers, query_text
from f2llm_ray.data.tokens import store as tokens
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INDEX = pa.schema([("key", KEY), ("piece", pa.int64()), ("offset", pa.uint64()), ("length", pa.uint32())])
# What a text is to its row.
QUERY, INSTRUCTED, PASSAGE, NEGATIVE = range(4)
TOKENIZE_ROWS = 4096
PROMPTS = "prompts.json"


@dataclass(frozen=True)
class StoreFacts:
    """What a token store holds."""

    texts: int
    tokens: int
    cut: dict[str, int]
    """Texts that were longer than the longest token list, by source."""


def write_store(
    instructions: Mapping[str, str | None],
    max_tokens: int,
    shards: int,
    tokenizer: Tokenizer | None,
    prepared: Folder,
    store: Folder,
    *,
    prompts: TextPrompts,
    queries: tuple[int, ...] = (QUERY, INSTRUCTED),
) -> StoreFacts:
    """Writes a token store of all texts in the table; pieces that an earlier try has finished stay as they are.

    Args:
        instructions: of every source's queries, by its name; None where the prompt stands before a query that is
            asked with one, too.
        max_tokens: longest token list; longer texts are cut.
        shards: key ranges.
        tokenizer: one that ends texts with EOS; None stores the whole texts (`store.code_points`).
        prepared: folder with `rows/` and `table/`.
        store: gets the files.
        prompts: what the texts start with in this store; `prepared` says those that the table's ids are of.
        queries: whether queries are stored as they are, with their instruction, or both.

    Returns:
        What the store holds.
    """
    import ray.data

    names = ray.data.from_items([{"source": name} for name in instructions], override_num_blocks=len(instructions))
    places = names.map_batches(
        partial(_places, table=prepared / "table", shards=shards, queries=queries),
        batch_size=1,
        batch_format="pyarrow",
    )
    first = map_groups(places, "shard", first_places)
    tokenize = partial(
        _tokenize_part,
        instructions=dict(instructions),
        max_tokens=max_tokens,
        tokenizer=None if tokenizer is None else tokenizer.to_str(),
        rows=prepared / "rows",
        store=store,
        prompts=prompts,
        keyed=read_prompts(prepared),
    )
    written = map_groups(first, "piece", tokenize)
    indexed = map_groups(written, "shard", partial(_index_shard, store=store))
    progress, texts, total, done = Progress("prepare: tokens", shards, "shards"), 0, 0, set()
    longer: Counter[str] = Counter()
    for row in indexed.iter_rows():
        done.add(row["shard"])
        texts, total = texts + row["texts"], total + row["tokens"]
        longer.update(json.loads(row["cut"]))
        progress.update(len(done), f"{texts:,} texts", f"{total:,} tokens")
    with store.writing() as path:
        for shard in set(range(shards)) - done:  # a small corpus leaves key ranges empty
            tokens.write_index(path, shard, INDEX.empty_table())
        tokens.write_meta(path, shards=shards, texts=texts, tokens=total)
    return StoreFacts(texts, total, dict(sorted(longer.items())))


def write_own_store(write: Callable[[Folder], object], reader: str, prepared: Folder, store: Folder) -> Folder:
    """The store of what a model reads that does not read the prepared tokens; written unless it is there.

    Args:
        write: `write_store` but for the folder.
        reader: the model, as an error calls it.
        prepared: folder of the prepare stage.
        store: gets the files.

    Raises:
        RunError: the prepared data have no texts any more.
    """
    if not store.exists(META):
        if not prepared.exists("rows"):
            raise RunError(
                f"{prepared.uri}/rows: not there; {reader} has another tokenizer or other prompts than the "
                "prepared data and needs its texts"
            )
        write(store)
    return store


def write_prompts(prepared: Folder, prompts: TextPrompts) -> None:
    """Says in the prepared data what the texts start with whose ids the table has."""
    prepared.write_json(PROMPTS, asdict(prompts))


def read_prompts(prepared: Folder) -> TextPrompts:
    """What `write_prompts` wrote."""
    return TextPrompts(**prepared.read_json(PROMPTS))


def _places(batch: pa.Table, *, table: Folder, shards: int, queries: tuple[int, ...]) -> pa.Table:
    """Key and place of every text of a source: its row's place, and its role there.

    Negatives that are other rows' labels have no place of their own; they are those rows' passages.
    """
    (source,) = batch["source"].to_pylist()
    names = {QUERY: "query_key", INSTRUCTED: "instructed_key", PASSAGE: "passage_key"}
    columns = {role: name for role, name in names.items() if role in (*queries, PASSAGE)}
    rows = table.read_table(f"{source}.parquet").combine_chunks()
    piece, position = (rows[name].to_numpy() for name in ("piece", "position"))
    lists = rows["negative_keys"].combine_chunks()
    owner = np.repeat(np.arange(len(rows)), lengths_of(lists))
    key = pa.concat_arrays(
        [*(rows[name].combine_chunks() for name in columns.values()), pc.list_flatten(lists).cast(KEY)]
    )
    columns_of = {
        "piece": np.concatenate([*[piece] * len(columns), piece[owner]]),
        "position": np.concatenate([*[position] * len(columns), position[owner]]),
        "role": np.concatenate([np.repeat(list(columns), len(rows)), np.full(len(owner), NEGATIVE)]),
        "shard": shard_of(key_numbers(key), shards),
    }
    return pa.table({"key": key, **{name: pa.array(values, pa.int64()) for name, values in columns_of.items()}})


def first_places(places: pa.Table) -> pa.Table:
    """One place of each key, the same one in every run: a passage's or query's before a negative's."""
    places = places.sort_by([(name, "ascending") for name in ("key", "role", "piece", "position")])
    keys = places["key"].combine_chunks()
    first = np.ones(len(keys), dtype=bool)
    first[1:] = pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    return places.filter(pa.array(first))


def _tokenize_part(
    places: pa.Table,
    *,
    instructions: Mapping[str, str | None],
    max_tokens: int,
    tokenizer: str | None,
    rows: Folder,
    store: Folder,
    prompts: TextPrompts,
    keyed: TextPrompts,
) -> pa.Table:
    from tokenizers import Tokenizer as Tokenizers

    piece = places["piece"][0].as_py()
    places = places.sort_by([(name, "ascending") for name in ("position", "role", "key")])
    encode = tokens.code_points
    if tokenizer is not None:
        encode = partial(tokens.tokenize, Tokenizers.from_str(tokenizer))
    file = rows.read_table(part_file(piece), ["source", "query", "passage", "negatives", "negative_keys"])
    texts = _texts(places, file, instructions[file["source"][0].as_py()], prompts, keyed)
    batches = iter(lambda: list(islice(texts, TOKENIZE_ROWS)), [])
    with store.writing() as path:
        lengths = tokens.write_piece(
            path / f"{piece:06d}.bin",
            map(encode, batches),
            None if tokenizer is None else max_tokens,
        )
    for name in lengths.column_names:
        places = places.append_column(name, lengths[name])
    places = places.append_column("source", pa.repeat(file["source"][0], len(places)))
    return places.drop_columns(["position", "role"])


def _texts(
    places: pa.Table, file: pa.Table, instruction: str | None, prompts: TextPrompts, keyed: TextPrompts
) -> Iterator[str]:
    names = ("query", "passage", "negatives", "negative_keys")
    columns = {name: file[name].combine_chunks() for name in names}
    bare = prompted(places["key"].combine_chunks(), keyed.document)  # as rows have the keys of passages
    wanted = (values.to_pylist() for values in (places["position"], places["role"], bare))
    for position, role, key in zip(*wanted, strict=True):
        if role == NEGATIVE:
            # By its key: the table has fewer negatives than the row was written with.
            number = columns["negative_keys"][position].as_py().index(key)
            yield prompts.document + columns["negatives"][position][number].as_py()
        elif role == PASSAGE:
            yield prompts.document + columns["passage"][position].as_py()
        else:
            query = columns["query"][position].as_py()
            instructed = role == INSTRUCTED and instruction is not None
            yield query_text(query, instruction or "") if instructed else prompts.query + query


def _index_shard(entries: pa.Table, *, store: Folder) -> pa.Table:
    shard = entries["shard"][0].as_py()
    with store.writing() as path:
        tokens.write_index(path, shard, entries)
    longer = entries.filter(pc.greater(entries["whole"], entries["length"]))
    return pa.table(
        {
            "shard": [shard],
            "texts": [len(entries)],
            "tokens": [pc.sum(entries["length"]).as_py()],
            "cut": [json.dumps(Counter(longer["source"].to_pylist()))],
        }
    )
