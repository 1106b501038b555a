"""Commands in the documents exist as they are written: scripts, flags, recipes, targets, paths, links."""

from __future__ import annotations

import pkgutil
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from f2llm_ray.commands.main import ALIASES, COMMANDS
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.dry_run import check_columns
from f2llm_ray.recipe.files import builtin_recipes, load_recipe
from f2llm_ray.run.root import Run
from f2llm_ray.serve import routes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"^(?:\w+=\S+ )*(python (?:-m benchmarks|jobs/)|f2llm |make |serve run |curl )")
THEIRS = ("kubectl", "ray", "export", "pip", "helm", "docker", "sbatch", "hf", "serve")
"""Programs whose own flags are not ours to check; tests/cluster runs `ray` and `serve` for real."""
STAND_INS = ("ours.yaml", "my.yaml", "recipe.yaml", "NAME", "R", "...")
"""Recipes that the reader is to put in."""


def commands() -> Iterator[tuple[str, str]]:
    """Page and text of each command: the lines of shell blocks, and what stands in backquotes and is ours."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", outside)]
        yield from ((page.name, line.strip()) for line in lines if OURS.match(line.strip()))


def flags_of(script: Path) -> set[str]:
    """The flags that a benchmark knows."""
    files = [script, *(script.parent.glob("*.py") if "benchmarks/" in str(script) else ())]
    return {"--help"}.union(*(re.findall(r'"(--[a-z-]+)"', file.read_text(encoding="utf-8")) for file in files))


def check_command(page: str, words: list[str]) -> None:
    """A command of ours is there and has the flags; "NAME" and "COMMAND" stand for any."""
    name = ALIASES.get(words[0], words[0])
    if name in {"NAME", "COMMAND", "--help", "--version"}:
        return
    assert name in COMMANDS, page
    parsers = [import_module(f"f2llm_ray.commands.{name}").parser()]
    if name == "recipe":
        (actions,) = (action.choices for action in parsers[0]._actions if action.choices)  # noqa: SLF001
        parsers = [actions[words[1]]] if len(words) > 1 else []
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}  # noqa: SLF001
    used = {word for word in words if word.startswith("--")}
    assert used <= known, f"{page}: {sorted(used - known)}"


def script_of(words: list[str]) -> Path:
    if words[1] != "-m":
        return ROOT / words[1]
    module = ROOT / words[2].replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_command_exists_as_it_is_written(page: str, command: str) -> None:
    words = [word.strip("[]") for word in shlex.split(command, comments=True)]
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    if words[0] == "python":
        script = script_of(words)
        assert script.is_file(), page
        used = {word for word in words if word.startswith("--")}
        assert used <= flags_of(script), f"{page}: {sorted(used - flags_of(script))}"
    elif words[0] == "f2llm":
        check_command(page, words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
            f"{page}: make {words[1]}"
        )
    elif words[0] == "curl":
        (path,) = (re.sub(r"^https?://[^/]+", "", word) for word in words if word.startswith("http"))
        known = [*routes.ROUTES, *re.findall(r'"(/[^"]*)"', Path(routes.__file__).read_text())]
        assert path in known, f"{page}: {path}"
    recipes = [word.split("=")[1] for word in words if word.startswith("RECIPE=")]
    recipes += [after for word, after in pairwise(words) if word == "--recipe"]
    for recipe in recipes:
        known = recipe in {*builtin_recipes(), *STAND_INS} or (ROOT / recipe).is_file()
        assert known, f"{page}: no recipe {recipe}"


def test_every_program_of_a_shell_block_is_known() -> None:
    for page in PAGES:
        for block in re.findall(
            r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    assert OURS.match(line) or line.split()[0] in THEIRS, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        generated = page.parent.name == "docs" and target in (
            "recipe.md",
            "recipes.md",
            "security.md",
            "changes.md",
        )
        if not target.startswith("http") and not generated:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for path in re.findall(r"`((?:f2llm_ray|jobs|serve_configs|cluster|benchmarks|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_model_folders_of_a_run_are_where_a_run_puts_them(page: Path) -> None:
    for path in re.findall(r"runs/\w+(?:/[^\s/\"`]+)*/model\b", page.read_text(encoding="utf-8")):
        assert re.fullmatch(r"runs/\w+/\w+-(<hash>|[0-9a-f]{8})/model", path), f"{page.name}: {path}"


@pytest.mark.parametrize("page", ["own-data.md", "evaluation.md"])
def test_the_csv_example_of_a_set_is_one(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (found,) = [yaml.safe_load(block) for block in blocks if "paths: [heldout.csv]" in block]
    Path("pairs.jsonl").write_text('{"query": "a", "passage": "b"}\n', encoding="utf-8")
    Path("heldout.csv").write_text('title,body,lang\nWhat is it?,"It is this, or that.",en\n', encoding="utf-8")
    recipe = load_recipe({"extends": "starter", "name": "mine", **found})
    graph = declare(recipe, Run("root"))
    assert check_columns(graph, Run("root"), graph.stages()) == []
    (source,) = (entry.source for entry in recipe.evaluation.sets.values())
    (piece,) = source.pieces("heldout")
    (table,) = source.read("heldout", piece, "error")
    assert table.select(["query", "passage", "language"]).to_pylist() == [
        {"query": "What is it?", "passage": "It is this, or that.", "language": "eng"}
    ]


def test_every_name_of_the_reference_is_there() -> None:
    names = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    for name in names:
        assert pkgutil.resolve_name(name), name
