"""One training step beside its peers: same tiny Qwen3, texts, threads and objective; real tokens per second.

- `ours`: the encoder's passes of similar lengths, our losses and AdamW through our DeepSpeed engine, batches
  looked up in the token store by the training process itself.
- `ours_in_ray`: the same with batches from the loader's Ray Data actor beside it; `loader_stall` is the share of
  the time that was spent waiting for it, by the wall clock. Run last, after the turns.
- `official`: the loop of the paper's public code as it is described: all texts of a batch padded to the longest
  one and run at once with an attention mask (sdpa), no gradient to in-batch passages, torch's AdamW. Its gradient
  checkpointing is left out.
- `sentence_transformers`: its trainer with MultipleNegativesRankingLoss in a MatryoshkaLoss, the closest to the
  paper's objective. It tokenises as it goes and pads each column by itself.
- `bare`: passes, losses and backward of `ours` on batches that are in memory; no look-up, engine or optimizer.

Each has a process and one thread; all but `ours_in_ray` run in turns. Rates and ratios are medians over the
rounds. On a busy machine take `--clock cpu`, by which waiting for a core does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.loader import random_keys
from f2llm_ray.data import tokens as store_files
from f2llm_ray.data.batches import BatchTable
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.ragged import list_array
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.data.tokenizer import train_tokenizer
from f2llm_ray.model.checkpoint import ModelInfo, load_backbone, matryoshka_dims, save_model
from f2llm_ray.model.encoder import encode
from f2llm_ray.model.sizes import Shape, random_backbone
from f2llm_ray.recipe import Recipe
from f2llm_ray.recipe_file import parse
from f2llm_ray.run import Folder
from f2llm_ray.session import connect
from f2llm_ray.train.loader import Batch, build_batches, read, stream
from f2llm_ray.train.losses import Objective, Places, contrastive
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.zero import start_engine

SHAPE = Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768, max_positions=512)
VOCABULARY = 4000
MEDIAN_TOKENS, SIGMA, SHORTEST, LONGEST = 40, 0.9, 8, 512
SHARDS = 4
KINDS = ("ours", "official", "sentence_transformers", "bare")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[Batch], None]


@dataclass(frozen=True)
class Place:
    """What a process needs to know."""

    root: Path
    stage: TrainStage
    clock: str
    text_of: dict[bytes, str]

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
        return BatchTable(self.root / "batches" / "train", ("pairs",))


def recipe_of(rows: int, negatives: int) -> Recipe:
    """A recipe of one retrieval source, whose files are never read."""
    settings = {
        "name": "bench",
        "sources": {"pairs": {"format": "parquet", "paths": ["none.parquet"]}},
        "tokenizer": {"train_vocab": VOCABULARY},
        "backbone": {"shape": SHAPE.model_dump()},
        "stages": {
            "bench": {
                "global_batch": rows,
                "negatives": {"retrieval": negatives},
                "instructions": False,
                "engine": {"precision": "fp32", "tokens_per_pass": 4096},
            }
        },
    }
    return parse(Recipe, settings, "benchmark")


def texts_of(number: int, generator: np.random.Generator) -> list[str]:
    """Made-up texts with lognormal lengths, a token or so per word."""
    words = np.array(["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 4)) for _ in range(1500)])
    lengths = np.clip(generator.lognormal(np.log(MEDIAN_TOKENS), SIGMA, number), SHORTEST, LONGEST - 2)
    return [" ".join(generator.choice(words, int(length))) for length in lengths]


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


def loss_of(v_nd: torch.Tensor, batch: Batch, stage: TrainStage, *, gather_gradient: bool = True) -> torch.Tensor:
    """The paper's objective on the vectors of a batch."""
    arrays = (batch.query, batch.passage, batch.negative, batch.passage_id, batch.query_id)
    objective = Objective(
        dims=tuple(matryoshka_dims(SHAPE.hidden)),
        temperature=stage.temperature,
        in_batch=True,
        gather_gradient=gather_gradient,
    )
    return contrastive(v_nd, Places(*(torch.from_numpy(array.copy()) for array in arrays)), objective)[0]


