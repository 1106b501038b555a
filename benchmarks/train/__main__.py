"""Training, measured: `ours` beside its peers, or with `--workers 1,2` beside itself. One JSON object comes last.

Beside its peers, one training step: same tiny Qwen3, texts, threads and objective; real tokens per second.

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

With `--backbone FOLDER` the model is that one, without `official`, and the objective is the plain in-batch loss,
which is the same on both sides: `loss_gap` is how far the two losses are apart at the first step.

Each has a process and one thread; all but `ours_in_ray` run in turns. Rates and ratios are medians over the
rounds. On a busy machine take `--clock cpu`, by which waiting for a core does not count.

With `--workers`, whole stages through Ray Train, as the pipeline runs them, on the same global batches with each
number of workers; `efficiency` is the rate of a worker beside that of a worker in the first, smallest group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.train.peers import CLOCKS, Peer, loss_of
from benchmarks.train.scaling import scaling
from benchmarks.train.setup import LENGTHS, Place, prepare, tokens_of, training_of
from benchmarks.train.turns import streamed, turns
from f2llm_ray.base.session import connect
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.checkpoint import load_backbone, load_info
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.loader import TrainBatch, read
from f2llm_ray.train.training import write_batches


def worker_counts(text: str) -> list[int]:
    """Rising numbers of workers with commas between them."""
    parts = text.split(",")
    counts = sorted({int(part) for part in parts if part.isdecimal()})
    if len(counts) != len(parts) or counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected different whole numbers from 1 on, such as 1,2")
    return counts


def length_window(text: str) -> tuple[int, int]:
    """The fewest and the most tokens of a text, with a comma between them."""
    parts = text.split(",")
    if (
        len(parts) != 2
        or not all(part.isdecimal() for part in parts)
        or not 4 <= int(parts[0]) < int(parts[1]) - 2
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected the fewest tokens, 4 or more, and the most, such as 8,32"
        )
    return int(parts[0]), int(parts[1])


def beside_peers(
    rows: int,
    negatives: int,
    steps: int,
    rounds: int,
    clock: str,
    *,
    backbone: Path | None = None,
    lengths: tuple[int, int] = LENGTHS,
) -> dict[str, Any]:
    """Rates of all kinds, and the ratios of ours to the others'; `loss_gap` with a backbone alone."""
    import ray

    torch.set_num_threads(1)
    # The paper's objective is no loss of sentence-transformers; a plain one is the same in both.
    training = training_of(rows, negatives, smallest_dim=8 if backbone is None else 1 << 20)
    names = {"official": "official", "st": "sentence_transformers", "bare": "bare"}
    if backbone is not None:
        del names["official"]
    with tempfile.TemporaryDirectory() as folder:
        root = Folder.at(folder)
        # The turns and the run in Ray, with a step each to warm up.
        batches = 2 * rounds * steps + 2
        text_of = prepare(Path(folder), batches, rows, negatives, backbone=backbone, lengths=lengths)
        pooling = load_info(Path(folder) / "model").pooling
        place = Place(Path(folder), training.settings, clock, text_of, Path(folder) / "batches", pooling)
        connect()
        write_batches(training, prepared=root / "prepared", mined=None, out=root / "batches")
        ray.shutdown()
        known = list(read(place.table, place.store, rank=0, world=1))
        gap = {} if backbone is None else {"loss_gap": loss_gap(place, known[0])}
        found = turns(place, known, steps, rounds, ("ours", *names.values()))
        rate, stall = streamed(place, 1 + rounds * steps, rounds * steps)
        ray.shutdown()
        torch.distributed.destroy_process_group()
    rates = {name: statistics.median(each) for name, each in found.items()}
    rates["ours_in_ray"] = rate
    ratios = {
        name: statistics.median(own / other for own, other in zip(found["ours"], found[kind], strict=True))
        for name, kind in names.items()
    }
    padded = sum(len(batch.tokens) * max(map(len, batch.tokens)) for batch in known)
    return {
        **gap,
        **{name: round(rate) for name, rate in rates.items()},
        **{f"ratio_{name}": round(ratio, 3) for name, ratio in ratios.items()},
        "loader_stall": round(stall, 4),
        "padded_tokens_per_token": round(padded / tokens_of(known), 2),
        "tokens_per_step": round(tokens_of(known) / len(known)),
        "clock": clock,
    }


def loss_gap(place: Place, batch: TrainBatch) -> float:
    """How far our loss of a batch is from that of sentence-transformers, both at the weights all start from."""
    backbone = load_backbone(place.model)
    with torch.no_grad():
        v_nd = encode(backbone, batch.tokens, pooling=place.pooling, tokens_per_pass=4096)
        return abs(float(loss_of(v_nd, batch, place.stage)) - Peer(place).first_loss(batch))


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a global batch")
    parser.add_argument("--negatives", type=int, default=3, help="hard negatives of a row")
    parser.add_argument("--steps", type=int, help="steps of each in a round (default: 2, with --workers 20)")
    parser.add_argument("--rounds", type=int, help="default: 3, with --workers 1")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="not with --workers")
    parser.add_argument("--workers", type=worker_counts, metavar="1,2,..", help="measures scaling")
    parser.add_argument(
        "--backbone",
        type=Path,
        help="a sentence-transformers folder in place of the tiny Qwen3; in-batch loss",
    )
    parser.add_argument(
        "--lengths",
        type=length_window,
        default=LENGTHS,
        metavar="8,32",
        help="tokens of the texts, fewest and most",
    )
    arguments = parser.parse_args()
    rows, negatives = arguments.rows, 0 if arguments.backbone else arguments.negatives
    steps, rounds = arguments.steps, arguments.rounds
    if arguments.workers is None:
        result = beside_peers(
            rows,
            negatives,
            steps or 2,
            rounds or 3,
            arguments.clock,
            backbone=arguments.backbone,
            lengths=arguments.lengths,
        )
    else:
        result = scaling(arguments.workers, rows=rows, negatives=negatives, steps=steps or 20, rounds=rounds or 1)
    sys.stdout.write(f"{json.dumps({**result, 'rows': rows, 'negatives': negatives, 'threads': 1})}\n")


if __name__ == "__main__":
    main()
