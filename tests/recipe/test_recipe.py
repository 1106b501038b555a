"""A recipe says all that a run is, and what does not fit is refused by name before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.recipe.files import builtin_recipes, load_recipe, resolved

SMALL = """
name: small
sources:
  pairs: {format: jsonl, paths: [pairs.jsonl]}
tokenizer: {train_vocab: 400}
backbone:
  shape: {hidden: 16, layers: 2, heads: 2, kv_heads: 1, head_dim: 8, ffn: 32}
stages:
  stage1: {engine: {precision: fp32}, global_batch: 8, negatives: {retrieval: 2}, keep_best: true}
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).stages


def test_set_changes_one_value_with_its_type(small: str) -> None:
    recipe = load_recipe(small, ["stages.stage1.lr=1e-3", "sources.pairs.cap=7", "data.on_bad_row=skip"])
    assert recipe.stages["stage1"].lr == 1e-3
    assert recipe.sources["pairs"].cap == 7
    assert recipe.data.on_bad_row == "skip"


def test_extends_merges_key_by_key_and_null_removes(tmp_path: Path, small: str) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {Path(small).name}\nname: child\nstages: {{stage1: {{lr: 0.01}}}}\nseed: 5\n")
    recipe = load_recipe(str(child))
    assert (recipe.name, recipe.seed) == ("child", 5)
    assert recipe.stages["stage1"].lr == 0.01
    assert recipe.stages["stage1"].global_batch == 8
    child.write_text("extends: small.yaml\nstages: {stage1: null}\n")
    with pytest.raises(RecipeError, match="stages: at least one"):
        load_recipe(str(child))


@pytest.mark.parametrize(
    ("place", "key", "meant"),
    [
        ("stages: {stage1: {max_setps: null}}", "stages.stage1.max_setps", "max_steps"),
        ("stages: {stage1: {engine: {presicion: null}}}", "stages.stage1.engine.presicion", "precision"),
        ("data: {max_token: null}", "data.max_token", "max_tokens"),
        ("evalaution: null", "evalaution", "evaluation"),
    ],
)
def test_null_of_an_unknown_key_is_refused(tmp_path: Path, small: str, place: str, key: str, meant: str) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {Path(small).name}\n{place}\n")
    with pytest.raises(RecipeError, match=f"{key}: unknown key; did you mean {meant}"):
        load_recipe(str(child))


def test_null_of_a_known_key_that_is_not_set_is_its_default(tmp_path: Path, small: str) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: small.yaml\nmine: null\nstages: {stage1: {lr: null, negatives: {clustering: null}}}"
    )
    assert load_recipe(str(child)) == load_recipe(small)


LENGTHS = {"epochs": 3, "max_steps": 40, "max_minutes": 2.5}


@pytest.mark.parametrize("later", LENGTHS)
@pytest.mark.parametrize("earlier", LENGTHS)
def test_a_later_layer_says_how_long_a_stage_is(tmp_path: Path, small: str, earlier: str, later: str) -> None:
    Path(small).write_text(SMALL.replace("keep_best: true", f"{earlier}: 7"))
    wanted = {key: LENGTHS[key] if key == later else None for key in LENGTHS}
    if later != "epochs":
        wanted["epochs"] = 1
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: small.yaml\nstages: {{stage1: {{{later}: {LENGTHS[later]}}}}}\n")
    said = f"stages.stage1.{later}={LENGTHS[later]}"
    changes = {"stages": {"stage1": {later: LENGTHS[later]}}}
    for recipe in (load_recipe(str(child)), load_recipe(small, [said]), load_recipe(small, [], changes)):
        stage = recipe.stages["stage1"]
        assert {key: getattr(stage, key) for key in LENGTHS} == wanted


def test_only_stages_have_a_length() -> None:
    settings = {"distill": {"epochs": 3}, "sources": {"epochs": {"cap": 3}}}
    changed = resolved(settings, ["distill.max_minutes=2", "sources.max_steps={cap: 4}"])
    assert changed["distill"] == {"max_minutes": 2}
    assert changed["sources"] == {"epochs": {"cap": 3}, "max_steps": {"cap": 4}}


