"""Engines on CPU beside the runtimes by themselves and sentence-transformers: same weights, texts and threads.

Rows: each shape, one thread and two, single texts, short texts and texts of natural lengths. Our engines are
torch, auto, onnx and openvino. The peers take the files of `f2llm export` as sentence-transformers would (by
length, 32 texts at a time, padded to the longest), and sentence-transformers itself. All take turns in one
process; of its rounds the least time counts, of CPU time with one thread, of the clock with two. The last line is
JSON:

- `worst_ratio_peer`: auto's rate over that of the best peer in float32, in the worst row;
- `ratio_torch`: auto's rate over that of our torch engine for short texts of the first shape, one thread.

    python -m benchmarks.engines [--backbone FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.encode import texts_of

Embed = Callable[[Sequence[str]], Any]
BATCH = 32
"""Texts of a peer's batch: sentence-transformers' default."""
SHORT_TOKENS = 16


class Workload(NamedTuple):
    """Texts that are embedded in calls of so many."""

    name: str
    texts: list[str]
    per_call: int


def main() -> None:
    """Runs all and prints a table row by row, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, metavar="FOLDER", help="a model folder that is measured as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="f2llm-bench-") as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        models = made(Path(place))
        if arguments.backbone is not None:
            models[arguments.backbone.name] = arguments.backbone
        for name, folder in models.items():
            rows += measure(name, folder, Path(place) / f"{name}-export", arguments.threads, arguments.rounds)
    ratios = [(row["rates"]["auto"] / max(row["rates"][peer] for peer in row["peers"]), row) for row in rows]
    worst = min(ratios, key=lambda pair: pair[0])
    first = next(row for row in rows if row["workload"] == "short")
    result = {
        "worst_ratio_peer": round(worst[0], 3),
        "worst_row": f"{worst[1]['model']}, {worst[1]['threads']} threads, {worst[1]['workload']}",
        "ratio_torch": round(first["rates"]["auto"] / first["rates"]["torch"], 2),
        "worst_cosine": min(row["worst_cosine"] for row in rows),
        "rows": rows,
    }
    print(json.dumps(result))


def made(place: Path) -> dict[str, Path]:
    """Folders of random models: 4 layers, 256 wide; and the paper's 80M, whose vocabulary alone is smaller."""
    from f2llm_ray.data.tokens.tokenizer import train_tokenizer
    from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
    from f2llm_ray.model.sizes import Shape, random_backbone

    tokenizer = train_tokenizer(texts_of(500, seed=0), 4000)
    shapes = {
        "4x256": Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768),
        "80M": Shape(hidden=320, layers=8, heads=16, kv_heads=8, head_dim=128, ffn=2048),
    }
    for name, shape in shapes.items():
        prompts = {"query": "", "document": ""}
        dims = matryoshka_dims(shape.hidden)
        info = ModelInfo(name=name, dims=dims, max_tokens=512, prompts=prompts, instructions=False)
        save_model(place / name, random_backbone(shape, tokenizer.get_vocab_size(), 0), tokenizer, info)
    return {name: place / name for name in shapes}


