"""The pipeline: how each stage of a recipe is run.

prepare -> untrained -> (contrastive stages) -> importance -> pruned -> distilled, and an evaluation of every
model. Where the recipe mines hard negatives, that stage comes after the model that mines, and all later training
uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from f2llm_ray.errors import RunError
from f2llm_ray.progress import say
from f2llm_ray.recipe import Recipe
from f2llm_ray.run import Folder, Run, Stage
from f2llm_ray.stages import DISTILLED, IMPORTANCE, INT8, MERGED, MINED, TAUGHT, plan
from f2llm_ray.train.settings import TrainStage

Work = Callable[[Folder], dict[str, Any]]


class Pipeline:
    """Runs stages of a recipe in a root; a finished stage is skipped and says so."""

    def __init__(self, recipe: Recipe, root: str) -> None:
        self.recipe, self.run, self.plan = recipe, Run(root), plan(recipe)

    def everything(self) -> dict[str, Any]:
        """Runs all stages and returns the report."""
        self.make()
        return self.report()

    def make(self) -> None:
        """Makes and evaluates every model of the recipe."""
        self.prepare()
        for name in self.plan.models:
            self.model(name)
        self.evaluate()

    def prepare(self) -> None:
        """Runs the data steps."""
        from f2llm_ray.data.prepare import prepare

        self._stage(self.plan.prepare, partial(prepare, self.recipe))

    def mine(self) -> None:
        """Mines hard negatives; what mines must be finished.

        Raises:
            RunError: the recipe has no `mine`, or the model that mines is not finished.
        """
        if self.plan.mined is None:
            raise RunError(f"recipe {self.recipe.name!r} has no section mine")
        self._stage(self.plan.mined, self._mined)

    def teach(self) -> None:
        """Computes the teacher's vectors for the distillation; the teacher must be finished.

        Raises:
            RunError: the recipe has no cached teacher, or it is not finished.
        """
        if self.plan.taught is None:
            raise RunError(f"recipe {self.recipe.name!r} has no distill whose teacher_vectors are cached")
        if self.plan.mined in self.plan.taught.parents:
            self.mine()
        self._stage(self.plan.taught, self._taught)

    def model(self, name: str) -> None:
        """Makes one model by its name in the plan, such as "untrained", that of a contrastive stage, "distilled".

        Negatives are mined first where it trains on them, and so are a cached teacher's vectors computed.

        Raises:
            RunError: what it is made from is not finished, or the recipe has no such model.
        """
        if name not in self.plan.models:
            raise RunError(
                f"recipe {self.recipe.name!r} makes no model {name!r}; it makes {list(self.plan.models)}"
            )
        if self.plan.mined in self.plan.models[name].parents:
            self.mine()
        if name == DISTILLED and self.plan.taught is not None:
            self.teach()
        if name == "pruned" and self.plan.importance is not None:
            self._stage(self.plan.importance, self._scored)
        work: Work
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
        self._stage(self.plan.models[name], partial(self._made, work))

    def train(self, name: str) -> None:
        """Runs one training by the name of its model, and merges its checkpoints where the recipe says so."""
        self.model(name)
        if name + MERGED in self.plan.models:
            self.model(name + MERGED)

    def evaluate(self) -> None:
        """Measures every model that is finished and not measured yet, side by side."""
        import ray

        from f2llm_ray.evaluate.measure import measure_folder
        from f2llm_ray.evaluate.speed import search_ms
        from f2llm_ray.model.checkpoint import read_info

        waiting = [
            (self.plan.evaluations[name], model)
            for name, model in self.plan.models.items()
            if name in self.plan.evaluations
            and self.run.manifest(model) is not None
            and not self._finished(self.plan.evaluations[name])
        ]
        if not waiting:
            return
        work = self.task(measure_folder)
        sets = self.run.folder(self.plan.prepare) / "sets"
        for stage, _ in waiting:
            say(f"{stage.name}: started")
        started = time.time()
        dims = {stage.name: read_info(self.run.folder(model) / "model").dims for stage, model in waiting}
        # Before the models are measured, while the machine is quiet, and in a process without torch: it and faiss
        # each bring an OpenMP.
        searches = ray.get(ray.remote(num_cpus=1)(search_ms).remote(sorted(set().union(*dims.values()))))
        pending = {
            work.remote(self.run.folder(model) / "model", sets, self.recipe, self.run.folder(stage)): stage
            for stage, model in waiting
        }
        while pending:
            (done,), _ = ray.wait(list(pending))
            stage = pending.pop(done)
            of_dims = {str(dim): searches[str(dim)] for dim in dims[stage.name]}
            manifest = self.run.finish(stage, started=started, **ray.get(done), search_ms=of_dims)
            say(f"{stage.name}: finished in {manifest['seconds']:.0f} s")

    def evaluate_folder(self, model: str) -> dict[str, Any]:
        """Scores of any model folder on the recipe's sets, by set and dim; the data must be prepared."""
        import ray

        from f2llm_ray.evaluate.measure import measure_folder

        sets = self.run.require(self.plan.prepare, "jobs/prepare.py") / "sets"
        found = ray.get(self.task(measure_folder).remote(Folder.at(model), sets, self.recipe))
        return {name: result["scores"] for name, result in found["results"].items()}

    def served_model(self) -> Folder:
        """Folder of the model that the recipe serves: the one it names, or the last one it makes.

        Raises:
            RunError: it is not finished.
        """
        name = self.recipe.serving.model or list(self.plan.models)[-1]
        return self.run.require(self.plan.models[name], _command(name)) / "model"

    def report(self) -> dict[str, Any]:
        """Collects the finished stages into report.json and report.html.

        Raises:
            RunError: the data steps are not finished.
        """
        from f2llm_ray.evaluate.collect import collect
        from f2llm_ray.evaluate.report import write_report

        self.run.require(self.plan.prepare, "jobs/prepare.py")
        report = collect(self.recipe, self.run, self.plan)
        write_report(self.run.root, report)
        return report

    def task(self, function: Callable[..., Any]) -> Any:
        """The function as a Ray task where a model can run."""
        import ray

        return ray.remote(num_cpus=1, num_gpus=1 if self.recipe.compute.gpus_per_worker else 0)(function)

    # The work of each kind of stage.

    def _made(self, work: Work, out: Folder) -> dict[str, Any]:
        """Makes a model, and measures what serving needs of it: int8 ranges and the vectors of the self-check."""
        import ray

        facts = work(out)
        prepared = self.run.folder(self.plan.prepare)
        ray.get(self.task(_calibrate).remote(out / "model", prepared, self.recipe))
        return {**facts, **model_facts(out / "model")}

    def _untrained(self, out: Folder) -> dict[str, Any]:
        from f2llm_ray.model.checkpoint import (
            INFO_FILE,
            ModelInfo,
            load_backbone,
            load_info,
            load_tokenizer,
            matryoshka_dims,
            save_model,
        )
        from f2llm_ray.model.sizes import random_backbone

        settings = self.recipe.backbone
        with (self.run.folder(self.plan.prepare) / "tokenizer").as_local() as folder:
            tokenizer = load_tokenizer(folder)
        vocabulary = tokenizer.get_vocab_size()
        if settings.shape is not None:
            backbone = random_backbone(settings.shape, vocabulary, self.recipe.seed)
        else:
            backbone = load_backbone(str(settings.path))
            if vocabulary > backbone.config.vocab_size:
                raise RunError(
                    f"the tokenizer has {vocabulary} entries, the backbone {settings.path!r} only "
                    f"{backbone.config.vocab_size}"
                )
        info = ModelInfo(
            name=f"{self.recipe.name}-untrained",
            dims=matryoshka_dims(backbone.config.hidden_size),
            max_tokens=self.recipe.data.max_tokens,
            prompts={"query": ""},
            instructions=False,
        )
        if settings.path is not None and (Path(settings.path) / INFO_FILE).is_file():
            # A model of another run: it keeps the dims and prompts that it was trained with.
            info = replace(load_info(Path(settings.path)), name=info.name, max_tokens=info.max_tokens)
        with (out / "model").writing() as path:
            save_model(path, backbone, tokenizer, info)
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
        from f2llm_ray.train.merging import merge_stage

        trained = name.removesuffix(MERGED)
        stage = self.recipe.distill if trained == DISTILLED else self.recipe.stages[trained]
        assert stage is not None  # noqa: S101 - plan() made the merge from it
        assert stage.merge is not None  # noqa: S101
        folder = self.run.folder(self.plan.models[trained])
        return merge_stage(stage.merge, folder, f"{self.recipe.name}-{name}", out)

    def _quantized(self, name: str, out: Folder) -> dict[str, Any]:
        import ray

        from f2llm_ray.model.quantize import quantize_model

        parent = self._model_folder(self.plan.models[name.removesuffix(INT8)])
        prepared = self.run.folder(self.plan.prepare)
        work = ray.remote(num_cpus=1)(quantize_model)
        facts: dict[str, Any] = ray.get(
            work.remote(self.recipe, f"{self.recipe.name}-{name}", prepared, parent, out)
        )
        return facts

    def _mined(self, out: Folder) -> dict[str, Any]:
        from f2llm_ray.data.mine import mine

        settings = self.recipe.mine
        assert settings is not None  # noqa: S101 - plan() made the stage from it
        model = self._folder_of(settings.model)
        return {"mining": mine(self.recipe, settings, self.run.folder(self.plan.prepare), model, out)}

    def _taught(self, out: Folder) -> dict[str, Any]:
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
                out=out,
            )
        }

    def _scored(self, out: Folder) -> dict[str, Any]:
        from f2llm_ray.model.shrink import score_parts

        return score_parts(self.recipe, self.run.folder(self.plan.prepare), self._pruned_from(), out)

    def _pruned(self, out: Folder) -> dict[str, Any]:
        from f2llm_ray.model.shrink import shrink

        assert self.plan.importance is not None  # noqa: S101 - plan() made it with this stage
        scored = self.run.folder(self.plan.importance)
        return shrink(self.recipe, self.run.folder(self.plan.prepare), self._pruned_from(), scored, out)

    def _pruned_from(self) -> Folder:
        assert self.recipe.prune is not None  # noqa: S101 - plan() made the stage from it
        return self._model_folder(self.plan.models[self.recipe.prune.model])

    # Running and skipping.

    def _stage(self, stage: Stage, work: Work) -> None:
        if self._finished(stage):
            return
        for parent in stage.parents:
            self.run.require(parent, _command(parent.name))
        say(f"{stage.name}: started")
        started = time.time()
        folder = self.run.folder(stage)
        folder.create()
        manifest = self.run.finish(stage, started=started, **work(folder))
        say(f"{stage.name}: finished in {manifest['seconds']:.0f} s")

    def _finished(self, stage: Stage) -> bool:
        manifest = self.run.manifest(stage)
        if manifest is not None:
            say(f"{stage.name}: finished before, skipped ({stage.folder_name})")
        return manifest is not None

    def _folder_of(self, model: str) -> Folder:
        """The model folder of a stage by its name, or the one at a path."""
        stage = self.plan.models.get(model)
        return Folder.at(model) if stage is None else self._model_folder(stage)

    def _model_folder(self, stage: Stage) -> Folder:
        return self.run.folder(stage) / "model"


def _command(stage: str) -> str:
    jobs = {
        "prepare": "jobs/prepare.py",
        MINED: "jobs/mine.py",
        IMPORTANCE: "jobs/prune.py",
        "pruned": "jobs/prune.py",
        TAUGHT: "jobs/teach.py",
        "distilled": "jobs/distill.py",
    }
    if stage.endswith(INT8):
        return "jobs/quantize.py"
    return jobs.get(stage, "jobs/train.py")


def _calibrate(model: Folder, prepared: Folder, recipe: Recipe) -> None:
    """Calibrates one model on 512 training rows, inside a Ray task."""
    import torch

    from f2llm_ray.model.shrink import calibration_tokens
    from f2llm_ray.model.vocabulary import load_map, remap
    from f2llm_ray.serve.calibrate import calibrate, save_calibration
    from f2llm_ray.serve.engine import Engine

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
