"""Lists, shows and explains recipes, and writes one for your own files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.progress import say


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="f2llm recipe", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the built-in recipes, a line each")
    show = actions.add_parser("show", help="the settings of a recipe with all that it extends, as YAML")
    show.add_argument("recipe", metavar="NAME_OR_PATH")
    show.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="changes one setting")
    explain = actions.add_parser("explain", help="what a key means: type, default, bounds")
    explain.add_argument(
        "key",
        nargs="?",
        default="",
        help="such as data.max_tokens, stages.NAME.lr, train or csv (default: all sections)",
    )
    explain.add_argument("--recipe", metavar="NAME_OR_PATH", help="a recipe whose values are shown too")
    new = actions.add_parser(
        "new",
        help="write a recipe for your own pairs",
        description="Looks at tables (csv, tsv, jsonl, parquet; .gz, .bz2, .zst, .xz), guesses which columns hold "
        "what, says why, and writes a recipe that trains on them.",
    )
    new.add_argument("files", nargs="+", metavar="FILE", help="a file, folder or glob")
    new.add_argument("--output", default="recipe.yaml", metavar="FILE", help="default: recipe.yaml")
    new.add_argument("--name", help="of the recipe (default: the first file's)")
    for side in ("query", "passage", "negatives"):
        new.add_argument(f"--{side}", metavar="COLUMN", help=f"the column of the {side} (default: guessed)")
    new.add_argument(
        "--language", metavar="COLUMN_OR_CODE", help="of the queries: a column, or a code such as deu"
    )
    new.add_argument(
        "--backbone",
        metavar="FOLDER_OR_HUB_NAME",
        help="a checkpoint to start from (default: a small random model that trains in minutes)",
    )
    new.add_argument(
        "--heldout",
        metavar="FILE",
        help="pairs that are never trained on, and that models are measured on (default: some of the files' own)",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Does what is asked.

    Raises:
        RecipeError: no such recipe or key, or the output is there already.
        DataError: a file that cannot be read, or whose columns are unclear.
    """
    {"list": _list, "show": _show, "explain": _explain, "new": _new}[arguments.action](arguments)


def _list(_: argparse.Namespace) -> None:
    from f2llm_ray.recipe.files import builtin_recipes, summary

    names = builtin_recipes()
    width = max(map(len, names)) + 2
    say("\n".join(f"{name:<{width}}{summary(name)}" for name in names))


def _show(arguments: argparse.Namespace) -> None:
    import yaml

    from f2llm_ray.recipe.files import load_recipe, resolved

    load_recipe(arguments.recipe, arguments.set)  # refuses what is no recipe
    # Through JSON, so that what a recipe says once and uses twice (`&engine`) stands in both places.
    settings = json.loads(json.dumps(resolved(arguments.recipe, arguments.set)))
    say(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False, width=110).rstrip())


def _explain(arguments: argparse.Namespace) -> None:
    from f2llm_ray.recipe.files import load_recipe
    from f2llm_ray.recipe.reference import explain

    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe)
    say("\n".join(explain(arguments.key, recipe)))


def _new(arguments: argparse.Namespace) -> None:
    from f2llm_ray.pipeline.new_recipe import new_recipe

    output = Path(arguments.output)
    if output.exists():
        raise RecipeError(f"{output}: is there already; remove it, or give another --output")
    given = {name: getattr(arguments, name) for name in ("query", "passage", "negatives", "language")}
    made = new_recipe(
        arguments.files, given, name=arguments.name, backbone=arguments.backbone, heldout=arguments.heldout
    )
    output.write_text(made.text, encoding="utf-8")
    say("\n".join(made.told))
    say(f"wrote {output}; next: f2llm run --recipe {output} --root runs/{made.name} --dry-run")
