"""A stage's plan: its numbers, with units in their names as `f2llm plan --json` prints them, and its lines."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.model.sizes import non_embedding_parameters, parameters
from f2llm_ray.plan.cost import cost, forward_flops_per_token
from f2llm_ray.plan.memory import USABLE, WORLD, changes, fits, host_bytes, memory, variants
from f2llm_ray.plan.stage_work import Cluster, CorpusSize, StageWork

GB = 1e9
PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "teacher")
NAME, CELL = 20, 13


def stage_numbers(work: StageWork, texts: CorpusSize, cluster: Cluster) -> dict[str, Any]:
    """All numbers of one stage."""
    memory_bytes = cluster.gpu_memory_bytes
    changed = changes(work, memory_bytes)
    return {
        "stage": work.stage,
        "parameters": parameters(work.shape, work.vocabulary),
        "non_embedding_parameters": non_embedding_parameters(work.shape),
        "adapter_parameters": work.adapter_parameters,
        "work": {
            **asdict(work),
            "shape": work.shape.model_dump(),
            "lora": work.lora and work.lora.model_dump(mode="json"),
            "teacher": work.teacher and {**asdict(work.teacher), "shape": work.teacher.shape.model_dump()},
            "most_tokens_per_worker": work.most_tokens_per_worker,
            "longest_chunk_tokens": work.longest_chunk_tokens,
            "chunks": work.chunks(work.most_tokens_per_worker),
        },
        "texts": asdict(texts),
        "cost": asdict(cost(work, texts, cluster)),
        "forward_flops_per_token": forward_flops_per_token(work.shape, texts.tokens_per_row / work.texts_per_row),
        "usable_bytes": USABLE * memory_bytes,
        "memory": [memory_numbers(each, memory_bytes) for each in variants(work)],
        "fits": fits(work, memory_bytes),
        "changes": changed,
        "changed_memory": memory_numbers(replace(work, **changed), memory_bytes) if changed else None,
    }


def memory_numbers(work: StageWork, gpu_memory_bytes: float) -> dict[str, Any]:
    """One row of the memory table."""
    parts = memory(work)
    return {
        "zero_stage": work.zero_stage,
        "offload": work.offload,
        **asdict(parts),
        "total_bytes": parts.total_bytes,
        "host_bytes": host_bytes(work),
        "fits": fits(work, gpu_memory_bytes),
    }


def table(numbers: dict[str, Any]) -> list[str]:
    """The lines of one stage, from its `stage_numbers`."""
    work = numbers["work"]
    precision = "bf16" if work["float_bytes"] == 2 else "fp32"
    checkpointing = ", gradient checkpointing" if work["gradient_checkpointing"] else ""
    counts = f"{numbers['parameters']:,} parameters, {numbers['non_embedding_parameters']:,} without embeddings"
    if work["lora"] is not None:
        counts += f", {numbers['adapter_parameters']:,} more that LoRA trains"
    head = f"{numbers['stage']}: {counts}; {precision}{checkpointing}"
    lines = [*_batch(numbers), "", *_memory(numbers), _verdict(numbers), "", *_costs(numbers)]
    return [head, *(f"  {line}".rstrip() for line in lines)]


def _batch(numbers: dict[str, Any]) -> list[str]:
    work = numbers["work"]
    batches = "" if work["accumulate"] == 1 else f", {work['accumulate']} of them to a step"
    texts = f"{work['rows_per_batch'] // work['world']:,} rows x {work['texts_per_row']} texts"
    most = f"{texts} x {work['longest_text_tokens']:,} tokens at most = {work['most_tokens_per_worker']:,}"
    held = "held together"
    if work["chunks"] > 1:
        held = f"{work['chunks']} chunks of at most {work['longest_chunk_tokens']:,} (GradCache)"
    return [f"batch:    {work['rows_per_batch']:,} rows{batches}", f"each GPU: {most}, {held}"]


def _memory(numbers: dict[str, Any]) -> list[str]:
    """The memory table without its empty columns; > marks the settings of the recipe."""
    work, rows = numbers["work"], list(numbers["memory"])
    names = [f"ZeRO {row['zero_stage']}{' + offload' if row['offload'] else ''}" for row in rows]
    own = [(row["zero_stage"], row["offload"]) == (work["zero_stage"], work["offload"]) for row in rows]
    names = [f"{'>' if marked else ' '} {name}" for name, marked in zip(names, own, strict=True)]
    if numbers["changed_memory"] is not None:
        rows.append(numbers["changed_memory"])
        names.append("  with the changes")
    columns = [*(part for part in PARTS if any(row[f"{part}_bytes"] for row in rows)), "total", "host"]
    lines = [f"{'GB on each GPU':<{NAME}}" + "".join(f"{column:>{CELL}}" for column in columns)]
    for name, row in zip(names, rows, strict=True):
        cells = "".join(f"{row[f'{column}_bytes'] / GB:>{CELL},.1f}" for column in columns)
        lines.append(f"{name:<{NAME}}{cells}{'  fits' if row['fits'] else ''}")
    if work["zero_stage"] < 3 and work["tokens_per_chunk"] is None:
        lines.append("ZeRO 3 takes every forward pass as a chunk of its own (GradCache).")
    return lines


def _verdict(numbers: dict[str, Any]) -> str:
    """Whether the recipe's settings (marked >) fit, and what to change if not."""
    room = f"{numbers['usable_bytes'] / GB:,.1f} GB"
    changed = numbers["changes"]
    if numbers["fits"]:
        return f"fits into {room}"
    if changed is None:
        return f"does not fit into {room}, whatever the engine: make global_batch or data.max_tokens smaller"
    steps = [
        f"{value} GPUs" if name == WORLD else f"engine.{name}: {json.dumps(value)}"
        for name, value in changed.items()
    ]
    return f"does not fit into {room}; it would with {formatting.listed(steps)}"


