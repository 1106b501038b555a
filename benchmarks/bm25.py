"""What BM25 costs: seconds of one core and memory of its index, and milliseconds per query, on made-up text.

Words are drawn by Zipf's law from a vocabulary of 200,000. The last line is one JSON object: `seconds` and
`megabytes` of the index, the same by a million characters, and `query_ms`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import sys
import time

from f2llm_ray.evaluate.bm25 import top_passages

VOCABULARY, PASSAGE_WORDS, QUERY_WORDS = 200_000, 100, 8


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=2_000)
    given = parser.parse_args()
    generator = random.Random(0)  # noqa: S311 - made-up text
    shares = list(itertools.accumulate(1 / (rank + 1) for rank in range(VOCABULARY)))
    names = [f"word{number}" for number in range(VOCABULARY)]

    def text(length: int) -> str:
        return " ".join(generator.choices(names, cum_weights=shares, k=length))

    passages = [text(PASSAGE_WORDS) for _ in range(given.passages)]
    queries = [text(QUERY_WORDS) for _ in range(given.queries)]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    top_passages([], passages, k=10)
    seconds = time.process_time() - started
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    started = time.process_time()
    top_passages(queries, passages, k=10)
    query_ms = 1000 * (time.process_time() - started - seconds) / given.queries
    million = sum(map(len, passages)) / 1e6
    found = {
        "passages": given.passages,
        "seconds": round(seconds, 1),
        "megabytes": round(megabytes),
        "seconds_per_million_characters": round(seconds / million, 2),
        "megabytes_per_million_characters": round(megabytes / million, 1),
        "query_ms": round(query_ms, 2),
    }
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
