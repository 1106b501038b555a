"""Checks a model folder (loads, same vectors, complete card, no code) and pushes it to the Hugging Face hub."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path

from f2llm_ray.base import formatting
from f2llm_ray.base.progress import say


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="The token is that of HF_TOKEN or of `hf auth login`; it is never shown."
    )
    parser.add_argument("model", metavar="FOLDER", type=Path, help="a model folder with its card")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where it goes")
    parser.add_argument(
        "--licence", required=True, metavar="ID", help="the hub's identifier of the licence, such as apache-2.0"
    )
    parser.add_argument("--private", action="store_true", help="a new repository is made private")
    board = parser.add_argument_group("what mteb's leaderboard takes, beside it (extra: mteb)")
    board.add_argument(
        "--results",
        metavar="FOLDER",
        type=Path,
        help="results of `f2llm evaluate --mteb`; submission/ is written there",
    )
    board.add_argument(
        "--trained-on",
        nargs="*",
        metavar="TASK",
        help="mteb's tasks whose data were trained on; not known if unset",
    )
    board.add_argument("--code", metavar="URL", help="where the code of the training is public")
    board.add_argument("--data", metavar="URL", help="where the data of the training are public")
    parser.add_argument("--dry-run", action="store_true", help="only check, and list what would be sent")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Checks and sends."""
    from f2llm_ray.export import publish as work

    if arguments.results is not None:
        from f2llm_ray.export import leaderboard

        found = leaderboard.results_of(arguments.model, arguments.results)
        leaderboard.check_tasks(arguments.trained_on)
        say(f"{formatting.plural(len(found), 'result')} of this model in {arguments.results}")
    upload = None if arguments.dry_run else work.hub_upload(private=arguments.private)
    done = work.publish(arguments.model, arguments.repo, arguments.licence, upload)
    for name, size in done.files.items():
        say(f"{formatting.byte_size(size):>10}  {name}")
    where = done.address.url if done.address else f"checked; a dry run sends nothing to {arguments.repo}"
    total = f"{formatting.plural(len(done.files), 'file')}, {formatting.byte_size(sum(done.files.values()))}"
    say(f"{total}, licence {arguments.licence}: {where}")
    if arguments.results is not None and done.address is not None:
        place = leaderboard.write_submission(
            arguments.model,
            arguments.results,
            leaderboard.Submitted(
                repo=arguments.repo,
                revision=done.address.revision,
                licence=arguments.licence,
                released=datetime.now(timezone.utc).date().isoformat(),
                open_weights=not arguments.private,
                trained_on=arguments.trained_on,
                code=arguments.code,
                data=arguments.data,
            ),
        )
        say(f"{place}: model_meta.py for mteb's models, results/ for its repository of results")