def _costs(numbers: dict[str, Any]) -> list[str]:
    texts, costs, epochs = numbers["texts"], numbers["cost"], numbers["work"]["epochs"]
    most = "" if texts["tokens_given"] else " at most"
    forward, training = numbers["forward_flops_per_token"] / 1e9, costs["flops_per_token"] / 1e9
    flops = f"{training:,.3g} GFLOPs each ({training / forward:.1f} times the forward pass)"
    lines = [f"step:  {costs['tokens_per_step']:,.0f} tokens{most}, {flops}"]
    if costs["hours"] is None:
        return [*lines, "time:  unknown, since a source has no cap; give --rows"]
    if texts["rows_per_epoch"] is not None:
        rows = f"{texts['rows_per_epoch']:,.0f} rows{'' if texts['rows_given'] else ' (the caps)'}"
        hours = formatting.duration(costs["hours_per_epoch"] * 3600)
        lines.append(f"epoch: {rows}, {hours}{most}; the recipe has {formatting.plural(epochs, 'epoch')}")
    lines.append(
        f"time:  {formatting.plural(costs['steps'], 'step')}, {formatting.duration(costs['hours'] * 3600)}{most}"
    )
    if costs["teacher_hours"] is not None:
        teacher = formatting.duration(costs["teacher_hours"] * 3600)
        lines.append(f"       and {teacher} at most for the teacher's vectors, once")
    if costs["price"] is not None:
        lines.append(f"cost:  {costs['price']:,.0f}{most}")
    return lines


def totals(stages: list[dict[str, Any]], cluster: Cluster) -> list[str]:
    """One line on all stages together."""
    costs = [numbers["cost"] for numbers in stages]
    if any(each["hours"] is None for each in costs):
        return ["all stages: unknown"]
    hours = sum(each["hours"] + (each["teacher_hours"] or 0) for each in costs)
    most = "" if all(numbers["texts"]["tokens_given"] for numbers in stages) else " at most"
    line = f"all stages: {formatting.duration(hours * 3600)} and {hours * cluster.world:,.0f} GPU-hours{most}"
    prices = [each["price"] for each in costs if each["price"] is not None]
    return [line + (f", {sum(prices):,.0f} at {cluster.price_per_gpu_hour:g} an hour" if prices else "")]