class Encoder(torch.nn.Module):
    """The encoder as the engine sees it."""

    def __init__(self, backbone: Any, tokens_per_pass: int) -> None:
        super().__init__()
        self.backbone, self.tokens_per_pass = backbone, tokens_per_pass

    def forward(self, tokens: list[np.ndarray]) -> torch.Tensor:
        """The vectors of the texts."""
        return encode(self.backbone, tokens, tokens_per_pass=self.tokens_per_pass)


def our_step(place: Place) -> Step:
    """Our engine's step."""
    stage = place.stage
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place.root}/group-{os.getpid()}", rank=0, world_size=1
    )
    engine = start_engine(Encoder(load_backbone(place.model), stage.engine.tokens_per_pass), stage, 1)
    engine.train()

    def step(batch: Batch) -> None:
        engine.backward(loss_of(engine(batch.tokens).float(), batch, stage))
        engine.step()

    return step


def bare_step(place: Place) -> Step:
    """Forward and backward of the encoder alone."""
    stage = place.stage
    backbone = load_backbone(place.model).train()

    def step(batch: Batch) -> None:
        backbone.zero_grad()
        loss_of(
            encode(backbone, batch.tokens, tokens_per_pass=stage.engine.tokens_per_pass), batch, stage
        ).backward()

    return step


def official_step(place: Place) -> Step:
    """One padded forward pass of all texts."""
    stage = place.stage
    backbone = load_backbone(place.model).train()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=stage.lr, betas=stage.betas)

    def step(batch: Batch) -> None:
        lengths = torch.tensor([len(text) for text in batch.tokens])
        ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long)
        for row, text in zip(ids, batch.tokens, strict=True):
            row[: len(text)] = torch.from_numpy(text.astype(np.int64))
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        vectors = hidden[torch.arange(len(lengths)), lengths - 1]
        optimizer.zero_grad()
        loss_of(vectors, batch, stage, gather_gradient=False).backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), stage.clip)
        optimizer.step()

    return step


class Peer:
    """sentence-transformers' trainer on the same rows."""

    def __init__(self, place: Place) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

        self.model = SentenceTransformer(str(place.model), device="cpu")
        ranking = MultipleNegativesRankingLoss(self.model, scale=1 / place.stage.temperature)
        self.loss = MatryoshkaLoss(self.model, ranking, [*reversed(matryoshka_dims(SHAPE.hidden))])
        self.place = place

    def seconds(self, batches: list[Batch]) -> float:
        """Seconds that training on these batches takes, from its begin to its end."""
        from datasets import Dataset
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from transformers import TrainerCallback

        now = CLOCKS[self.place.clock]

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.started = now()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                self.seconds = now() - self.started

        clock = Clock()
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(self.place.root / "trainer"),
            per_device_train_batch_size=self.place.stage.global_batch,
            num_train_epochs=1,
            learning_rate=self.place.stage.lr,
            max_grad_norm=self.place.stage.clip,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = Dataset.from_list([row for batch in batches for row in self._rows(batch)])
        trainer = SentenceTransformerTrainer(self.model, arguments, rows, loss=self.loss, callbacks=[clock])
        trainer.train()
        return clock.seconds

    def _rows(self, batch: Batch) -> Iterator[dict[str, str]]:
        texts = [self.place.text_of[text.tobytes()] for text in batch.tokens]
        for query, passage, negatives in zip(batch.query, batch.passage, batch.negative, strict=True):
            columns = {f"negative_{number}": texts[place] for number, place in enumerate(negatives)}
            yield {"query": texts[query], "passage": texts[passage], **columns}


def work(kind: str, place: Place, pipe: Connection) -> None:
    """One peer's process: trains on the batches first..first+count when told to, and says how long it took."""
    torch.set_num_threads(1)
    known = list(read(place.table, place.store, rank=0, world=1))
    looked_up = read(place.table, place.store, rank=0, world=1)
    peer = Peer(place) if kind == "sentence_transformers" else None
    makers = {"ours": our_step, "official": official_step, "bare": bare_step}
    step = None if peer is not None else makers[kind](place)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        first, count = asked
        some = known[first : first + count]
        if peer is not None:
            pipe.send(peer.seconds(some))
        elif step is not None:
            pipe.send(seconds(step, islice(looked_up, count) if kind == "ours" else some, CLOCKS[place.clock]))
        assert torch.get_num_threads() == 1  # noqa: S101 - no library may have changed it meanwhile


