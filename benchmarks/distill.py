"""Distillation from cached and from online teacher vectors: the same student, batches and losses, two epochs.

- `online_s`: every step runs the teacher on its texts, then the student forward and backward, and AdamW.
- `cached_s`: the teacher runs once on each distinct text of both epochs and writes float16 vectors; every step
  looks them up. Collecting the keys, loading the teacher, its runs, the writing and the look-ups all count.

The corpus is made up: one retrieval source of random tokens with lognormal lengths (median 40). Each row has a
query, a passage, and 7 negatives per epoch drawn from 24 that are passages of other rows, as mining gives them. So
a passage stands in several rows of an epoch (`texts_per_distinct`), and the cache gains more than an epoch;
`--negatives 0` shows a corpus where it does not. The teacher has four times the student's parameters outside the
embeddings, and nearly so the FLOPs: `--teacher deeper` by four times the layers, `wider` by twice the width.
`teacher_time_ratio` says what that is in time: a wider model works at more FLOP/s, so it costs less than that.

One process and thread; batches are looked up in the token store by the process itself and trained on by the engine
of DeepSpeed, without Ray around them. The two ways take turns. On a busy machine take `--clock cpu`, by which
waiting for a core does not count. One JSON object comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from f2llm_ray.data.batches.table import BatchTable, mix, write_source
from f2llm_ray.data.keyed import META
from f2llm_ray.data.ragged import list_array
from f2llm_ray.data.schema import KEY, SourceFacts, key_numbers, text_key
from f2llm_ray.data.tokens import store as token_files
from f2llm_ray.data.tokens.tokenizer import train_tokenizer
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.vector_files import VectorWriter
from f2llm_ray.model.checkpoint import ModelInfo, load_backbone, matryoshka_dims, save_model
from f2llm_ray.model.sizes import Shape, non_embedding_parameters, random_backbone
from f2llm_ray.plan.cost import forward_flops_per_token
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import teacher_store
from f2llm_ray.train.deepspeed import start_engine
from f2llm_ray.train.gradcache import cached_backward, engine_backward
from f2llm_ray.train.loader import TrainBatch, read
from f2llm_ray.train.objective import StageLoss, Student, chunks_of, encoder_of
from f2llm_ray.train.settings import Distill, EngineSettings
from f2llm_ray.train.teacher import TeacherVectors, teacher_of

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
EPOCHS = 2
BATCH = 16
MINED = 24
LAYERS = 4
VOCABULARY = 2000
MEDIAN_TOKENS, SIGMA, SHORTEST, LONGEST = 40, 0.7, 8, 256
SOURCE = "pairs"


@dataclass(frozen=True)
class Place:
    """Folders of the benchmark."""

    root: Path

    @property
    def tokens(self) -> Path:
        """The token store."""
        return self.root / "tokens"

    @property
    def table(self) -> BatchTable:
        """The batches of both epochs."""
        return BatchTable(self.root / "batches", (SOURCE,))

    def model(self, name: str) -> Folder:
        """A model folder."""
        return Folder.at(str(self.root / name))

    def batches(self, taught: Path | None) -> Iterable[TrainBatch]:
        """The batches in step order, looked up as they are asked for."""
        return read(self.table, self.tokens, rank=0, world=1, taught=taught)


def shape(hidden: int, layers: int = LAYERS) -> Shape:
    """A Qwen3 of this width and depth."""
    heads = hidden // 32
    return Shape(hidden=hidden, layers=layers, heads=heads, kv_heads=heads // 2, head_dim=32, ffn=3 * hidden)


def teacher_shape(hidden: int, teacher: str) -> Shape:
    """The teacher of a student of this width."""
    return shape(hidden, 4 * LAYERS) if teacher == "deeper" else shape(2 * hidden)


def settings_of(negatives: int) -> Distill:
    """The settings of the student's training."""
    return Distill(
        teacher="untrained",
        global_batch=BATCH,
        epochs=EPOCHS,
        negatives={"retrieval": negatives},
        engine=EngineSettings(precision="fp32", tokens_per_pass=4096, zero_stage=0),
    )


