"""The work of stages that needs no room of its own, and how work is put on the cluster.

Whole models are loaded in Ray tasks, where there is memory for them, never in the process that walks the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.data.settings import Data, Decontamination
from f2llm_ray.engine.settings import Compute
from f2llm_ray.evaluate.settings import EvaluationSet, SourceSet
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet
from f2llm_ray.evaluate.tasks.task import Task
from f2llm_ray.model.settings import PAIRS, PARTS, Backbone, Prune
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.stage import Facts

if TYPE_CHECKING:
    from f2llm_ray.model.brought import Brought

CALIBRATION_ROWS = 512
CONTAMINATED = "contaminated.npy"
"""In an overlap stage's folder: whether the training rows hold what each unit of the set asks."""


def on_worker(
    function: Callable[..., Any], *arguments: Any, compute: Compute | None = None, **keywords: Any
) -> Any:
    """What a function gives in a Ray task; one with a GPU where the run has some and `compute` is given."""
    import ray

    gpus = 1 if compute is not None and compute.gpus_per_worker else 0
    return ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(function).remote(*arguments, **keywords))


def make_set(name: str, setting: EvaluationSet, settings: Data, out: Folder) -> Facts:
    """Writes an evaluation set into its stage's folder."""
    from f2llm_ray.data.read import read_pairs
    from f2llm_ray.evaluate.tasks.bitext import bitext_of_pairs
    from f2llm_ray.evaluate.tasks.registry import task_of
    from f2llm_ray.evaluate.tasks.retrieval_set import from_pairs

    if isinstance(setting, SourceSet):
        pairs = read_pairs(name, setting.source, settings, setting.passages)
        make = bitext_of_pairs if setting.kind == "bitext" else from_pairs
        task: Task = make(
            pairs,
            name=name,
            instruction=setting.source.query_instruction,
            max_queries=setting.max_queries,
        )
    else:
        task = task_of(name, setting)
    task.write(out)
    facts: Facts = {"kind": task.kind, "units": len(task.unit_texts())}
    if isinstance(task, RetrievalSet):
        characters = sum(map(len, task.corpus_texts))
        facts |= {"passages": len(task.corpus_texts), "characters": characters, "chance": task.chance()}
    return facts


def write_mteb_texts(task: str, out: Folder) -> Facts:
    """Writes the texts of a task of mteb that must not be trained on."""
    from f2llm_ray.evaluate.mteb_texts import write_texts

    return {"texts": write_texts(task, out)}


def measure_speed(model: Folder, found: Folder, compute: Compute, out: Folder) -> Facts:  # noqa: ARG001 - a stage's work
    """How long a model takes to embed one query of a set, with nothing else running here."""
    from f2llm_ray.evaluate.measure import query_ms_of

    return {"query_ms": on_worker(query_ms_of, model, found, compute.engine, compute=compute)}


def measure_mixed(
    model: Folder,
    teacher: Folder,
    found: Folder,
    out: Folder,
    *,
    divisors: Sequence[int],
    document: str | None,
    compute: Compute,
) -> Facts:
    """Scores a model's queries against the passages of the teacher in whose space it ends."""
    from f2llm_ray.evaluate.measure import measure_mixed

    result = on_worker(measure_mixed, model, teacher, found, divisors, document, out, compute=compute)
    return {"result": result}


def measure_overlap(prepared: Folder, found: Folder, settings: Decontamination, out: Folder) -> Facts:
    """Counts the training rows that hold a text of a set, and marks the units that they contaminate."""
    from f2llm_ray.data.overlap import find_overlap
    from f2llm_ray.evaluate.tasks.registry import read_task

    task = read_task(found)
    overlap = find_overlap(prepared, task.unit_texts(), task.screened(), settings)
    out.write_array(CONTAMINATED, overlap.units)
    return {"rows": overlap.rows, "queries": int(overlap.units.sum()), "of": len(overlap.units)}


def check_backbone(
    backbone: Backbone, max_tokens: int, prunes: Mapping[str, Prune] = MappingProxyType({})
) -> Brought:
    """What the backbone brings, with the pooling that the recipe names in place of its own.

    Args:
        backbone: the recipe's.
        max_tokens: of the longest text.
        prunes: what prunes it later on, by where the recipe says it.

    Raises:
        RunError: the engine cannot run it, it has no positions for so many tokens, or cannot lose what is pruned.
    """
    from f2llm_ray.model.brought import Brought, brought_by
    from f2llm_ray.model.families import refuse_cut

    brought = Brought("last") if backbone.path is None else brought_by(backbone.path)
    if brought.max_tokens is not None and max_tokens > brought.max_tokens:
        place = f"{'data' if backbone.max_tokens is None else 'backbone'}.max_tokens"
        has = f"{backbone.path} has positions for {brought.max_tokens} tokens"
        raise RunError(f"{place}: {max_tokens}, but {has}")
    for place, step in prunes.items():
        cut = [part for part in PARTS if getattr(step, part) is not None]
        refuse_cut(brought.cannot_cut, cut, place, str(backbone.path))
    return brought if backbone.pooling is None else replace(brought, pooling=backbone.pooling)