def seconds(step: Step, batches: Iterator[Batch] | list[Batch], now: Callable[[], float]) -> float:
    """Seconds that the steps take, taking the batches included."""
    started = now()
    for batch in batches:
        step(batch)
    return now() - started


def streamed(place: Place, first: int, steps: int) -> tuple[float, float]:
    """Real tokens per second, and the share of the time spent waiting, on batches from the loader."""
    torch.set_num_threads(1)
    connect()
    batches = stream(place.table, place.store, first_step=first, rank=0, world=1, prefetch=4)
    step, now = our_step(place), CLOCKS[place.clock]
    step(next(batches))
    taken, waited, started, begun = 0, 0.0, now(), time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
        taken += tokens_of([batch])
    return taken / (now() - started), waited / (time.perf_counter() - begun)


def tokens_of(batches: list[Batch]) -> int:
    """Real tokens."""
    return sum(len(text) for batch in batches for text in batch.tokens)


def turns(place: Place, known: list[Batch], steps: int, rounds: int) -> dict[str, list[float]]:
    """Real tokens per second of each peer in each round, after a step that warms up."""
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for kind in KINDS:
        pipes[kind], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(kind, place, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that the end of a process that fails is seen here
        pipes[kind].recv()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(-1, rounds):
        first, count = (0, 1) if number < 0 else (1 + number * steps, steps)
        for kind, pipe in pipes.items():
            pipe.send((first, count))
            spent = pipe.recv()
            if number >= 0:
                found[kind].append(tokens_of(known[first : first + count]) / spent)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()
    return found


def main() -> None:
    """Runs all, and prints one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--negatives", type=int, default=3, help="hard negatives of a row")
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    rows, steps, rounds = arguments.rows, arguments.steps, arguments.rounds
    torch.set_num_threads(1)

    recipe = recipe_of(rows, arguments.negatives)
    stage = recipe.stages["bench"]
    wanted = 2 * rounds * steps + 3  # turns, the run in Ray, a step each to warm up, and held-out rows
    texts = texts_of(wanted * rows * (2 + arguments.negatives), np.random.default_rng(0))
    tokenizer = train_tokenizer(texts[:2000], VOCABULARY)
    tokens = [
        np.array(found.ids[: LONGEST - 1] + found.ids[-1:], np.uint32) for found in tokenizer.encode_batch(texts)
    ]
    text_of = {ids.tobytes(): text for ids, text in zip(tokens, texts, strict=True)}
    info = ModelInfo(
        name="bench", dims=matryoshka_dims(256), max_tokens=LONGEST, prompts={"query": ""}, instructions=False
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), stage, arguments.clock, text_of)
        save_model(place.model, random_backbone(SHAPE, tokenizer.get_vocab_size(), 0), tokenizer, info)
        prepared = Folder.at(folder) / "prepared"
        write_prepared(prepared, tokens, arguments.negatives, held_out=rows)
        connect()
        import ray

        build_batches(recipe, "bench", stage, prepared, None, Folder.at(folder) / "batches")
        ray.shutdown()
        known = list(read(place.table, place.store, rank=0, world=1))
        found = turns(place, known, steps, rounds)
        rate, stall = streamed(place, 1 + rounds * steps, rounds * steps)
        ray.shutdown()
        torch.distributed.destroy_process_group()
    rates = {name: statistics.median(each) for name, each in found.items()}
    rates["ours_in_ray"] = rate
    ratios = {
        name: statistics.median(mine / theirs for mine, theirs in zip(found["ours"], found[kind], strict=True))
        for name, kind in zip(("official", "st", "bare"), KINDS[1:], strict=True)
    }
    padded = sum(len(batch.tokens) * max(map(len, batch.tokens)) for batch in known)
    result = {
        **{name: round(rate) for name, rate in rates.items()},
        **{f"ratio_{name}": round(ratio, 3) for name, ratio in ratios.items()},
        "loader_stall": round(stall, 4),
        "padded_tokens_per_token": round(padded / tokens_of(known), 2),
        "tokens_per_step": round(tokens_of(known) / len(known)),
        "rows": rows,
        "negatives": arguments.negatives,
        "threads": 1,
        "clock": arguments.clock,
    }
    sys.stdout.write(f"{json.dumps(result)}\n")


if __name__ == "__main__":
    main()
