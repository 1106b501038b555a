"""`f2llm` from the outside: its commands and their scripts in jobs/, recipes for a user's own files, a server."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm_ray.commands.main import COMMANDS, main
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.text_engine import Calibration, calibrate, save_calibration
from f2llm_ray.recipe.aliases import ALIASES, TOPICS
from f2llm_ray.recipe.files import builtin_recipes, load_recipe
from f2llm_ray.recipe.reference import explain, meaning, places
from f2llm_ray.run.folder import Folder
from tests.ports import free_port
from tests.tiny import LINES, tiny_model

ROOT = Path(__file__).parent.parent
JOBS = {path.stem: path for path in sorted((ROOT / "jobs").glob("*.py"))}
NAMES = {"pipeline": "run", "distill": "distil"}
"""Commands that have another name than their script."""


def f2llm(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)


# The commands.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f2llm(name, "--help") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: f2llm {name} ")
    parser = import_module(f"f2llm_ray.commands.{name}").parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]  # noqa: SLF001
    assert all(flag in told for flag in flags)


@pytest.mark.parametrize("script", JOBS)
def test_a_script_is_its_command(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = NAMES.get(script, script)
    f2llm(name, "--help")
    command = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(JOBS[script]), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOBS[script]), run_name="__main__")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {script}.py ")
    assert told.replace(f"{script}.py", f"f2llm {name}", 1).split() == command.split()


def test_the_list_has_every_command_and_what_is_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert f2llm("--help") == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told and summary in told for name, summary in COMMANDS.items())
    modules = {path.stem for path in (ROOT / "f2llm_ray" / "commands").glob("*.py")}
    assert modules - {"__init__", "main", "command_line"} == set(COMMANDS)
    assert f2llm() == 2
    assert capsys.readouterr().err == told
    assert f2llm("evalute") == 2
    assert capsys.readouterr().err == (
        "error: 'evalute' is no command; did you mean `f2llm evaluate`? `f2llm --help` lists them\n"
    )
    assert f2llm("distill", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: f2llm distil ")
    assert f2llm("--version") == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from importlib import import_module\n"
        "from f2llm_ray.commands.main import COMMANDS, main\n"
        "assert main(['--help']) == 0\n"
        "for name in COMMANDS: import_module(f'f2llm_ray.commands.{name}').parser().format_help()\n"
        "heavy = {'ray', 'torch', 'numpy', 'pandas', 'pyarrow', 'pydantic', 'transformers', 'yaml', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    run = subprocess.run([sys.executable, "-m", "f2llm_ray", "--help"], check=True, cwd=ROOT, capture_output=True)
    assert run.stdout.startswith(b"usage: f2llm COMMAND")


# Recipes.


def test_built_in_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert f2llm("recipe", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == builtin_recipes()
    assert all(len(line.split()) > 3 for line in lines)
    assert f2llm("recipe", "show", "f2llm-v2-80m", "--set", "seed=7") == 0
    shown = capsys.readouterr().out
    assert "extends" not in shown
    import yaml

    assert load_recipe(yaml.safe_load(shown)) == load_recipe("f2llm-v2-80m", ["seed=7"])
    assert "*id" not in shown, "each place says its own"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("data.max_tokens", ["Longest token list", "whole number", "default: 1024", "≥ 2"]),
        ("stages.anything.lr", ["stages.NAME.lr", "default: 8.0e-06", "> 0"]),
        ("train", ["stages.NAME (train)", "global_batch", "default: 512"]),
        ("distill.teacher", ["The model that teaches", "must be set"]),
        ("csv.delimiter", ["Of CSV", "unset"]),
        ("sources.x.weight", ["How often a row is seen", "≤ 100"]),
        ("evaluation.sets.mine", ["kind: sts", "A retrieval set on disk"]),
        ("", ["A recipe", "sources", "must be set"]),
        ("learning_rate", ["is called stages.NAME.lr here", "default: 8.0e-06, where the recipe sets no other"]),
        ("loss", ["loss is no key; see stages.NAME.in_batch_weight: the loss is contrastive"]),
        ("heldout", ["heldout is no key; see evaluation.sets:", "`data.validation`"]),
        ("stages.trained.warmup_ratio", ["stages.NAME.warmup_steps", "not as a share"]),
        (
            "evaluation.sets",
            ["evaluation.sets.NAME (kind: sts)", "folder*", "source*, passages, max_queries", "must be set"],
        ),
        (
            "evaluation.sets.held.source.columns.query",
            ["evaluation.sets.NAME.source.columns.query", "default: query"],
        ),
    ],
)
def test_keys_are_explained(key: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f2llm("recipe", "explain", key) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("max_tokens", "data.max_tokens"),
        ("data.maxtokens", "data.max_tokens"),
        ("trian", "train"),
        ("gpu", "compute.gpus_per_worker"),
    ],
)
def test_the_closest_keys_to_an_unknown_one_are_named(
    key: str, closest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f2llm("recipe", "explain", key) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {key}: no such key of a recipe; closest: ")
    assert closest in told


def test_a_word_that_is_like_no_key_has_no_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert f2llm("recipe", "explain", "zygote") == 1
    assert capsys.readouterr().err == (
        "error: zygote: no such key of a recipe; `f2llm recipe explain` lists all\n"
    )


def test_the_values_of_a_recipe_stand_beside_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("learning_rate", "stages.NAME.lr", "stages.trained.lr"):
        assert f2llm("recipe", "explain", key, "--recipe", "starter") == 0
        told = capsys.readouterr().out
        assert "\n  stages.trained.lr of starter: 0.002\n" in told
        assert "default: 8.0e-06" in told


def test_every_key_says_what_it_means() -> None:
    silent = {
        place.key(name)
        for place in places()
        for name, field in place.kind.model_fields.items()
        if not meaning(name, field)
    }
    assert not silent


def test_every_topic_leads_to_a_key() -> None:
    keys = {place.key(name) for place in places() for name in place.kind.model_fields}
    assert {topic.key for topic in TOPICS.values()} <= keys
    assert not TOPICS.keys() & ALIASES.keys()


def test_every_name_of_another_library_leads_to_a_key_of_ours() -> None:
    for name, alias in ALIASES.items():
        told = "\n".join(explain(name))
        assert f"is called {alias.key} here" in " ".join(told.split())
        assert alias.key in told.partition("\n\n")[2]


def test_every_key_can_be_explained() -> None:
    for place in places():
        assert explain(place.path)
        for name in place.kind.model_fields:
            assert explain(place.key(name))


ROWS = [
    {"id": f"r{n}", "question": f"what is number {n}?", "answer": f"the number {n} is one more than {n - 1}. " * 3}
    for n in range(40)
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """A table in the format that the name says."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    delimiter = "\t" if ".tsv" in path.name else ";"
    if path.suffix == ".json":
        lines = [json.dumps(rows)]
    elif ".jsonl" not in path.name:
        lines = [delimiter.join(map(str, cells)) for cells in (rows[0].keys(), *(row.values() for row in rows))]
    data = ("\n".join(lines) + "\n").encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def renamed(**names: str) -> list[dict[str, object]]:
    return [{new: row[old] for new, old in names.items()} for row in ROWS]


