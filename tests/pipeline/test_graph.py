"""Which stages a recipe has, and which run again after a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from f2llm_ray.base.errors import DataError, RecipeError
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.dry_run import dry_run, overview
from f2llm_ray.pipeline.graph import Graph
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe, parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Stage
from tests.tiny import tiny_model

MODELS = {"untrained", "stage1", "stage2", "pruned", "distilled"}
TRAINED = {"stage1", "stage2", "distilled"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "root"))


def quickstart(run: Run, *changes: str) -> Graph:
    return declare(load_recipe("quickstart", changes), run)


def hashes(graph: Graph) -> dict[str, str]:
    return {stage.name: stage.hash for stage in graph.stages()}


def changed(run: Run, *changes: str) -> set[str]:
    before, after = hashes(quickstart(run)), hashes(quickstart(run, *changes))
    return {name for name in before if before[name] != after.get(name)}


def small(folder: Path, **more: Any) -> Recipe:
    """A recipe over one file."""
    settings = {
        "name": "small",
        "sources": {"a": {"format": "jsonl", "paths": [str(folder / "a.jsonl")]}},
        "tokenizer": {"train_vocab": 400},
        "backbone": {"shape": {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}},
        "stages": {"stage1": {"engine": {"precision": "fp32"}}},
        **more,
    }
    (folder / "a.jsonl").write_text('{"query": "a", "passage": "b"}\n')
    return parse(Recipe, settings, "small")


@pytest.mark.parametrize(
    "change",
    [
        "sources.plone_ui.licence=MIT",
        "evaluation.sets.django_ui.source.licence=MIT",
        "data.shards=4",
        "data.on_bad_row=skip",
        "stages.stage1.engine.loader_prefetch=8",
        "stages.stage1.engine.tokens_per_pass=8192",
        "stages.stage1.engine.gradient_checkpointing=true",
        "stages.stage1.keep_checkpoints=5",
        "stages.stage1.checkpoint_every=30",
        "stages.stage1.validation_rows=512",
        "evaluation.during_training=true",
        "name=other",
        "compute={workers: 1, cpus_per_worker: 1, threads_per_worker: 2}",
        "tracking.tensorboard=false",
        "serving.max_inputs=3",
        "sources.plone_ui.weight=1.0",
    ],
)
def test_what_cannot_change_an_output_runs_nothing_again(run: Run, change: str) -> None:
    assert changed(run, change) == set()


def test_a_changed_setting_changes_only_what_depends_on_it(run: Run) -> None:
    def measured(*models: str) -> set[str]:
        found = {f"evaluate-{model}-{name}" for model in models for name in ("django_ui", "language_names")}
        return found | {f"speed-{model}" for model in models}

    assert changed(run, "distill.lr=0.5") == {"distilled", *measured("distilled")}
    assert changed(run, "prune.ffn=16") == {"pruned", "distilled", *measured("pruned", "distilled")}
    cut = changed(run, "prune.calibration_rows=400")
    assert cut == {"importance-stage2", "pruned", "distilled", *measured("pruned", "distilled")}
    speeds = {f"speed-{model}" for model in MODELS}
    assert changed(run, "evaluation.divisors=[1]") == measured(*MODELS) - speeds
    worded = changed(run, "evaluation.sets.django_ui.source.instruction=Find it.")
    of_set = {f"evaluate-{model}-django_ui" for model in {*MODELS, "bm25"}}
    assert worded == {"set-django_ui", *of_set, *speeds}
    assert changed(run, "seed=99") >= {"prepare", *MODELS}
    started = changed(run, "backbone.embeddings_from=null")
    assert started >= MODELS
    assert "prepare" not in started
    seen = changed(run, "sources.plone_ui.weight=2")
    assert seen >= {"taught-distilled", *TRAINED}
    assert not {"prepare", "untrained"} & seen, "how often a row is seen is no matter of its text"


def test_baselines_are_measured_beside_the_models_and_never_again_for_each_other(run: Run, tmp_path: Path) -> None:
    assert changed(run, "evaluation.bm25=false") == {"evaluate-bm25-django_ui"}, "language_names is no search"
    one, other = (tiny_model(tmp_path / name) for name in ("one", "other"))
    before = hashes(quickstart(run, f"evaluation.baselines=[{one}]"))
    both = hashes(quickstart(run, f"evaluation.baselines=[{other}, {one}]"))
    added = {f"evaluate-other-{name}" for name in ("django_ui", "language_names")}
    assert both.keys() - before.keys() == added
    assert before.items() <= both.items()
    moved = tiny_model(tmp_path / "elsewhere" / "one")
    assert hashes(quickstart(run, f"evaluation.baselines=[{moved}]")) == before, "known by content"
    tiny_model(one, hidden=16)
    changed_files = hashes(quickstart(run, f"evaluation.baselines=[{one}]"))
    again = {name for name in before if before[name] != changed_files[name]}
    assert again == {"evaluate-one-django_ui", "evaluate-one-language_names"}
    endpoint = quickstart(run, "evaluation.baselines=[http://127.0.0.1:9/v1#org/m, org/hub-model]")
    assert {model for model, _ in endpoint.evaluations} == {*MODELS, "bm25", "m", "hub-model"}


@pytest.mark.parametrize(
    ("baselines", "words"),
    [
        (["a/x", "b/x"], ["'a/x' would be called 'x'", "'b/x'"]),
        (["a/bm25"], ["'a/bm25' would be called 'bm25'"]),
        (["models/stage1"], ["'models/stage1' would be called 'stage1', as a model of the run is"]),
        (["/"], ["'/'", "expected a model folder, a name on the hub or URL#NAME"]),
    ],
)
def test_baselines_with_one_name_are_refused(tmp_path: Path, baselines: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        small(tmp_path, evaluation={"baselines": baselines})
    for word in ["evaluation.baselines", *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize("place", ["nothing", "here/is/none", "empty"])
def test_a_baseline_that_is_no_model_is_named_before_any_work(tmp_path: Path, run: Run, place: str) -> None:
    (tmp_path / "empty").mkdir()
    recipe = small(tmp_path, evaluation={**held(tmp_path), "baselines": [str(tmp_path / place)]})
    with pytest.raises(DataError, match=rf"evaluation\.baselines: .*{place}: found no model there"):
        declare(recipe, run)


def test_the_order_of_sources_counts_and_that_of_sets_does_not(run: Run) -> None:
    recipe = load_recipe("quickstart")
    base = hashes(declare(recipe, run))
    turned = recipe.model_copy(update={"sources": dict(reversed(recipe.sources.items()))})
    assert hashes(declare(turned, run))["prepare"] != base["prepare"]
    sets = dict(reversed(recipe.evaluation.sets.items()))
    turned = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"sets": sets})})
    assert hashes(declare(turned, run))["prepare"] == base["prepare"]


def test_inputs_count_by_content_and_not_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def prepare(path: str) -> str:
        source = {"a": {"format": "jsonl", "paths": [path]}}
        return declare(small(tmp_path, sources=source), run).prepare.hash

    monkeypatch.chdir(tmp_path)
    small(tmp_path)
    before = prepare("a.jsonl")
    assert prepare("./a.jsonl") == prepare(str(tmp_path / "a.jsonl")) == before
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert prepare("b.jsonl") == before
    assert prepare("*.jsonl") != before
    (tmp_path / "b.jsonl").write_text('{"query": "a", "passage": "c"}\n')
    assert prepare("b.jsonl") != before


@pytest.mark.parametrize("place", ["backbone", "teacher", "tokenizer", "set", "mine"])
def test_folders_that_change_in_place_are_others(tmp_path: Path, run: Run, place: str) -> None:
    model, beir = tiny_model(tmp_path / "model"), tmp_path / "beir"
    beir.mkdir()
    for name in ("queries", "corpus", "qrels"):
        (beir / f"{name}.jsonl").write_text('{"id": "0"}\n')
    settings: dict[str, dict[str, Any]] = {
        "backbone": {"backbone": {"path": str(model), "shape": None}},
        "teacher": {"distill": {"teacher": str(model), "model": "untrained", "engine": {"precision": "fp32"}}},
        "tokenizer": {"tokenizer": {"path": str(model)}},
        "set": {"evaluation": {"sets": {"held": {"folder": str(beir)}}}},
        "mine": {"mine": {"model": str(model)}},
    }
    recipe = small(tmp_path, **settings[place])
    before = hashes(declare(recipe, run))
    files = {"tokenizer": model / "tokenizer.json", "set": beir / "corpus.jsonl"}
    file = files.get(place, model / "model.safetensors")
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(data)
    after = hashes(declare(recipe, run))
    first = {
        "backbone": "untrained",
        "teacher": "taught-distilled",
        "tokenizer": "prepare",
        "set": "set-held",
        "mine": "mined",
    }
    assert before[first[place]] != after[first[place]]
    same = {"teacher": ["prepare", "untrained", "stage1"], "mine": ["prepare", "untrained"]}.get(place, [])
    assert [before[name] for name in same] == [after[name] for name in same]


def test_missing_inputs_are_named_before_any_work(tmp_path: Path, run: Run) -> None:
    for place in ("empty", "not there/at all"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        recipe = small(tmp_path, distill={"teacher": str(tmp_path / place), "engine": {"precision": "fp32"}})
        with pytest.raises(DataError, match=rf"distill\.teacher: .*{place}: found no model"):
            declare(recipe, run)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"source 'a': .*a\.jsonl"):
        declare(recipe, run)


CHAIN = {
    "stages": {
        "base": {"engine": {"precision": "fp32"}},
        "medium": {"kind": "prune", "layers": 3},
        "medium-taught": {"kind": "distill", "teacher": "base", "engine": {"precision": "fp32"}},
        "small": {"kind": "prune", "layers": 2, "hidden": 16},
        "small-taught": {"kind": "distill", "teacher": "medium-taught", "engine": {"precision": "fp32"}},
    },
}


def test_a_recipe_prunes_and_distils_as_often_as_it_says(tmp_path: Path, run: Run) -> None:
    graph = declare(small(tmp_path, **CHAIN), run)
    assert {name: model.made_from for name, model in graph.models.items()} == {
        "untrained": None,
        "base": "untrained",
        "medium": "base",
        "medium-taught": "medium",
        "small": "medium-taught",
        "small-taught": "small",
    }
    names = [stage.name for stage in graph.stages()]
    assert names.index("importance-base") < names.index("medium") < names.index("taught-medium-taught")
    assert names.index("importance-medium-taught") < names.index("small")
    teacher = graph.models["small-taught"].stage.parents["taught"].parents["teacher"]
    assert teacher is graph.models["medium-taught"].stage
    assert [stage.name for stage in graph.of_job("prune")] == [
        "importance-base",
        "medium",
        "importance-medium-taught",
        "small",
    ]


def test_distilling_needs_no_pruning(tmp_path: Path, run: Run) -> None:
    teacher = str(tiny_model(tmp_path / "teacher"))
    recipe = small(tmp_path, stages={}, distill={"teacher": teacher, "engine": {"precision": "fp32"}})
    graph = declare(recipe, run)
    assert list(graph.models) == ["untrained", "distilled"]
    assert graph.models["distilled"].stage.parents["student"] is graph.models["untrained"].stage


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            {"a": {"kind": "prune", "layers": 3}, "b": {"kind": "prune", "layers": 4}},
            ["stages.b.layers", "'a'", "3"],
        ),
        ({"a": {"kind": "prune", "model": "b", "layers": 3}}, ["stages.a.model", "'b'", "untrained"]),
        ({"a": {"kind": "shrink"}}, ["stages.a.kind", "shrink"]),
        ({"prepare": {}}, ["stages.prepare", "taken"]),
        ({"taught-x": {}}, ["stages.taught-x", "taken"]),
        ({"a": {"kind": "distill", "teacher": "untrained"}}, ["stages.a.teacher", "student"]),
    ],
)
def test_impossible_chains_are_refused_by_name(tmp_path: Path, stages: dict[str, Any], words: list[str]) -> None:
    engine = {"engine": {"precision": "fp32"}}
    stages = {name: {**step, **({} if step.get("kind") == "prune" else engine)} for name, step in stages.items()}
    with pytest.raises(RecipeError) as refused:
        small(tmp_path, stages=stages)
    for word in words:
        assert word in str(refused.value)


# What depends on what is in the root.


def finish(run: Run, graph: Graph, *names: str) -> None:
    """Writes the manifests of stages as if they had run."""
    for stage in graph.stages():
        if stage.name in names or not names:
            run.finish(stage, started=0.0, rows=[{"dropped": {}}])


def held(folder: Path, **more: Any) -> dict[str, Any]:
    """An evaluation section with one set on disk."""
    beir = folder / "beir"
    beir.mkdir(exist_ok=True)
    for name in ("queries", "corpus", "qrels"):
        (beir / f"{name}.jsonl").write_text('{"id": "0"}\n')
    return {"sets": {"held": {"folder": str(beir), **more}}}


def test_a_set_that_comes_later_trains_nothing_unless_asked(tmp_path: Path, run: Run) -> None:
    first = declare(small(tmp_path), run)
    finish(run, first)
    later = small(tmp_path, evaluation=held(tmp_path))
    graph = declare(later, run)
    assert hashes(graph).items() >= hashes(first).items()
    assert list(graph.overlaps) == ["held"], "what of it was trained on is counted"
    again = declare(later, run, rescreen=True)
    assert again.prepare.hash != first.prepare.hash
    assert again.overlaps == {}
    finish(run, again)
    assert declare(later, run).prepare.hash == again.prepare.hash, "once asked for, it stays"
    assert declare(small(tmp_path), run).prepare.hash == first.prepare.hash


def test_a_set_is_screened_by_its_texts_and_not_by_its_wording(tmp_path: Path, run: Run) -> None:
    graph = declare(small(tmp_path, evaluation=held(tmp_path)), run)
    assert graph.overlaps == {}
    finish(run, graph)
    worded = declare(small(tmp_path, evaluation=held(tmp_path, instruction="Find it.")), run)
    assert worded.prepare.hash == graph.prepare.hash
    assert worded.overlaps == {}
    other = declare(small(tmp_path, evaluation=held(tmp_path, max_queries=1)), run)
    assert other.prepare.hash == graph.prepare.hash
    assert list(other.overlaps) == ["held"]
    not_screened = declare(small(tmp_path, evaluation=held(tmp_path, screen=False)), Run(str(tmp_path / "other")))
    assert list(not_screened.overlaps) == ["held"]


def test_a_run_goes_on_without_its_raw_data(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small(tmp_path)
    graph = declare(recipe, run)
    finish(run, graph, "prepare")
    (tmp_path / "a.jsonl").unlink()
    assert hashes(declare(recipe, run)) == hashes(graph)
    assert "was made of it before and is used" in capsys.readouterr().out
    typo = recipe.model_copy(
        update={"sources": {"a": recipe.sources["a"].model_copy(update={"paths": (str(tmp_path / "b.jsonl"),)})}}
    )
    with pytest.raises(DataError, match=r"b\.jsonl"):
        declare(typo, run)


def test_rows_that_were_skipped_are_not_accepted_where_none_may_be(tmp_path: Path, run: Run) -> None:
    graph = declare(small(tmp_path), run)
    accept = graph.prepare.accept
    assert accept is not None
    accept({"hash": "x", "rows": [{"dropped": {}}]})
    with pytest.raises(DataError, match=r"malformed rows were skipped .*3 not JSON.* set it to .skip."):
        accept({"hash": "x", "rows": [{"dropped": {"not JSON": 3}}]})
    skipping = declare(small(tmp_path, data={"on_bad_row": "skip"}), run)
    assert skipping.prepare.hash == graph.prepare.hash
    assert skipping.prepare.accept is not None
    skipping.prepare.accept({"hash": "x", "rows": [{"dropped": {"not JSON": 3}}]})


def test_a_dry_run_says_why(tmp_path: Path, run: Run) -> None:
    recipe = small(tmp_path)
    graph = declare(recipe, run)
    assert dry_run(graph, run, graph.stages())[0] == "prepare: would run, not made yet"
    finish(run, graph)
    assert all(": there (" in line for line in dry_run(graph, run, graph.stages()))
    assert overview(graph, run)[0] == "all stages are there: a run would only write the report again"
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "new", "passage": "row"}) + "\n")
    (tmp_path / "more.jsonl").write_text(json.dumps({"query": "more", "passage": "rows"}) + "\n")
    both = declare(small_again(recipe, paths=(str(tmp_path / "a.jsonl"), str(tmp_path / "more.jsonl"))), run)
    lines = dict(line.split(": ", 1) for line in dry_run(both, run, both.stages()))
    assert lines["prepare"] == f"would run, {tmp_path}/more.jsonl is new; {tmp_path}/a.jsonl changed"
    assert lines["untrained"] == "would run, prepare runs again"
    assert lines["stage1"] == "would run, prepare runs again; untrained runs again"


def small_again(recipe: Recipe, **source: Any) -> Recipe:
    return recipe.model_copy(update={"sources": {"a": recipe.sources["a"].model_copy(update=source)}})


def test_a_dry_run_names_the_setting(tmp_path: Path, run: Run) -> None:
    finish(run, declare(small(tmp_path), run))
    changes = {"stage1": {"lr": 1e-3, "engine": {"precision": "fp32"}}}
    graph = declare(small(tmp_path, stages=changes), run)
    lines = dict(line.split(": ", 1) for line in dry_run(graph, run, graph.stages()))
    assert lines["stage1"] == "would run, lr 8e-06 -> 0.001"
    assert lines["prepare"].startswith("there")


def test_a_soup_is_made_of_models_of_the_run_and_of_others(run: Run, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other")
    stage = {"engine": {"precision": "fp32"}}
    stages = {"one": stage, "two": {**stage, "model": "untrained"}}
    recipe = small(tmp_path, stages={**stages, "both": {"kind": "soup", "models": ["one", "two", str(other)]}})
    graph = declare(recipe, run)
    soup = graph.model("both")
    assert (soup.kind, soup.made_from, soup.sources) == ("merge", "one", ("a",))
    assert {parent.name for parent in soup.stage.parents.values()} == {"prepare", "one", "two"}
    assert list(soup.stage.inputs) == ["model2"]
    weighted = small(
        tmp_path, stages={**stages, "both": {"kind": "soup", "models": ["one", "two"], "weights": [2, 1]}}
    )
    assert declare(weighted, run).model("both").stage.hash != soup.stage.hash
    with pytest.raises(
        RecipeError, match=r"stages\.both\.models: 'three' is not one of \['untrained', 'one', 'two'\]"
    ):
        small(tmp_path, stages={**stages, "both": {"kind": "soup", "models": ["one", "three"]}})


def test_a_stage_is_called_finished_before_only_by_a_later_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Stage(name="made", job="train", settings={})
    first, second = (Pipeline(small(tmp_path), str(tmp_path / "root")) for _ in range(2))
    for _ in range(2):
        first.stage(made)
    told = capsys.readouterr().out
    assert "made: finished in" in told
    assert "finished before" not in told
    second.stage(made)
    assert capsys.readouterr().out == f"made: finished before, skipped ({made.folder_name})\n"


def test_exits_of_the_last_elastic_model_of_a_chain_are_measured(tmp_path: Path, run: Run) -> None:
    def stage(*layers: int, **more: Any) -> dict[str, Any]:
        return {"engine": {"precision": "fp32"}, "elastic": {"layers": layers}, **more}

    engine = {"engine": {"precision": "fp32"}}
    stages = {"one": stage(1, 2), "two": stage(2), "other": stage(3, model="untrained"), "plain": engine}
    graph = declare(small(tmp_path, stages=stages, evaluation=held(tmp_path)), run)
    assert graph.exits == {"two@2": ("two", 2), "other@3": ("other", 3)}
    (held_set,) = graph.sets
    cut, whole = graph.evaluations["two@2", held_set], graph.evaluations["two", held_set]
    assert cut.parents == whole.parents
    assert cut.settings == {**whole.settings, "layers": 2}
    with pytest.raises(
        RecipeError, match=r"stages.one.elastic.layers: found \[1, 4\], expected numbers below 4, .*'untrained'"
    ):
        small(tmp_path, stages={"one": stage(1, 4)})
    pruned = {"one": engine, "two": {"kind": "prune", "layers": 2}, "three": stage(2)}
    with pytest.raises(
        RecipeError, match=r"stages.three.elastic.layers: found \[2\], expected numbers below 2, .*'two'"
    ):
        small(tmp_path, stages=pruned)