def prepare(place: Place, settings: Distill, rows: int, small: Shape, large: Shape) -> None:
    """Writes the token store, the batches of both epochs, and both models."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(MEDIAN_TOKENS), SIGMA, 2 * rows), SHORTEST, LONGEST).astype(int)
    texts = [generator.integers(0, VOCABULARY, length).astype(np.uint32) for length in lengths]
    keys = pa.array([text_key(str(number)) for number in range(2 * rows)], KEY)
    place.tokens.mkdir()
    entries = token_files.write_piece(place.tokens / "000000.bin", [texts])
    entries = entries.append_column("key", keys).append_column("piece", pa.array(np.zeros(2 * rows, np.int64)))
    token_files.write_index(place.tokens, 0, entries)
    token_files.write_meta(place.tokens, shards=1, texts=2 * rows, tokens=int(lengths.sum()))
    query, passage = keys.slice(0, rows), keys.slice(rows)
    others = (np.arange(rows)[:, None] + 1 + generator.integers(0, rows - 1, (rows, MINED))) % rows
    table = pa.table(
        {
            "query": query,
            "passage": passage,
            "negatives": list_array(passage.take(pa.array(others.ravel())), np.full(rows, MINED)),
            "query_group": query,
            "passage_group": passage,
        }
    )
    counts = []
    for epoch in range(EPOCHS):
        folder = place.root / "batches" / f"epoch-{epoch:03d}"
        folder.mkdir(parents=True)
        found = write_source(
            folder / f"{SOURCE}.arrow",
            table,
            generator.permutation(rows),
            source=SOURCE,
            task="retrieval",
            negatives=settings.negatives["retrieval"],
            size=BATCH,
            seed=str(epoch),
        )
        counts.append([found])
    np.save(place.root / "batches" / "order.npy", mix(counts, seed="bench"))
    tokenizer = train_tokenizer(["a few lines", "of text"], 300)
    for name, size in (("student", small), ("teacher", large)):
        dims = matryoshka_dims(size.hidden)
        info = ModelInfo(name=name, dims=dims, max_tokens=LONGEST, prompts={"query": ""}, instructions=False)
        save_model(place.root / name, random_backbone(size, VOCABULARY, 0), tokenizer, info)


def teach(place: Place, hidden: int, out: Path) -> int:
    """Writes the teacher's vectors of all texts in the batches, and gives how many there are."""
    table, folder = place.table, Folder.at(str(out))
    columns = [
        key_numbers(column)
        for batch in map(table.batch, table.order())
        for column in (batch["query"], batch["passage"], batch["negatives"].flatten())
    ]
    keys = np.ascontiguousarray(np.unique(np.concatenate(columns), axis=0).T)
    counts = {0: teacher_store.write_keys(folder, 0, 1, [keys])}
    encoder = VectorWriter(place.model("teacher"), Folder.at(str(place.tokens)), 1, unit=False, dim=hidden)
    for shard, piece, _ in teacher_store.pieces(counts):
        keys_n2 = teacher_store.read_keys(folder, shard, piece)
        encoder.write(keys_n2, folder, teacher_store.piece_file(shard, piece))
    folder.write_json(META, {"shards": 1, "texts": counts[0], "dims": hidden})
    return counts[0]


class Run:
    """A student at its beginning, and what it learns from."""

    def __init__(self, place: Place, settings: Distill, hidden: int, teacher: TeacherVectors | None) -> None:
        self.settings = settings
        self.loss = StageLoss(settings, {SOURCE: SourceFacts("retrieval", "")}, hidden, teacher)
        student = Student(load_backbone(place.root / "student"), "last", settings.engine.tokens_per_pass)
        self.engine = start_engine(student, settings, 1)
        self.engine.train()

    def train(self, batches: Iterable[TrainBatch]) -> float:
        """Trains on them and gives the last loss."""
        for batch in batches:
            last, _ = cached_backward(
                encoder_of(self.engine, batch),
                chunks_of(self.engine, self.settings, batch),
                partial(self.loss, batch=batch),
                engine_backward(self.engine),
            )
            self.engine.step()
        return float(last)