@pytest.mark.parametrize("name", ["faq.csv", "faq.tsv", "faq.jsonl", "faq.parquet", "faq.csv.gz", "faq.jsonl.gz"])
def test_a_recipe_for_a_table_is_ready_to_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, ROWS)
    assert f2llm("recipe", "new", name) == 0
    told = capsys.readouterr().out
    assert "query: 'question' (its name)" in told
    assert "passage: 'answer' (its name)" in told
    assert "not used: 'id'" in told
    recipe = load_recipe("recipe.yaml")
    assert list(recipe.sources) == ["faq"]
    assert f2llm("run", "--recipe", "recipe.yaml", "--root", "runs/mine", "--dry-run") == 0
    assert "trained: would run" in capsys.readouterr().out
    assert f2llm("recipe", "new", name) == 1
    assert "recipe.yaml: is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "flags", "columns"),
    [
        (renamed(Anchor="question", Positive="answer"), [], {"query": "Anchor", "passage": "Positive"}),
        (renamed(title="question", text="answer"), [], {"query": "title", "passage": "text"}),
        (renamed(b="answer", a="question", url="id"), [], {"query": "a", "passage": "b"}),
        (renamed(query="question", words="answer"), [], {"query": "query", "passage": "words"}),
        (renamed(a="question", b="answer"), ["--query", "b", "--passage", "a"], {"query": "b", "passage": "a"}),
        (
            [{**row, "negatives": ["x y", "z"], "lang": "de"} for row in ROWS],
            [],
            {"query": "question", "passage": "answer", "negatives": "negatives", "language": "lang"},
        ),
        (
            [{**row, "negative_1": "x y", "negative_2": "z"} for row in ROWS],
            ["--language", "deu"],
            {"query": "question", "passage": "answer", "negatives": "negative_*"},
        ),
        (
            renamed(title="question", body="answer", query="question"),
            ["--passage", "{title}: {body}"],
            {"query": "query", "passage": "{title}: {body}"},
        ),
    ],
)
def test_columns_are_guessed(
    rows: list[dict[str, object]], flags: list[str], columns: dict[str, str], tmp_path: Path
) -> None:
    table, output = write(tmp_path / "t.jsonl", rows), tmp_path / "r.yaml"
    assert f2llm("recipe", "new", table, "--output", output, *flags) == 0
    (source,) = load_recipe(str(output)).sources.values()
    found = source.columns.model_dump(exclude_unset=True)
    assert found == columns
    assert source.language == ("deu" if "--language" in flags else None)


