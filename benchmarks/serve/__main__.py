"""Our endpoint over HTTP beside the bare engine, FastAPI with sentence-transformers, and infinity: same weights.

All run on this machine, take turns, and hold the same number of torch threads each; client and proxy use the same
cores, so `ratio_bare` has their share in it. `cpu_ms_per_text` has the CPU time by process, the figure to use on a
busy machine: `ratio_bare_cpu` is the bare engine's CPU time of a text over that of all processes of ours.

infinity needs other versions of its libraries: install `infinity-emb[torch,server]` in a virtual environment of
its own and name its interpreter with `--infinity`.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encode import texts_of
from benchmarks.serve.load import closed
from benchmarks.serve.servers import MODEL, Running, start

TEXTS = 1024


def texts_of_kind(kind: str) -> list[str]:
    """Queries of 3 to 12 words, or texts of natural lengths up to 200 words."""
    texts = texts_of(TEXTS, seed=1)
    if kind == "natural":
        return texts
    words = np.random.default_rng(2).integers(3, 13, TEXTS)
    return [" ".join(text.split()[:count]) for text, count in zip(texts, words, strict=True)]


SCENARIOS = {"short": ("short", 1), "natural": ("natural", 1), "natural_x32": ("natural", 32)}
"""Kind of texts and texts per request."""


def make_model(folder: Path) -> None:
    """A 4-layer, 256-wide Qwen3 of random weights and its tokenizer."""
    from f2llm_ray.data.tokens.tokenizer import train_tokenizer
    from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
    from f2llm_ray.model.sizes import Shape, random_backbone

    tokenizer = train_tokenizer(texts_of(TEXTS, seed=0), 4000)
    shape = Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768, max_positions=1024)
    info = ModelInfo(
        name=MODEL, dims=matryoshka_dims(256), max_tokens=1024, prompts={"query": ""}, instructions=False
    )
    save_model(folder, random_backbone(shape, tokenizer.get_vocab_size(), 0), tokenizer, info)


def older(folder: Path) -> Path:
    """A copy that transformers 4 loads: its tokenizers have another class name."""
    import shutil

    copy = folder.with_name(f"{folder.name}-4")
    shutil.copytree(folder, copy)
    config = copy / "tokenizer_config.json"
    facts = {**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(facts))
    return copy


class Bare:
    """The bare engine in its process."""

    def __init__(self, folder: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.serve.bare", str(folder), str(threads)]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def measure(self, texts: list[str], seconds: float) -> dict[str, float]:
        """Texts per second and CPU time of a text."""
        assert self._process.stdin is not None  # noqa: S101 (for the type)
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps([texts, seconds]) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()


def measure(server: Running, texts: list[str], width: int, clients: int, seconds: float) -> dict[str, Any]:
    """Measures one server under load from `clients` clients."""
    requests = server.requests(texts, width)
    closed(server.port, requests, clients, min(1.0, seconds / 4))
    before = server.cpu_seconds()
    load = closed(server.port, requests, clients, seconds)
    after = server.cpu_seconds()
    done = max(1, load.statuses[200]) * width
    cpu = {part: round((after[part] - before.get(part, 0.0)) / done * 1000, 3) for part in after}
    return {**load.summary(width), "cpu_ms_per_text": {**cpu, "client": round(load.cpu_seconds / done * 1000, 3)}}


def vectors(server: Running, texts: list[str]) -> np.ndarray[Any, Any]:
    """Unit vectors [n, d] that a server answers."""
    load = closed(server.port, server.requests(texts, len(texts)), 1, 0.01)
    rows = [row["embedding"] for row in json.loads(load.last)["data"]]
    raw = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows]
    found = np.array(raw, dtype=np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median rate, and the errors of all rounds."""
    chosen = sorted(rounds, key=lambda one: one["texts_per_s"])[len(rounds) // 2]
    return {**chosen, "errors": [one["errors"] for one in rounds if one["errors"]]}


def main() -> None:
    """Runs all in turns and prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,8,32,128")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads of each server and of the bare engine"
    )
    parser.add_argument("--replicas", type=int, default=1, help="replicas of our endpoint")
    parser.add_argument("--infinity", help="interpreter of a virtual environment with infinity-emb")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.clients.split(",")]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        root = Path(temporary)
        make_model(root / MODEL)
        notes, servers = [], {}
        for name in ("ours", "fastapi", "infinity"):
            if name == "infinity" and not arguments.infinity:
                notes.append("infinity left out: no --infinity")
                continue
            other = {"python": arguments.infinity} if name == "infinity" else {"replicas": arguments.replicas}
            folder = older(root / MODEL) if name == "infinity" else root / MODEL
            try:
                servers[name] = start(name, folder, root / f"{name}.log", threads=arguments.threads, **other)
            except RuntimeError as error:
                if name == "ours":
                    raise
                notes.append(str(error))
                continue
            stack.callback(servers[name].stop)
        fixed = start("fixed", root, root / "fixed.log", threads=1)
        stack.callback(fixed.stop)
        probe = texts_of_kind("natural")[:8]
        expected = vectors(servers["ours"], probe)
        worst = {name: float((vectors(s, probe) * expected).sum(1).min()) for name, s in servers.items()}
        ceiling = closed(fixed.port, fixed.requests(["a"], 1), 32, 2.0)
        bare = Bare(root / MODEL, arguments.threads)
        stack.callback(bare.stop)
        results = {}
        for scenario in arguments.scenarios.split(","):
            kind, width = SCENARIOS[scenario]
            texts = texts_of_kind(kind)
            for clients in counts:
                rounds: dict[str, list[Any]] = {name: [] for name in ("bare", *servers)}
                for _ in range(arguments.rounds):
                    rounds["bare"].append(bare.measure(texts, arguments.seconds))
                    for name, server in servers.items():
                        rounds[name].append(measure(server, texts, width, clients, arguments.seconds))
                results[f"{scenario}/{clients}"] = line = summed(rounds)
                print(f"{scenario}, {clients} clients: {json.dumps(line)}", file=sys.stderr)
    result = {
        "threads": arguments.threads,
        "replicas": arguments.replicas,
        "worst_cosine_to_ours": {name: round(value, 5) for name, value in worst.items()},
        "generator": {
            "requests_per_s_on_a_fixed_answer": round(ceiling.statuses[200] / ceiling.seconds),
            "cpu_ms_per_request": round(ceiling.cpu_seconds / ceiling.statuses[200] * 1000, 3),
        },
        "notes": notes,
        "results": results,
    }
    print(json.dumps(result))


def summed(rounds: dict[str, list[Any]]) -> dict[str, Any]:
    """The medians of one scenario, and of its ratios by round: what slows a round slows both sides of a ratio."""
    bare = rounds["bare"]
    line: dict[str, Any] = {
        "bare": {key: round(statistics.median(one[key] for one in bare), 3) for key in bare[0]},
        **{name: middle(found) for name, found in rounds.items() if name != "bare"},
    }
    for name in ("bare", "fastapi", "infinity"):
        if name in rounds:
            pairs = zip(rounds["ours"], rounds[name], strict=True)
            ratios = [ours["texts_per_s"] / max(other["texts_per_s"], 0.1) for ours, other in pairs]
            line[f"ratio_{name}"] = round(statistics.median(ratios), 3)
    pairs = zip(bare, rounds["ours"], strict=True)
    shares = [one["cpu_ms_per_text"] / sum(ours["cpu_ms_per_text"].values()) for one, ours in pairs]
    line["ratio_bare_cpu"] = round(statistics.median(shares), 3)
    return line


if __name__ == "__main__":
    main()
