"""What the planner says to change makes it fit, is needed, and is the cheapest that does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from f2llm_ray.plan.cost import flops_per_token
from f2llm_ray.plan.memory import changes, fits, variants
from f2llm_ray.plan.stage_work import StageWork, stage_work
from f2llm_ray.recipe.files import load_recipe


def work_of(name: str, world: int = 8, *overrides: str) -> StageWork:
    return stage_work(load_recipe(f"f2llm-v2-{name}", overrides), "stage2", world)


@pytest.mark.parametrize("name", ["0.6b", "4b", "14b"])
@pytest.mark.parametrize("gpu_memory_bytes", [16e9, 24e9, 80e9, 640e9])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_changes_make_it_fit_and_each_is_needed(
    name: str, gpu_memory_bytes: float, checkpointing: str
) -> None:
    engine = "stages.stage2.engine"
    work = work_of(name, 8, f"{engine}.gradient_checkpointing={checkpointing}", f"{engine}.tokens_per_chunk=null")
    found = changes(work, gpu_memory_bytes)
    assert found is not None
    assert fits(replace(work, **found), gpu_memory_bytes)
    assert (not found) == fits(work, gpu_memory_bytes)
    for left_out in found:
        fewer = {key: value for key, value in found.items() if key != left_out}
        assert not fits(replace(work, **fewer), gpu_memory_bytes), f"{left_out} was not needed"


def test_where_no_setting_helps_it_says_so() -> None:
    work = work_of("14b")
    assert changes(work, 2e9) is None
    hardest = replace(work, zero_stage=3, offload=True, world=512, tokens_per_chunk=1024)
    assert not fits(hardest, 2e9)


def test_activations_that_do_not_fit_call_for_gradcache_and_not_for_gpus() -> None:
    work = replace(work_of("8b"), zero_stage=2, tokens_per_chunk=None)
    assert not fits(work, 80e9)
    assert changes(work, 80e9) == {"tokens_per_chunk": work.tokens_per_pass}


def test_the_cheapest_change_is_preferred() -> None:
    """Checkpointing takes less than a forward pass, GradCache nearly one; both only where neither is enough."""
    work = replace(work_of("0.6b"), gradient_checkpointing=False, tokens_per_chunk=None)
    chunk = work.tokens_per_pass
    wanted = {
        80e9: {"gradient_checkpointing": True},
        45e9: {"tokens_per_chunk": chunk},
        24e9: {"tokens_per_chunk": chunk, "gradient_checkpointing": True},
    }
    assert {memory: changes(work, memory) for memory in wanted} == wanted
    tokens = work.most_tokens_per_worker
    flops = [flops_per_token(replace(work, **changed), 1024, tokens) for changed in wanted.values()]
    assert flops == sorted(flops)


def test_the_variants_are_what_a_recipe_may_say() -> None:
    bf16 = [(each.zero_stage, each.offload) for each in variants(work_of("0.6b"))]
    assert bf16 == [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
    fp32 = [(each.zero_stage, each.offload) for each in variants(replace(work_of("0.6b"), float_bytes=4))]
    assert fp32 == [(0, False), *bf16]