@pytest.mark.parametrize(
    ("rows", "flags", "told"),
    [
        (renamed(a="question", b="question"), [], "two columns of texts alike in length"),
        (renamed(a="question", b="answer", c="answer"), [], "3 columns of text that may be query or passage"),
        (renamed(question="question", b="answer", c="answer"), [], "2 columns of text that may be passage"),
        (renamed(id="id"), [], "no column of text for query and passage"),
        (ROWS, ["--query", "q"], "--query: no column 'q'"),
    ],
)
def test_what_is_unclear_is_refused_with_the_columns_and_the_flag(
    rows: list[dict[str, object]],
    flags: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = write(tmp_path / "t.csv", rows)
    assert f2llm("recipe", "new", table, "--output", tmp_path / "r.yaml", *flags) == 1
    error = capsys.readouterr().err
    assert told in error
    assert str(list(rows[0])) in error
    assert "--query" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "r.yaml").exists()


def test_files_of_several_layouts_and_a_backbone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "one.jsonl", ROWS)
    write(folder / "two.jsonl", ROWS)
    other = write(tmp_path / "one.csv", renamed(title="question", text="answer"))
    model, output = tiny_model(tmp_path / "model"), tmp_path / "r.yaml"
    assert f2llm("recipe", "new", folder, other, "--output", output, "--backbone", model, "--name", "ours") == 0
    recipe = load_recipe(str(output))
    assert recipe.name == "ours"
    assert {name: len(source.paths) for name, source in recipe.sources.items()} == {"one": 2, "one-2": 1}
    assert (recipe.backbone.path, recipe.backbone.shape) == (str(model), None)
    assert recipe.tokenizer.train_vocab is None
    assert recipe.stages["trained"].max_steps is None
    assert f2llm("run", "--recipe", output, "--root", tmp_path / "root", "--dry-run") == 0


def test_a_file_without_names_is_read_by_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("".join(f"{row['answer']};{row['answer']}\n" for row in ROWS).replace(".", "", 1))
    assert f2llm("recipe", "new", table, "--output", tmp_path / "r.yaml") == 1
    assert "--query 0 --passage 1" in capsys.readouterr().err
    assert f2llm("recipe", "new", table, "--output", tmp_path / "r.yaml", "--query", 0, "--passage", 1) == 0
    assert f2llm("run", "--recipe", tmp_path / "r.yaml", "--root", tmp_path / "root", "--dry-run") == 0


