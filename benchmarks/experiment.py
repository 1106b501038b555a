"""What experiments on a corpus folder share: its retrieval sources, trainings up to a model, and scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from f2llm_ray.pipeline.walk import Pipeline

COLUMNS = ("query", "passage", "language", "passage_language")


def retrieval_sources(corpus: Path, cap: int) -> dict[str, dict[str, Any]]:
    """The recipe's sources, at most `cap` rows of each: the files of a folder whose `task_type` is retrieval."""
    columns = {name: name for name in COLUMNS}
    return {
        file.stem: {"format": "parquet", "paths": [str(file)], "columns": columns, "cap": cap}
        for file in sorted(corpus.glob("*.parquet"))
        if pq.ParquetFile(file).read_row_group(0, ["task_type"])["task_type"][0].as_py() == "retrieval"
    }


def train_until(pipeline: Pipeline, model: str) -> float:
    """Makes a trained model and what it is made from; returns the seconds of its steps."""
    end = pipeline.graph.model(model).stage
    for stage in pipeline.graph.making(end):
        pipeline.stage(stage)
    done = pipeline.run.folder(end).read_json("training.json")
    return float(done["tokens"] / done["tokens_per_second"])


def ndcg(entry: Mapping[str, Any], name: str) -> float:
    """nDCG@10 of a model or baseline of a report on a set, at the largest dim."""
    of_set = entry["scores"][name]
    return float(of_set[max(of_set, key=int)]["ndcg@10"])
