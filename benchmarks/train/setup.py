"""What both benchmarks of training run on: a tiny Qwen3, texts of natural lengths, and the stages' folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.loader import random_keys
from f2llm_ray.data.batches.table import BatchTable
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.ragged import list_array
from f2llm_ray.data.schema import SourceFacts, TextPrompts, key_numbers
from f2llm_ray.data.tokens import store as store_files
from f2llm_ray.data.tokens.build import write_prompts
from f2llm_ray.data.tokens.store import cut
from f2llm_ray.data.tokens.tokenizer import open_tokenizer, train_tokenizer
from f2llm_ray.engine.settings import Compute
from f2llm_ray.model.brought import brought_by
from f2llm_ray.model.checkpoint import ModelInfo, load_backbone, matryoshka_dims, save_model
from f2llm_ray.model.families import Pooling
from f2llm_ray.model.sizes import Shape, random_backbone
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.settings import EngineSettings, TrainStage
from f2llm_ray.train.training import Training

SHAPE = Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768, max_positions=512)
VOCABULARY = 4000
MEDIAN_TOKENS, SIGMA = 40, 0.9
LENGTHS = (8, 512)
"""Tokens of the shortest and of the longest text."""
SHARDS = 4
STAGE = "bench"


@dataclass(frozen=True)
class Place:
    """What a process needs to know."""

    root: Path
    stage: TrainStage
    clock: str
    text_of: dict[bytes, str]
    batches: Path
    pooling: Pooling = "last"

    @property
    def model(self) -> Path:
        """The model folder that all start from."""
        return self.root / "model"

    @property
    def store(self) -> Path:
        """The token store."""
        return self.root / "prepared" / "tokens"

    @property
    def table(self) -> BatchTable:
        """The batches."""
        return BatchTable(self.batches / "train", ("pairs",))


def training_of(rows: int, negatives: int, workers: int = 1, *, smallest_dim: int = 8) -> Training:
    """A training on one retrieval source."""
    return Training(
        stage=STAGE,
        model_name=STAGE,
        run_name=STAGE,
        settings=TrainStage(
            global_batch=rows,
            negatives={"retrieval": negatives},
            matryoshka_min_dim=smallest_dim,
            instructions=False,
            engine=EngineSettings(precision="fp32", tokens_per_pass=4096),
        ),
        sources={"pairs": SourceFacts("retrieval", "")},
        seed=0,
        # Half a core each, so that Ray Data finds room beside the trainers.
        compute=Compute(workers=workers, cpus_per_worker=0.5),
    )


def texts_of(number: int, generator: np.random.Generator, lengths: tuple[int, int]) -> list[str]:
    """Made-up texts, a token or so per word; their lengths are lognormal ones, those within these bounds."""
    words = np.array(["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 4)) for _ in range(1500)])
    shortest, longest = lengths
    drawn = generator.lognormal(np.log(MEDIAN_TOKENS), SIGMA, 20 * number)
    words_n = drawn[(drawn >= shortest) & (drawn <= longest - 2)].astype(int)[:number]
    return [" ".join(generator.choice(words, count)) for count in words_n]


def write_prepared(prepared: Folder, tokens: list[np.ndarray], negatives: int, held_out: int) -> None:
    """Writes the tokens as the prepare stage would; query, passage and negatives of a row follow each other.

    The first `held_out` rows are for validation.
    """
    keys = random_keys(np.random.default_rng(1), len(tokens))
    order = np.arange(len(tokens)).reshape(-1, 2 + negatives)
    query, passage = (keys.take(pa.array(order[:, column])) for column in (0, 1))
    columns = {
        "query_key": query,
        "passage_key": passage,
        "negative_keys": list_array(keys.take(pa.array(order[:, 2:].ravel())), np.full(len(order), negatives)),
        "query_group": query,
        "passage_group": passage,
        "language": pa.array(["eng"] * len(order)),
        "validation": pa.array(np.arange(len(order)) < held_out),
    }
    table = pa.table(columns)
    write_prompts(prepared, TextPrompts())
    (prepared / "table").write_table("pairs.parquet", [table], table.schema)
    with (prepared / "tokens").writing() as folder:
        entries = store_files.write_piece(folder / "000000.bin", iter([tokens]))
        entries = entries.append_column("key", keys).append_column(
            "piece", pa.array(np.zeros(len(keys), np.int64))
        )
        shard = shard_of(key_numbers(keys), SHARDS)
        for number in range(SHARDS):
            store_files.write_index(folder, number, entries.filter(pa.array(shard == number)))
        total = sum(len(text) for text in tokens)
        store_files.write_meta(folder, shards=SHARDS, texts=len(keys), tokens=total)


def prepare(
    root: Path,
    batches: int,
    rows: int,
    negatives: int,
    *,
    backbone: Path | None = None,
    lengths: tuple[int, int] = LENGTHS,
) -> dict[bytes, str]:
    """Writes model and prepared rows for so many batches and one held out; returns the text of each token list.

    The model is the tiny Qwen3, or the given backbone with its own tokenizer and pooling.
    """
    texts = texts_of((batches + 1) * rows * (2 + negatives), np.random.default_rng(0), lengths)
    tokenizer = train_tokenizer(texts[:2000], VOCABULARY) if backbone is None else open_tokenizer(str(backbone))
    vocabulary = tokenizer.get_vocab_size()
    model = random_backbone(SHAPE, vocabulary, 0) if backbone is None else load_backbone(backbone)
    tokens = [cut(ids, lengths[1]) for ids in store_files.tokenize(tokenizer, texts)]
    info = ModelInfo(
        name="bench",
        dims=matryoshka_dims(model.config.hidden_size),
        max_tokens=lengths[1],
        prompts={"query": ""},
        instructions=False,
        pooling="last" if backbone is None else brought_by(str(backbone)).pooling,
    )
    save_model(root / "model", model, tokenizer, info)
    write_prepared(Folder.at(str(root)) / "prepared", tokens, negatives, held_out=rows)
    return {ids.tobytes(): text for ids, text in zip(tokens, texts, strict=True)}


def tokens_of(batches: list[TrainBatch]) -> int:
    """Real tokens."""
    return sum(len(text) for batch in batches for text in batch.tokens)