def refused_dry_run(folder: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a dry run of the starter with these settings over it."""
    recipe = folder / "changed.yaml"
    recipe.write_text(json.dumps({"extends": "starter", "name": "mine", **settings}))
    assert f2llm("run", "--recipe", recipe, "--root", folder / "root", "--dry-run") == 1
    told = capsys.readouterr()
    assert "would run" not in told.out
    assert len(told.err.splitlines()) == 1
    return told.err


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet", "t.csv.gz"])
def test_a_dry_run_refuses_columns_that_are_not_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"query": "question", "passage": "answer"}
    write(tmp_path / name, ROWS)
    form = name.removesuffix(".gz").rpartition(".")[2]
    source = {"format": form, "paths": [str(tmp_path / name)], "columns": {**good, "query": "questoin"}}
    error = refused_dry_run(tmp_path, {"sources": {"pairs": source}}, capsys)
    assert f"{tmp_path / name}: no column 'questoin'; the columns are ['id', 'question', 'answer']" in error
    assert "did you mean 'question'?" in error
    held = {"evaluation": {"sets": {"held": {"source": {**source, "columns": {**good, "language": "lang"}}}}}}
    error = refused_dry_run(tmp_path, {"sources": {"pairs": {**source, "columns": good}}, **held}, capsys)
    assert f"source 'held': {tmp_path / name}: no column 'lang'" in error
    labelled = {"evaluation": {"sets": {"topics": {"kind": "clustering", "test": str(tmp_path / name)}}}}
    if form != "json":
        error = refused_dry_run(tmp_path, {"sources": {"pairs": {**source, "columns": good}}, **labelled}, capsys)
        assert f"{tmp_path / name}: no column 'text'" in error


def test_a_dry_run_refuses_columns_of_a_saved_data_set_and_says_what_it_cannot_look_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    capsys.readouterr()
    source = {
        "format": "datasets",
        "path": str(tmp_path / "saved"),
        "columns": {"query": "q", "passage": "answer"},
    }
    error = refused_dry_run(tmp_path, {"sources": {"pairs": None, "saved": source}}, capsys)
    assert "no column 'q'" in error
    hub = {"format": "datasets", "path": "nobody-here/nothing", "columns": {"query": "q"}}
    recipe = tmp_path / "changed.yaml"
    recipe.write_text(json.dumps({"extends": "starter", "name": "m", "sources": {"pairs": None, "hub": hub}}))
    assert f2llm("run", "--recipe", recipe, "--root", tmp_path / "root", "--dry-run") == 0
    assert "a dataset on the hub; its columns are checked when it is read" in capsys.readouterr().out


def test_a_dry_run_says_what_is_read_how_long_it_trains_and_where_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output, root = write(tmp_path / "faq.csv", ROWS), tmp_path / "r.yaml", tmp_path / "root"
    assert f2llm("recipe", "new", table, "--output", output) == 0
    assert (
        f2llm("run", "--recipe", output, "--root", root, "--set", "stages.trained.max_steps=7", "--dry-run") == 0
    )
    told = capsys.readouterr().out
    assert "reads faq: csv, 1 file, " in told
    assert "query from 'question', passage from 'answer'" in told
    assert "trains trained: 7 steps of 16 rows" in told
    assert f"writes {root}/report.html, and the model to serve to {root}/trained-" in told
    assert "measures on heldout" in told


@pytest.mark.parametrize("stem", ["no", "2024", "1e5"])
def test_a_new_recipe_reads_a_file_whose_name_is_no_text_in_yaml(tmp_path: Path, stem: str) -> None:
    table, output = write(tmp_path / f"{stem}.csv", ROWS), tmp_path / "recipe.yaml"
    assert f2llm("recipe", "new", table, "--output", output) == 0
    assert stem in load_recipe(str(output)).sources


def test_passages_are_held_out_of_the_only_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, output = write(tmp_path / "faq.csv", ROWS), tmp_path / "r.yaml"
    assert f2llm("recipe", "new", table, "--output", output) == 0
    count = int(len(ROWS) * 0.1)
    told = f"held out of {table}, and never trained on: {count} passages and their queries"
    assert told in capsys.readouterr().out
    recipe = load_recipe(str(output))
    found = recipe.evaluation.sets["heldout"]
    assert (found.passages, found.screen) == (count, True)
    assert found.source.paths == recipe.sources["faq"].paths


def test_held_out_pairs_become_a_set_and_what_was_guessed_stands_in_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, held = (
        write(tmp_path / "faq.csv", ROWS),
        write(tmp_path / "held.jsonl", renamed(title="question", body="answer")),
    )
    output = tmp_path / "r.yaml"
    assert f2llm("recipe", "new", table, "--heldout", held, "--output", output) == 0
    assert "held out, and never trained on:" in capsys.readouterr().out
    recipe = load_recipe(str(output))
    (found,) = recipe.evaluation.sets.values()
    assert found.source.format == "jsonl"
    assert (found.source.columns.query, found.source.columns.passage) == ("title", "body")
    text = output.read_text()
    assert all(f"# {guess} (its name)\n" in text for guess in ("query: 'question'", "passage: 'body'"))
    assert "trains a small model from scratch" in text
    assert "--backbone" in text
    assert "adapt-e5-small" in text
    assert f2llm("recipe", "new", table, "--heldout", table, "--output", tmp_path / "o.yaml") == 1
    assert f"--heldout {table}: {table} is trained on too" in capsys.readouterr().err


def test_texts_that_will_be_cut_are_told_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = [{**row, "answer": f"{row['answer']} " * (20 if n % 4 == 0 else 1)} for n, row in enumerate(ROWS)]
    assert f2llm("recipe", "new", write(tmp_path / "a.csv", long), "--output", tmp_path / "a.yaml") == 0
    told = capsys.readouterr().out  # a quarter of the answers, which are half of the texts
    assert (
        "an estimate, if a token is 3.5 bytes of text: 12.5 % of the texts are longer than data.max_tokens (128)"
        in told
    )
    assert f2llm("recipe", "new", write(tmp_path / "b.csv", ROWS), "--output", tmp_path / "b.yaml") == 0
    assert "an estimate" not in capsys.readouterr().out
    model = tiny_model(tmp_path / "model")
    assert f2llm("recipe", "new", tmp_path / "a.csv", "--output", tmp_path / "c.yaml", "--backbone", model) == 0
    assert f"an estimate, by the tokenizer of {model}: " in capsys.readouterr().out


# A server.


def test_serve_answers_until_it_is_told_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    model = tiny_model(tmp_path / "model")
    command = [sys.executable, "-m", "f2llm_ray", "serve", "--model", model, "--name", "mine", "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as server:
        assert server.stdout is not None
        try:
            lines = []
            while not lines or not lines[-1].startswith("curl "):
                line = server.stdout.readline()
                assert line, "".join(lines)
                lines.append(line)
            assert f"serving at http://127.0.0.1:{port} " in "".join(lines)
            curl = shlex.split(lines[-1])
            answer = httpx.post(curl[1], content=curl[-1], headers=[curl[3].split(": ")], timeout=30)
            assert answer.json()["model"] == "mine"
            assert len(answer.json()["data"][0]["embedding"]) == 32
            assert f2llm("serve", "--model", model, "--port", port) == 1
            assert f"--port {port}: cannot listen on 127.0.0.1" in capsys.readouterr().err
            server.send_signal(signal.SIGINT)
            rest = server.communicate(timeout=60)[0]
            assert server.returncode == 0, rest
            assert rest.strip().endswith("stopped")
        finally:
            server.kill()


def test_a_model_that_fails_its_self_check_is_not_served(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    engine = Engine(folder)
    found = calibrate(engine, engine.tokenize(LINES))
    save_calibration(Folder.at(str(folder)), Calibration(found.ranges, -found.check_nd))
    command = [sys.executable, "-m", "f2llm_ray", "serve", "--model", folder, "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=200)
    assert done.returncode == 1
    assert "error: tiny cannot be served: " in done.stderr
    assert "self-check failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_served_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f2llm("serve", "--model", tmp_path) == 1
    error = capsys.readouterr().err
    assert "not a model folder" in error
    assert "--root" not in error
    assert len(error.splitlines()) == 1
    (tmp_path / "report.json").write_text("{}")
    tiny_model(tmp_path / "trained-1a2b" / "model")
    assert f2llm("serve", "--model", tmp_path) == 1
    error = capsys.readouterr().err
    assert f"the model folders in it are {tmp_path}/trained-1a2b/model; --root {tmp_path} serves" in error


# The wheel.


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_is_enough(tmp_path: Path) -> None:
    """Built, installed beside the other packages, and taken through docs/first-hour.md in an empty folder."""
    pip = [sys.executable, "-m", "pip", "-q"]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "f2llm_ray", source / "f2llm_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "w", source], check=True)
    (wheel,) = (tmp_path / "w").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"f2llm_ray/py.typed", "f2llm_ray/recipe/builtin/starter.yaml"} <= set(names)
    site, work = tmp_path / "site", tmp_path / "work"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    work.mkdir()
    articles = renamed(title="question", body="answer")
    write(work / "articles.csv", articles)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [site / "bin" / "f2llm", *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import f2llm_ray; print(f2llm_ray.__file__)"]
    assert str(site) in subprocess.run(where, cwd=work, env=environment, capture_output=True, text=True).stdout  # noqa: PLW1510
    page = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    *commands, serve = [shlex.split(line)[1:] for line in lines]
    assert [words[0] for words in (*commands, serve)] == ["recipe", "run", "run", "serve"]
    short = ["stages.trained.max_steps=4", "tokenizer.train_vocab=400", "compute.workers=1"]
    said = [
        run(*words, *(flag for setting in short for flag in ("--set", setting) if words[0] == "run"))
        for words in commands
    ]
    assert "trained: would run" in said[1]
    assert "On heldout the served model trained has ndcg@10" in said[2]
    (client,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    port = str(free_port())
    server = [site / "bin" / "f2llm", *(port if word == "8000" else word for word in serve)]
    with subprocess.Popen(server, cwd=work, env=environment, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        try:
            assert any(line.startswith("curl ") for line in served.stdout)
            code = client.replace("8000", port)
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=work
            )
            assert done.stdout.split()[1] == "128"
            served.send_signal(signal.SIGINT)
            assert served.wait(60) == 0
        finally:
            served.kill()
