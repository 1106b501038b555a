"""jobs/plan.py from the outside: a table for the eye, numbers for programs, one message for what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.commands.main import main
from f2llm_ray.model.sizes import FAMILY, VOCABULARY
from f2llm_ray.plan.cost import cost, stage_hours
from f2llm_ray.plan.stage_work import Cluster, TeacherWork, corpus_size, shape_of, stage_work
from f2llm_ray.recipe.files import load_recipe

REPO = Path(__file__).parent.parent.parent


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "jobs" / "plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_job_prints_numbers_with_units() -> None:
    done = job("--recipe", "f2llm-v2-80m", "--gpus", "4", "--nodes", "2", "--rows", "1000", "--json")
    stages = {stage["stage"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert list(stages) == ["stage1", "stage2", "distilled"]
    assert stages["stage1"]["parameters"] == 596_049_920
    assert stages["distilled"]["parameters"] == 80_084_288
    assert stages["stage1"]["work"]["world"] == 8
    assert stages["stage2"]["work"]["texts_per_row"] == 11, "clustering draws most: 9 negatives"
    assert stages["stage1"]["cost"]["tokens_per_step"] == 512 * 9 * 1024
    assert stages["stage1"]["cost"]["steps"] == 2 * 2, "of 512 rows each, the last one filled up"
    assert stages["distilled"]["work"]["teacher"]["shape"]["hidden"] == 1024


def test_the_job_says_what_to_change() -> None:
    """14B without GradCache on eight GPUs of 80 GB: a batch of the longest texts is far too much."""
    engine = "stages.stage2.engine={zero_stage: 2, gradient_checkpointing: true}"
    arguments = ["--gpus", "8", "--gpu-memory", "80GB", "--price-per-gpu-hour", "2", "--stage", "stage2"]
    done = job("--recipe", "f2llm-v2-14b", *arguments, "--set", engine)
    assert done.returncode == 0, done.stderr
    assert "13,990,394,880 parameters" in done.stdout
    assert "does not fit into 72.0 GB; it would with engine.tokens_per_chunk: 16384" in done.stdout
    assert "with the changes" in done.stdout
    assert "(the caps)" in done.stdout
    assert "at 2 an hour" in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    (own,) = [line for line in lines if line.strip().startswith(">")]
    assert "ZeRO 2 " in own
    assert not own.endswith("fits")


def test_what_the_job_says_to_change_makes_it_fit() -> None:
    settings = ["--set", "stages.stage2.engine.tokens_per_chunk=16384"]
    done = job("--recipe", "f2llm-v2-14b", "--gpus", "8", "--stage", "stage2", *settings)
    assert "fits into 72.0 GB" in done.stdout
    assert "chunks of at most 16,384 (GradCache)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "backbone.path=someone/else"], ["someone/else", "config.json", "Qwen/Qwen3-0.6B"]),
        (["--gpu-memory", "many"], ["80GB"]),
        (["--mfu", "0"], ["above 0"]),
        (["--nodes", "none"], ["from 1 on"]),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], words: list[str]) -> None:
    done = job("--recipe", "f2llm-v2-0.6b", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_workers_that_cannot_share_a_batch_and_unknown_stages_are_named() -> None:
    recipe = load_recipe("f2llm-v2-0.6b")
    with pytest.raises(RecipeError, match=r"stage1.*global_batch \(512\).*3 GPUs"):
        stage_work(recipe, "stage1", 3)
    with pytest.raises(RecipeError, match=r"stage9.*stage1.*stage2"):
        stage_work(recipe, "stage9", 8)


def test_what_pruning_keeps_is_what_is_distilled() -> None:
    """Any mix of parts; what is not named stays, and the teacher keeps all."""
    cut = "prune={model: stage2, layers: 7, kv_heads: 2, vocabulary: 50000}"
    work = stage_work(load_recipe("f2llm-v2-80m", ["prune=null", cut]), "distilled", 8)
    whole = FAMILY["0.6b"]
    changed = {"layers": 7, "kv_heads": 2, "heads": 4}
    assert (work.shape, work.vocabulary) == (whole.model_copy(update=changed), 50_000)
    assert work.teacher == TeacherWork(shape=whole, vocabulary=VOCABULARY, cached=True)
    beside = load_recipe("f2llm-v2-80m", ["distill.teacher_vectors=online", "prune.vocabulary=used"])
    work = stage_work(beside, "distilled", 8)
    assert work.vocabulary == VOCABULARY, "only the corpus says how many are used"
    assert work.teacher == TeacherWork(shape=whole, vocabulary=VOCABULARY, cached=False)
    without = stage_work(load_recipe("f2llm-v2-80m", ["distill.mse_weight=0"]), "distilled", 8)
    assert without.teacher is None


def test_a_model_has_the_parts_that_every_pruning_on_its_way_kept() -> None:
    steps = [
        "stages.half={kind: prune, model: stage1, layers: 14, kv_heads: 4}",
        "stages.again={tasks: [retrieval]}",
        "stages.quarter={kind: prune, layers: 7, vocabulary: 50000}",
        "stages.last={kind: distill, teacher: again, teacher_vectors: online}",
        "prune=null",
        "distill=null",
    ]
    recipe = load_recipe("f2llm-v2-80m", steps)
    whole = FAMILY["0.6b"]
    half = whole.model_copy(update={"layers": 14, "kv_heads": 4, "heads": 8})
    assert shape_of(recipe, "stage2") == (whole, VOCABULARY)
    assert shape_of(recipe, "again") == (half, VOCABULARY)
    work = stage_work(recipe, "last", 8)
    assert (work.shape, work.vocabulary) == (half.model_copy(update={"layers": 7}), 50_000)
    assert work.teacher == TeacherWork(shape=half, vocabulary=VOCABULARY, cached=False)


def test_hours_of_a_stage_are_none_where_they_cannot_be_computed() -> None:
    cluster = Cluster(gpus_per_node=8)
    recipe = load_recipe("f2llm-v2-80m")
    work = stage_work(recipe, "stage1", 8)
    assert stage_hours(recipe, "stage1", cluster) == cost(work, corpus_size(recipe, work), cluster).hours > 0
    assert stage_hours(recipe, "stage1", replace(cluster, gpus_per_node=3)) is None
    assert stage_hours(load_recipe("f2llm-v2-80m", ["backbone.path=someone/else"]), "stage1", cluster) is None
    assert stage_hours(load_recipe("quickstart"), "stage1", cluster) is None, "it trains on CPUs"


def test_a_plan_starts_nothing() -> None:
    code = (
        "import sys; sys.argv = ['plan.py', '--recipe', 'f2llm-v2-4b', '--json']\n"
        "import runpy\n"
        "try: runpy.run_path('jobs/plan.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray', 'transformers', 'deepspeed', 'huggingface_hub'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_recipe_for_cpus_is_planned_for_gpus_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "starter"]) == 1
    assert "starter trains on CPU (compute.gpus_per_worker is 0)" in capsys.readouterr().err
    assert main(["plan", "--recipe", "starter", "--gpus", "1"]) == 0
