"""Embeds a column of parquet, jsonl or csv files into parquet shards of vectors."""

from __future__ import annotations

import argparse
from typing import Any

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.formatting import plural
from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import engine_option, job_parser, recipe_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = job_parser(
        f"{__doc__} The model is a folder, or the one that a run serves (--recipe and --root).", run_required=False
    )
    parser.add_argument("--model", metavar="FOLDER", help="an exported model folder")
    parser.add_argument(
        "--input", required=True, metavar="PATH", help="a .parquet, .jsonl or .csv file, or a folder"
    )
    parser.add_argument("--column", required=True, help="the column that holds the text")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the shards go")
    parser.add_argument("--id-column", help="the column that names a row (default: its number within its file)")
    parser.add_argument(
        "--keep-columns",
        default="",
        metavar="A,B",
        help="columns that are copied into the shards, e.g. the text itself",
    )
    parser.add_argument("--dimensions", type=int, help="one of the model's trained dims (default: the largest)")
    parser.add_argument("--prompt-name", help="the prompt before each text, e.g. query (default: document)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "int8", "binary", "ubinary"),
        help="how a vector is stored; int8 by the model's own ranges, binary as packed signs",
    )
    parser.add_argument(
        "--shard-rows", type=int, default=16_384, help="rows per shard: the unit of resuming and of sharing out"
    )
    parser.add_argument(
        "--batch-rows", type=int, default=1024, help="rows that are embedded and written at a time"
    )
    parser.add_argument(
        "--on-bad-row",
        default="error",
        choices=("error", "skip"),
        help="stop at a row without text, or leave it out and count it",
    )
    engine_option(parser, "serving.engine of the recipe, or auto")
    parser.add_argument("--workers", type=int, help="actors (default: one per GPU, else one per CPU core)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Embeds what is not embedded yet."""
    from f2llm_ray.serve import bulk
    from f2llm_ray.serve.shards import EmbedJob

    names = (
        *("input", "column", "output", "id_column", "dimensions"),
        *("dtype", "prompt_name", "shard_rows", "batch_rows", "on_bad_row"),
    )
    keep = tuple(name for name in arguments.keep_columns.split(",") if name)
    engine = arguments.engine or ("auto" if arguments.recipe is None else recipe_of(arguments).serving.engine)
    job = EmbedJob(
        model=_model(arguments), keep=keep, engine=engine, **{name: getattr(arguments, name) for name in names}
    )
    if arguments.dry_run:
        found = bulk.survey(job)
        say(f"{found.job.output}: {len(found.waiting)} of {len(found.units)} shards would be made")
        return
    done = bulk.run(job, workers=arguments.workers)
    say(told(done))


def told(done: dict[str, Any]) -> str:
    """What a run made, given the facts that `bulk.run` returns."""
    where, in_all = done["output_uri"], f"{plural(done['rows'], 'row')} in all{_counted(done)}"
    if done["shards_skipped"] == done["shards"]:
        were = "was" if done["shards"] == 1 else "were"
        return f"{where}: nothing to do: {plural(done['shards'], 'shard')} {were} there; {in_all}"
    return (
        f"{where}: {plural(done['embedded_now']['rows'], 'row')} embedded in {done['seconds']} s"
        f" ({done['startup_seconds']} s to start, then {done['rows_per_second']} rows/s,"
        f" {done['tokens_per_second']} tokens/s);"
        f" {done['shards_skipped']} of {plural(done['shards'], 'shard')} there before; {in_all};"
        f" by {', '.join(done['engines'])}"
    )


def _counted(done: dict[str, Any]) -> str:
    """What a person should know of the rows and shards, where there is something."""
    found = {
        "texts cut at the model's length": done["cut"],
        "rows without text left out": done["skipped"],
        "shards of files that changed or are gone removed": done["shards_removed"],
    }
    return "".join(f"; {count:,} {what}" for what, count in found.items() if count)


def _model(arguments: argparse.Namespace) -> str:
    if arguments.model is not None:
        return str(arguments.model)
    if arguments.recipe is None or arguments.root is None:
        raise RecipeError("give --model, or --recipe and --root")
    from f2llm_ray.pipeline.walk import Pipeline

    return Pipeline(recipe_of(arguments), arguments.root).served_model().uri