def online(place: Place, settings: Distill, hidden: int, now: Callable[[], float]) -> dict[str, float]:
    """Seconds and last loss with the teacher beside the student; loading models does not count."""
    teacher = teacher_of(model=place.model("teacher"), vectors=None, tokens_per_pass=4096)
    run = Run(place, settings, hidden, teacher)
    started = now()
    last = run.train(place.batches(None))
    return {"seconds": now() - started, "loss": last}


def cached(place: Place, settings: Distill, hidden: int, now: Callable[[], float]) -> dict[str, float]:
    """The same with vectors computed before, which counts, loading the teacher for it included."""
    out = Path(tempfile.mkdtemp(dir=place.root))
    started = now()
    texts = teach(place, hidden, out)
    taught = now() - started
    teacher = teacher_of(model=None, vectors=out, tokens_per_pass=4096)
    run = Run(place, settings, hidden, teacher)
    started = now()
    last = run.train(place.batches(out))
    return {"seconds": taught + now() - started, "teach": taught, "loss": last, "texts": texts}


def student_vectors(run: Run, batch: TrainBatch) -> torch.Tensor:
    """The student's vectors of a batch, without a graph."""
    with torch.no_grad():
        return encode(
            run.engine.module.backbone,
            batch.tokens,
            pooling="last",
            tokens_per_pass=run.settings.engine.tokens_per_pass,
        )


def forward_seconds(
    vectors: Callable[[TrainBatch], torch.Tensor], batches: list[TrainBatch], now: Callable[[], float]
) -> float:
    """Seconds of a model's forward passes on some batches."""
    started = now()
    for batch in batches:
        vectors(batch)
    return now() - started


def measure(rows: int, hidden: int, teacher: str, negatives: int, rounds: int, clock: str) -> dict[str, Any]:
    """Medians over the rounds."""
    now, small, large = CLOCKS[clock], shape(hidden), teacher_shape(hidden, teacher)
    settings = settings_of(negatives)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        prepare(place, settings, rows, small, large)
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        some = list(place.batches(None))
        warm = teacher_of(model=place.model("teacher"), vectors=None, tokens_per_pass=4096)
        assert warm is not None  # noqa: S101 - a model was given
        run = Run(place, settings, hidden, warm)
        run.train(some[:1])
        time_ratio = forward_seconds(warm, some[:8], now) / forward_seconds(
            partial(student_vectors, run), some[:8], now
        )
        one, other = [], []
        for _ in range(rounds):
            one.append(online(place, settings, hidden, now))
            other.append(cached(place, settings, hidden, now))
        torch.distributed.destroy_process_group()
    seen = [len(text) for batch in some for text in batch.tokens]
    mean = sum(seen) / len(seen)
    online_s, cached_s = (statistics.median(run["seconds"] for run in runs) for runs in (one, other))
    return {
        "cached_s": round(cached_s, 2),
        "online_s": round(online_s, 2),
        "ratio": round(statistics.median(a["seconds"] / b["seconds"] for a, b in zip(one, other, strict=True)), 3),
        "teach_s": round(statistics.median(run["teach"] for run in other), 2),
        "loss_cached": round(other[0]["loss"], 5),
        "loss_online": round(one[0]["loss"], 5),
        "epochs": EPOCHS,
        "steps": len(some),
        "texts_per_distinct": round(len(seen) / EPOCHS / other[0]["texts"], 2),
        "tokens_per_epoch": round(sum(seen) / EPOCHS),
        "teacher_parameters_ratio": round(non_embedding_parameters(large) / non_embedding_parameters(small), 2),
        "teacher_flops_ratio": round(
            forward_flops_per_token(large, mean) / forward_flops_per_token(small, mean), 2
        ),
        "teacher_time_ratio": round(time_ratio, 2),
        "teacher": teacher,
        "negatives": negatives,
        "student_hidden": hidden,
        "threads": 1,
        "clock": clock,
    }


def main() -> None:
    """Runs both ways, and prints one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="rows of the corpus")
    parser.add_argument("--hidden", type=int, default=128, help="width of the student")
    parser.add_argument("--teacher", choices=["deeper", "wider"], default="deeper")
    parser.add_argument("--negatives", type=int, default=7, help="hard negatives of a row in an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(f"{json.dumps(measure(**vars(arguments)))}\n")


if __name__ == "__main__":
    main()