@pytest.mark.parametrize("other", ["max_steps", "epochs"])
def test_one_layer_says_once_how_long_a_stage_is(tmp_path: Path, small: str, other: str) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: small.yaml\nstages: {{stage1: {{max_minutes: 2, {other}: 3}}}}\n")
    said = [f"stages.stage1.{other}=3", "stages.stage1.max_minutes=2"]
    for recipe, overrides in ((str(child), []), (small, said), (small, said[::-1])):
        with pytest.raises(RecipeError, match=f"max_minutes: says how long the stage is, and so does {other}"):
            load_recipe(recipe, overrides)


def test_set_adds_a_whole_stage(small: str) -> None:
    added = load_recipe(small, ["stages.stage2={engine: {precision: fp32}}", "stages.stage2.lr=1e-3"])
    assert list(added.stages) == ["stage1", "stage2"]
    assert added.stages["stage2"].lr == 1e-3


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.stage1.learning_rate=1", ["stages.stage1.learning_rate: unknown key", "did you mean lr?"]),
        (
            "stages.stage1.max_stpes=1",
            ["did you mean max_steps", "`f2llm recipe explain stages.stage1` lists all"],
        ),
        ("stages.stage1.bf16=true", ["did you mean stages.NAME.engine.precision (", "no fp16"]),
        ("sorces={}", ["sorces: unknown key; did you mean sources?", "`f2llm recipe explain` lists all"]),
        ("sources.pairs.path=x", ["sources.pairs", "path", "unknown key", "paths"]),
        ("sources.pairs.format=xml", ["sources.pairs", "xml", "parquet"]),
        ("data.max_tokens=many", ["data.max_tokens", "integer", "many"]),
        ("stages.stage1.tasks=[ranking]", ["stages.stage1.tasks.0", "retrieval"]),
        ("stages.stage1.tasks=[clustering]", ["stages.stage1", "no source has a task"]),
        ("stages.stage1.sources=[other]", ["stages.stage1.sources", "other", "pairs"]),
        ("stages.stage1.engine.precision=bf16", ["stages.stage1.engine.precision", "GPU"]),
        ("compute.workers=3", ["stages.stage1.global_batch", "8", "multiple"]),
        ("compute={workers: 8, workers_min: 2}", ["stages.stage1.global_batch", "8", "workers_min (2)"]),
        ("compute.workers_min=2", ["compute", "workers_min (2)", "workers (1)"]),
        ("stages.stage1.engine.offload=true", ["stages.stage1.engine.offload", "GPU"]),
        ("stages.stage1.engine={offload: true, zero_stage: 0}", ["stages.stage1.engine.offload", "zero_stage 1"]),
        ("stages.stage1.engine={precision: bf16, zero_stage: 0}", ["stages.stage1.engine.zero_stage", "use 1"]),
        ("data.validation=0", ["keep_best", "data.validation"]),
        ("backbone.shape.kv_heads=3", ["heads (2)", "kv_heads (3)"]),
        ("backbone={pooling: mean}", ["exactly one of path and shape"]),
        ("tokenizer.train_vocab=null", ["tokenizer"]),
        ("tokenizer.path=somewhere", ["not both"]),
        ("prune={model: stage9, layers: 1, hidden: 8, ffn: 8}", ["prune.model", "stage9", "stage1"]),
        ("prune={model: stage1, layers: 3, hidden: 8, ffn: 8}", ["prune.layers", "3", "2"]),
        ("distill={teacher: stage1, engine: {precision: fp32}}", ["distill", "prune"]),
        (
            "sources.labels={format: csv, paths: [a.csv], task: classification}",
            ["classification", "negatives", "at least 1"],
        ),
        ("stages.stage1.min_lr=1", ["min_lr"]),
        ("serving.model=stage9", ["serving.model", "stage9", "stage1"]),
        ("mine={model: stage9}", ["mine.model", "stage9", "untrained", "/"]),
        ("evaluation.divisors=[2, 4]", ["evaluation.divisors", "1, the whole d"]),
        ("evaluation.divisors=[1, 0]", ["evaluation.divisors.1", "1"]),
        ("evaluation={sets: {a/b: {folder: x}}}", ["evaluation.sets.a/b", "a/b", "letters"]),
        ("sources={中: {format: jsonl, paths: [x.jsonl]}}", ["sources.中", "letters"]),
        ("stages.stage1.max_setps=null", ["stages.stage1.max_setps: unknown key; did you mean max_steps"]),
        ("stages.stag1.lr=1", ["no stage is called stag1; did you mean stage1?", "the stages are stage1;"]),
        ("stages.other.engine.precision=fp32", ["no stage is called other; the stages are stage1;"]),
        ("sources.pairs.language=no", ["language", "found False; YAML reads no, off, yes and on as false"]),
        ("sources.pairs.columns={query: 0}", ["columns.query", 'found 0; write it in quotes, "0"']),
        ("sources.pairs={format: jsonl, format: csv}", ["not valid YAML", "'format' twice"]),
        ("nonsense", ["--set", "a.b=value"]),
        ("name.deep=1", ["--set", "single value"]),
    ],
)
def test_what_does_not_fit_is_named(small: str, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(small, [override])
    for word in words:
        assert word in str(refused.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(RecipeError, match="quickstart"):
        load_recipe("no-such-recipe")
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8 at byte 6"):
        load_recipe(str(path))
    path.write_text("name: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("- a list")
    with pytest.raises(RecipeError, match="expected a mapping"):
        load_recipe(str(path))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path, small: str) -> None:
    path = tmp_path / "twice.yaml"
    one = "  {}: {{format: jsonl, paths: [{}.jsonl]}}\n"
    path.write_text(f"extends: {small}\nsources:\n{one.format('a', 'x')}{one.format('a', 'y')}")
    with pytest.raises(RecipeError, match=r"twice\.yaml: not valid YAML: found the key 'a' twice(.|\n)*line 4"):
        load_recipe(str(path))


def test_a_key_of_a_mapping_may_replace_one_that_it_merges(tmp_path: Path, small: str) -> None:
    path = tmp_path / "merged.yaml"
    base = "a: &a {format: jsonl, paths: [a.jsonl], cap: 5}"
    path.write_text(f"extends: {small}\nsources:\n  {base}\n  b: &b {{<<: *a, cap: 6}}\n  c: {{<<: *b, cap: 7}}\n")
    assert [load_recipe(str(path)).sources[name].cap for name in "abc"] == [5, 6, 7]


def test_a_checkpoint_takes_the_place_of_a_random_model_whole(tmp_path: Path) -> None:
    found = load_recipe("starter", ["backbone.path=some/model", "tokenizer.train_vocab=null"]).backbone
    assert (found.path, found.max_tokens) == ("some/model", 512)
    assert (found.shape, found.embeddings_from) == (None, None)
    assert found.pooling is None, "the pooling of the random model is none of the checkpoint's"
    kept = load_recipe(
        "starter", ["backbone.path=some/model", "backbone.pooling=cls", "tokenizer.train_vocab=null"]
    )
    assert kept.backbone.pooling == "cls"
    base = tmp_path / "base.yaml"
    base.write_text(
        "extends: starter\nbackbone: {path: one/model, pooling: cls}\ntokenizer: {train_vocab: null}\n", "utf-8"
    )
    moved = load_recipe(str(base), ["backbone.path=./copy"]).backbone
    assert (moved.path, moved.pooling) == ("./copy", "cls"), (
        "another place of a checkpoint keeps what was said of it"
    )
    shape = "{hidden: 32, layers: 1, heads: 2, kv_heads: 1, head_dim: 8, ffn: 32}"
    again = load_recipe(str(base), [f"backbone.shape={shape}", "tokenizer.train_vocab=400"]).backbone
    assert (again.path, again.pooling) == (None, None)


def test_an_override_of_what_an_anchor_names_changes_one_place() -> None:
    found = load_recipe("quickstart", ["stages.stage1.engine.tokens_per_pass=512"])
    stages = [*found.stages.values(), found.distill]
    assert [stage.engine.tokens_per_pass for stage in stages if stage] == [512, 4096, 4096]