def measure(name: str, folder: Path, export: Path, threads: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.export.export import export as write

    torch.set_num_threads(1)
    write(folder, export, ["onnx", "openvino"])
    torch_engine = Engine(folder)
    loads = loads_of(torch_engine.tokenizer, small=name == "4x256")
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        engines = {engine: Engine(folder, engine=engine) for engine in ("torch", "auto", "onnx", "openvino")}
        embeds: dict[str, Embed] = {engine: made.embed for engine, made in engines.items()}
        alone = peers(folder, export, count)
        for load in loads:
            rates = rates_of({**embeds, **alone}, load, rounds, cpu_time=count == 1)
            some = load.texts[:BATCH]
            expected_nd = torch_engine.embed(some)
            cosines = [float((engines[engine].embed(some) * expected_nd).sum(1).min()) for engine in engines]
            row = {
                "model": name,
                "threads": count,
                "workload": load.name,
                "texts": len(load.texts),
                "auto": engines["auto"].engine,
                "rates": rates,
                "peers": [peer for peer in alone if "int8" not in peer],
                "worst_cosine": round(min(cosines), 7),
                "bytes": sizes_of(folder, export),
            }
            unit = "ms a text" if load.per_call == 1 else "texts/s"
            shown = {
                key: f"{1e3 / rate:.2f}" if load.per_call == 1 else f"{rate:.1f}" for key, rate in rates.items()
            }
            said = ", ".join(f"{key} {value}" for key, value in shown.items())
            print(f"{name}, {count} threads, {load.name} ({unit}; auto is {row['auto']}): {said}", flush=True)
            rows.append(row)
    return rows


def loads_of(tokenizer: Any, *, small: bool) -> list[Workload]:
    """One text at a time, short texts, and texts of natural lengths; fewer for larger models."""
    texts = texts_of(1000, seed=1)
    lengths = [len(ids.ids) for ids in tokenizer.encode_batch(texts)]
    short = [text for text, length in zip(texts, lengths, strict=True) if length <= SHORT_TOKENS]
    most = 128 if small else 32
    return [
        Workload("one text", short[:12], 1),
        Workload("short", short[:most], most),
        Workload("natural", texts[:most], most),
    ]


def rates_of(embeds: dict[str, Embed], load: Workload, rounds: int, *, cpu_time: bool) -> dict[str, float]:
    """Texts a second of each, in turns."""
    clock = time.process_time if cpu_time else time.perf_counter
    least = dict.fromkeys(embeds, float("inf"))
    for _ in range(rounds + 1):  # the first makes what is made on first use
        for name, embed in embeds.items():
            started = clock()
            for first in range(0, len(load.texts), load.per_call):
                embed(load.texts[first : first + load.per_call])
            least[name] = min(least[name], clock() - started)
    return {name: round(len(load.texts) / seconds, 2) for name, seconds in least.items()}


def peers(folder: Path, export: Path, threads: int) -> dict[str, Embed]:
    """The runtimes by themselves, in float32 and int8, and sentence-transformers."""
    onnxruntime, openvino = import_module("onnxruntime"), import_module("openvino")
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    tokenizer.enable_truncation(512)
    tokenizer.enable_padding()

    def batched(run: Callable[[dict[str, Any]], Any]) -> Embed:
        def embed(texts: Sequence[str]) -> Any:
            order = np.argsort([-len(text) for text in texts], kind="stable")
            parts = []
            for first in range(0, len(texts), BATCH):
                batch = tokenizer.encode_batch([texts[place] for place in order[first : first + BATCH]])
                ids = np.array([text.ids for text in batch])
                mask = np.array([text.attention_mask for text in batch])
                parts.append(run({"input_ids": ids, "attention_mask": mask}))
            return np.concatenate(parts)[np.argsort(order)]

        return embed

    def by_onnx(path: Path) -> Embed:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return batched(lambda inputs: session.run(["sentence_embedding"], inputs)[0])

    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(export / "openvino/openvino_model.xml"), "CPU", hints)
    stock = SentenceTransformer(str(folder), device="cpu")
    return {
        "ONNX Runtime": by_onnx(export / "onnx/model.onnx"),
        "OpenVINO": batched(lambda inputs: np.array(compiled(inputs)["sentence_embedding"])),
        "sentence-transformers": lambda texts: stock.encode(list(texts), show_progress_bar=False),
        "ONNX Runtime int8": by_onnx(export / "onnx/model_quantized.onnx"),
    }


def sizes_of(folder: Path, export: Path) -> dict[str, int]:
    """Bytes of the weights as each has them."""
    return {
        "torch": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "onnx": (export / "onnx/model.onnx").stat().st_size,
        "openvino": (export / "openvino/openvino_model.bin").stat().st_size,
        "onnx int8": (export / "onnx/model_quantized.onnx").stat().st_size,
    }


if __name__ == "__main__":
    main()