def make_untrained(
    backbone: Backbone,
    seed: int,
    *,
    sources: Sequence[str] = (),
    model_name: str,
    max_tokens: int,
    prepared: Folder,
    out: Folder,
) -> Facts:
    """Writes the model that the first step starts from: the backbone, or random weights, with the tokenizer.

    The sources are those whose pairs `embeddings_from: pairs` reads.

    Raises:
        RunError: the backbone cannot be loaded or trained, or has fewer entries than the tokenizer.
    """
    from f2llm_ray.data.drawn import pair_tokens
    from f2llm_ray.data.tokens.build import read_prompts
    from f2llm_ray.data.tokens.tokenizer import load_tokenizer
    from f2llm_ray.model.checkpoint import (
        INFO_FILE,
        ModelInfo,
        load_backbone,
        load_info,
        matryoshka_dims,
        save_model,
    )
    from f2llm_ray.model.dense import vector_dims
    from f2llm_ray.model.embeddings import take_embeddings
    from f2llm_ray.model.int8 import is_quantized
    from f2llm_ray.model.pair_embeddings import MOST_PAIRS, put_pair_embeddings
    from f2llm_ray.model.sizes import random_backbone

    path, brought, prompts = backbone.path, check_backbone(backbone, max_tokens), read_prompts(prepared)
    with (prepared / "tokenizer").as_local() as tokens:
        tokenizer = load_tokenizer(tokens)
    vocabulary = tokenizer.get_vocab_size()
    if backbone.shape is not None:
        model = random_backbone(backbone.shape, vocabulary, seed)
        if backbone.embeddings_from == PAIRS:
            queries, passages = pair_tokens(sources, seed, prepared, MOST_PAIRS)
            say(f"{model_name}: token vectors of {len(queries):,} pairs")
            put_pair_embeddings(model, queries, passages, seed)
        elif backbone.embeddings_from is not None:
            take_embeddings(model, backbone.embeddings_from, prepared / "tokenizer")
    else:
        if is_quantized(str(path)):
            raise RunError(
                f"backbone.path: {path} has int8 weights, which cannot be trained; give the model they are of"
            )
        model = load_backbone(str(path))
        if vocabulary > model.config.vocab_size:
            raise RunError(
                f"the tokenizer has {vocabulary} entries, the backbone {path!r} only {model.config.vocab_size}"
            )
    info = ModelInfo(
        name=model_name,
        dims=matryoshka_dims(vector_dims(model)),
        max_tokens=max_tokens,
        prompts=asdict(prompts),
        instructions=False,
        pooling=brought.pooling,
    )
    if path is not None and (Path(path) / INFO_FILE).is_file():
        # A model of another run: it keeps the dims and prompts that it was trained with.
        before = load_info(Path(path))
        kept = info.prompts if not before.instructions else {**before.prompts, "document": prompts.document}
        info = replace(before, name=info.name, max_tokens=max_tokens, prompts=kept, pooling=brought.pooling)
    with (out / "model").writing() as folder:
        save_model(folder, model, tokenizer, info)
    return {}


def finish_model(
    facts: Facts, sources: Sequence[str], seed: int, compute: Compute, prepared: Folder, out: Folder
) -> Facts:
    """Measures what serving needs of a model, int8 ranges and the vectors of the self-check, and its sizes."""
    on_worker(_calibrate, out / "model", prepared, tuple(sources), seed, compute=compute)
    return {**facts, **on_worker(_sizes, out / "model")}


def _calibrate(model: Folder, prepared: Folder, sources: Sequence[str], seed: int) -> None:
    import torch

    from f2llm_ray.data.drawn import calibration_tokens
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.engine.text_engine import calibrate, save_calibration
    from f2llm_ray.model.vocabulary import load_map, remap

    torch.set_num_threads(1)
    with model.as_local() as path:
        engine = Engine(path)
    tokens = remap(calibration_tokens(sources, seed, prepared, CALIBRATION_ROWS), load_map(model))
    save_calibration(model, calibrate(engine, tokens))


def _sizes(folder: Folder) -> Facts:
    from f2llm_ray.model.checkpoint import load_backbone
    from f2llm_ray.model.sizes import count_parameters

    with folder.as_local() as path:
        backbone = load_backbone(path)
        total, inside = count_parameters(backbone)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    depth = backbone.config.num_hidden_layers
    return {"parameters": total, "non_embedding_parameters": inside, "bytes": size, "layers": depth}


def source_labels(sources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task, licence and instruction of each source, for reports."""
    return {
        name: {"task": source.task, "licence": source.licence, "instruction": source.query_instruction}
        for name, source in sources.items()
    }
