"""The work of each stage: from the finished stages before it to what its folder holds. `pipeline` says when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.pipeline.stages import DISTILLED, INT8, MERGED, Plan
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder, Run, Stage
from f2llm_ray.train.settings import TrainStage


@dataclass(frozen=True)
class Work:
    """What a recipe's stages do; each takes the folder that it fills and returns facts for the manifest."""

    recipe: Recipe
    run: Run
    plan: Plan

    def task(self, function: Callable[..., Any]) -> Any:
        """The function as a Ray task where a model can run."""
        import ray

        return ray.remote(num_cpus=1, num_gpus=1 if self.recipe.compute.gpus_per_worker else 0)(function)

    def _on_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives in a Ray task: whole models are loaded where there is memory, not on the head."""
        import ray

        return ray.get(ray.remote(num_cpus=1)(function).remote(*arguments))

    def prepare(self, out: Folder) -> dict[str, Any]:
        """The data steps."""
        from f2llm_ray.data.prepare import prepare

        return prepare(self.recipe, out)

    def mine(self, out: Folder) -> dict[str, Any]:
        """Hard negatives of the retrieval sources."""
        from f2llm_ray.mine.mine import mine

        settings = self.recipe.mine
        assert settings is not None  # noqa: S101 - plan() made the stage from it
        model = self._folder_of(settings.model)
        return {"mining": mine(self.recipe, settings, self.run.folder(self.plan.prepare), model, out)}

    def teach(self, out: Folder) -> dict[str, Any]:
        """The teacher's vectors of every distinct text in the distillation's batches."""
        from f2llm_ray.train.teacher import teach

        assert self.recipe.distill is not None  # noqa: S101 - plan() made the stage from it
        prepared = self.run.folder(self.plan.prepare)
        assert self.plan.taught is not None  # noqa: S101 - it is what runs
        mined = self.plan.mined if self.plan.mined in self.plan.taught.parents else None
        return {
            "teaching": teach(
                self.recipe,
                DISTILLED,
                prepared=prepared,
                mined=None if mined is None else self.run.folder(mined),
                teacher=self._folder_of(self.recipe.distill.teacher),
                parent=self._pruned_from(),
                out=out,
            )
        }

    def score(self, out: Folder) -> dict[str, Any]:
        """How much the parts of the model that is pruned matter."""
        from f2llm_ray.shrink.shrink import score_parts

        return score_parts(self.recipe, self.run.folder(self.plan.prepare), self._pruned_from(), out)

    def make(self, name: str, out: Folder) -> dict[str, Any]:
        """Makes a model, and measures what serving needs of it: int8 ranges and the vectors of the self-check."""
        import ray

        work: Callable[[Folder], dict[str, Any]]
        if name == "untrained":
            work = self._untrained
        elif name == "pruned":
            work = self._pruned
        elif name.endswith(MERGED):
            work = partial(self._merged, name)
        elif name.endswith(INT8):
            work = partial(self._quantized, name)
        else:
            work = partial(self._trained, name)
        facts = work(out)
        prepared = self.run.folder(self.plan.prepare)
        ray.get(self.task(_calibrate).remote(out / "model", prepared, self.recipe))
        return {**facts, **self._on_worker(model_facts, out / "model")}

    def _untrained(self, out: Folder) -> dict[str, Any]:
        path = self.recipe.backbone.path
        if path is not None and Path(path).exists():
            path = str(Path(path).absolute())  # a worker stands in another folder than we do
        self._on_worker(make_untrained, self.recipe, path, self.run.folder(self.plan.prepare), out)
        return {}

    def _trained(self, name: str, out: Folder) -> dict[str, Any]:
        from f2llm_ray.train.trainer import train

        stage: TrainStage
        parents = self.plan.models[name].parents
        student, teacher, taught = parents[1], None, None
        mined = self.plan.mined if self.plan.mined in parents else None
        if name == DISTILLED:
            assert self.recipe.distill is not None  # noqa: S101 - plan() made the stage from it
            stage = self.recipe.distill
            if self.plan.taught is not None:
                taught = self.run.folder(self.plan.taught)
            elif stage.uses_teacher:
                teacher = self._folder_of(stage.teacher)
        else:
            stage = self.recipe.stages[name]
        return train(
            self.recipe,
            name,
            stage,
            prepared=self.run.folder(self.plan.prepare),
            mined=None if mined is None else self.run.folder(mined),
            student=self._model_folder(student),
            teacher=teacher,
            taught=taught,
            out=out,
        )

    def _merged(self, name: str, out: Folder) -> dict[str, Any]:
        from f2llm_ray.train.merge_checkpoints import merge_stage

        trained = name.removesuffix(MERGED)
        stage = self.recipe.distill if trained == DISTILLED else self.recipe.stages[trained]
        assert stage is not None  # noqa: S101 - plan() made the merge from it
        assert stage.merge is not None  # noqa: S101
        folder = self.run.folder(self.plan.models[trained])
        facts: dict[str, Any] = self._on_worker(
            merge_stage, stage.merge, folder, f"{self.recipe.name}-{name}", out
        )
        return facts

    def _quantized(self, name: str, out: Folder) -> dict[str, Any]:
        from f2llm_ray.shrink.quantize import quantize_model

        parent = self._model_folder(self.plan.models[name.removesuffix(INT8)])
        prepared = self.run.folder(self.plan.prepare)
        model = f"{self.recipe.name}-{name}"
        facts: dict[str, Any] = self._on_worker(quantize_model, self.recipe, model, prepared, parent, out)
        return facts

    def _pruned(self, out: Folder) -> dict[str, Any]:
        from f2llm_ray.shrink.shrink import shrink

        assert self.plan.importance is not None  # noqa: S101 - plan() made it with this stage
        scored = self.run.folder(self.plan.importance)
        prepared = self.run.folder(self.plan.prepare)
        facts: dict[str, Any] = self._on_worker(shrink, self.recipe, prepared, self._pruned_from(), scored, out)
        return facts

    def _pruned_from(self) -> Folder:
        assert self.recipe.prune is not None  # noqa: S101 - plan() made the stage from it
        return self._model_folder(self.plan.models[self.recipe.prune.model])

    def _folder_of(self, model: str) -> Folder:
        """The model folder of a stage by its name, or the one at a path."""
        stage = self.plan.models.get(model)
        return Folder.at(model) if stage is None else self._model_folder(stage)

    def _model_folder(self, stage: Stage) -> Folder:
        return self.run.folder(stage) / "model"


def make_untrained(recipe: Recipe, path: str | None, prepared: Folder, out: Folder) -> None:
    """Writes the model that the first stage starts from: the backbone with the prepared tokenizer.

    Args:
        recipe: the run's recipe.
        path: the checkpoint of the backbone, None where the recipe gives a shape.
        prepared: folder of the prepare stage.
        out: folder that gets `model/`.

    Raises:
        RunError: the backbone cannot be loaded or trained, or has fewer entries than the tokenizer.
    """
    from f2llm_ray.data.tokens.tokenizer import load_tokenizer
    from f2llm_ray.model.checkpoint import (
        INFO_FILE,
        ModelInfo,
        load_backbone,
        load_info,
        matryoshka_dims,
        save_model,
    )
    from f2llm_ray.model.int8 import is_quantized
    from f2llm_ray.model.sizes import random_backbone

    shape = recipe.backbone.shape
    with (prepared / "tokenizer").as_local() as tokens:
        tokenizer = load_tokenizer(tokens)
    vocabulary = tokenizer.get_vocab_size()
    if shape is not None:
        backbone = random_backbone(shape, vocabulary, recipe.seed)
    else:
        if is_quantized(str(path)):
            raise RunError(
                f"backbone.path: {path} has int8 weights, which cannot be trained; give the model they are of"
            )
        backbone = load_backbone(str(path))
        if vocabulary > backbone.config.vocab_size:
            raise RunError(
                f"the tokenizer has {vocabulary} entries, the backbone {path!r} only {backbone.config.vocab_size}"
            )
    info = ModelInfo(
        name=f"{recipe.name}-untrained",
        dims=matryoshka_dims(backbone.config.hidden_size),
        max_tokens=recipe.data.max_tokens,
        prompts={"query": ""},
        instructions=False,
    )
    if path is not None and (Path(path) / INFO_FILE).is_file():
        # A model of another run: it keeps the dims and prompts that it was trained with.
        info = replace(load_info(Path(path)), name=info.name, max_tokens=info.max_tokens)
    with (out / "model").writing() as folder:
        save_model(folder, backbone, tokenizer, info)


def _calibrate(model: Folder, prepared: Folder, recipe: Recipe) -> None:
    """Calibrates one model on 512 training rows, inside a Ray task."""
    import torch

    from f2llm_ray.engine.calibration import calibrate, save_calibration
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.model.vocabulary import load_map, remap
    from f2llm_ray.shrink.shrink import calibration_tokens

    torch.set_num_threads(1)
    with model.as_local() as path:
        engine = Engine(path)
        table = load_map(path)
    tokens = remap(calibration_tokens(recipe, prepared, 512), table)
    save_calibration(model, calibrate(engine, tokens))


def model_facts(folder: Folder) -> dict[str, Any]:
    """Sizes of a model folder, read from its config and weights."""
    from f2llm_ray.model.checkpoint import load_backbone
    from f2llm_ray.model.sizes import count_parameters

    with folder.as_local() as path:
        total, layers = count_parameters(load_backbone(path))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"parameters": total, "non_embedding_parameters": layers, "bytes": size}
