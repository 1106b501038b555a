"""Makes pairs of passages or documents: a language model behind an endpoint writes the queries."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.commands.command_line import recipe_of
from f2llm_ray.pairs.prompts import SAME, STYLES

if TYPE_CHECKING:
    from f2llm_ray.data.reading.base import SourceBase
    from f2llm_ray.data.settings import Data


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__} The passages are those of files (--input), or of a recipe's sources (--recipe).",
        epilog="Runs on the Ray cluster that RAY_ADDRESS names (auto: this machine's), or starts its own. All "
        "answers are kept in the output, and no prompt that has one is sent again.",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="PATH",
        help="a folder, file or glob of documents (Markdown, HTML, PDF, text), whose sections are passages; with "
        "--column of tables (may be given several times)",
    )
    parser.add_argument("--column", help="the column of --input that holds the passages")
    parser.add_argument("--language", metavar="CODE", help="of the passages of --input, such as deu")
    parser.add_argument("--recipe", metavar="NAME_OR_PATH", help="a recipe whose sources have the passages")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="changes one setting of the recipe"
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME",
        help="one of the recipe's sources (default: all; may be given several times)",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="URL#NAME",
        help="an OpenAI-compatible endpoint and its model (key in OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="gets pairs.parquet, answers, an account"
    )
    parser.add_argument(
        "--languages",
        default=SAME,
        metavar="A,B",
        help="languages of the queries, such as deu,eng; same: that of the passage (default: same)",
    )
    parser.add_argument(
        "--style",
        default="question",
        metavar="A,B",
        help=f"kinds of queries, of {', '.join(STYLES)} (default: question)",
    )
    parser.add_argument(
        "--per-passage",
        type=int,
        default=2,
        metavar="N",
        help="queries for each passage, language and style (default: 2)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many passages, drawn by content")
    parser.add_argument(
        "--requests", type=int, default=4, metavar="N", help="requests under way at once (default: 4)"
    )
    parser.add_argument(
        "--check",
        metavar="FOLDER",
        help="a model folder; a query is kept only if the model finds its passage among all that are asked about",
    )
    parser.add_argument(
        "--check-top", type=int, default=1, metavar="K", help="... among its K nearest passages (default: 1)"
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        help="stop at a malformed row, or leave it out and count it (default: the recipe's, or error)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="read the passages, say what would be sent, and stop"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Asks for what has no answer yet, and writes the pairs.

    Raises:
        RecipeError: flags that do not fit, or a recipe.
    """
    from f2llm_ray.pairs.make import PairJob, make_pairs

    for flag in ("per_passage", "limit", "requests", "check_top"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise RecipeError(f"--{flag.replace('_', '-')}: found {value}, expected 1 or more")
    styles = _listed(arguments.style)
    for style in styles:
        if style not in STYLES:
            raise RecipeError(f"--style: found {style!r}, expected some of {', '.join(STYLES)}")
    languages = tuple(dict.fromkeys(map(_language, _listed(arguments.languages))))
    if not styles or not languages:
        raise RecipeError("--style and --languages: expected one or more, with commas between")
    sources, settings = _sources(arguments)
    if arguments.on_bad_row is not None:
        settings = settings.model_copy(update={"on_bad_row": arguments.on_bad_row})
    names = ("model", "output", "per_passage", "limit", "requests", "check", "check_top")
    job = PairJob(
        sources=sources,
        settings=settings,
        languages=languages,
        styles=styles,
        **{name: getattr(arguments, name) for name in names},
    )
    make_pairs(job, dry_run=arguments.dry_run)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _language(said: str) -> str:
    """A language of queries, as rows carry it.

    Raises:
        RecipeError: it is none.
    """
    from f2llm_ray.data.language import CODE, UNKNOWN, normal

    code = said if said == SAME else normal(said)
    if code is None or code == UNKNOWN or code.startswith(CODE):
        raise RecipeError(f"--languages: found {said!r}, expected same, or ISO 639 codes such as deu,eng")
    return code


def _sources(arguments: argparse.Namespace) -> tuple[dict[str, SourceBase], Data]:
    from f2llm_ray.data.settings import Data

    if bool(arguments.input) == (arguments.recipe is not None):
        raise RecipeError("give either --input, or --recipe and its --source")
    if arguments.recipe is None:
        if arguments.source or arguments.set:
            raise RecipeError("--source and --set: those of a recipe; give --recipe, or leave them out")
        return {path: _of_files(path, arguments) for path in arguments.input}, Data()
    if arguments.column is not None or arguments.language is not None:
        raise RecipeError("--column and --language: for --input; a recipe's sources say their own")
    recipe = recipe_of(arguments)
    for name in arguments.source:
        if name not in recipe.sources:
            raise RecipeError(f"--source: found {name!r}, expected one of {', '.join(recipe.sources)}")
    return {name: recipe.sources[name] for name in arguments.source or recipe.sources}, recipe.data


def _of_files(path: str, arguments: argparse.Namespace) -> SourceBase:
    """The source that a path stands for: documents, or tables where a column is named."""
    from f2llm_ray.data.reading.documents import DocumentsSource
    from f2llm_ray.data.reading.files import TableSource
    from f2llm_ray.data.reading.paths import find_files, listed, plain_name
    from f2llm_ray.data.reading.tables import SUFFIXES, TableFile
    from f2llm_ray.recipe.files import parse
    from f2llm_ray.run.folder import Folder

    said: dict[str, Any] = {"paths": [path], "language": arguments.language}
    if arguments.column is None:
        source = parse(DocumentsSource, said, f"--input {path}")
        tables = [file.uri for file in source.inputs(path) if plain_name(file.uri).endswith(SUFFIXES)]
        if tables:
            raise RecipeError(f"--input {tables[0]}: a table; name the column of its passages, --column COLUMN")
        return source
    files = find_files(path, SUFFIXES, f"--input {path}").values()
    formats = sorted({TableFile.at(Folder.at(file.uri)).format for file in files})
    if len(formats) > 1:
        raise RecipeError(
            f"--input {path}: found files of {listed(tuple(formats))}; give an --input for each format"
        )
    columns = {"query": arguments.column, "passage": arguments.column}
    return parse(TableSource, {**said, "format": formats[0], "columns": columns}, f"--input {path}")
