"""The engine by itself, in batches of 32: no server around it can have a higher rate.

`python -m benchmarks.serve.bare FOLDER THREADS` reads lines of JSON `[texts, seconds]` and writes a line for each.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BATCH = 32


def main() -> None:
    """Measures once for each line of its input."""
    import torch

    from f2llm_ray.engine.engine import Engine

    torch.set_num_threads(int(sys.argv[2]))
    engine = Engine(Path(sys.argv[1]))
    for line in sys.stdin:
        texts, seconds = json.loads(line)
        engine.embed(texts[:BATCH])
        done = 0
        cpu, began = time.process_time(), time.perf_counter()
        while (wall := time.perf_counter() - began) < seconds:
            place = done % len(texts)
            done += len(engine.embed(texts[place : place + BATCH]))
        cpu = time.process_time() - cpu
        sys.stdout.write(json.dumps({"texts_per_s": done / wall, "cpu_ms_per_text": cpu / done * 1000}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
