"""The stages that make models, declared: the backbone, then each step of the recipe from the model before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Effect
from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.model.checkpoint import check_family
from f2llm_ray.model.settings import PAIRS, PARTS, Prune, Soup
from f2llm_ray.pipeline import jobs, work
from f2llm_ray.pipeline.baselines import baseline_place
from f2llm_ray.pipeline.data_stages import DataStages
from f2llm_ray.pipeline.graph import Kind, Model
from f2llm_ray.pipeline.stage_inputs import Sought, StageInputs, places
from f2llm_ray.recipe.recipe import INT8, KEPT, MERGED, UNTRAINED, Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile, Inputs, digests, model_inputs
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Facts, Stage, short_hash
from f2llm_ray.train.settings import Distill, TrainStage, is_endpoint
from f2llm_ray.train.training import Training
from f2llm_ray.train.vector_table import table_files

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelStages:
    """Declares every model of a recipe, with mining, importance and cached teachers where they are needed."""

    def __init__(self, recipe: Recipe, run: Run, inputs: StageInputs, data: DataStages) -> None:
        self.recipe, self.run, self.inputs = recipe, run, inputs
        self.sets, self.prepare = data.sets, data.prepare
        self.models: dict[str, Model] = {}
        self.mined: Stage | None = None
        self.taught: dict[str, Stage] = {}
        """The last stage of each teacher's vectors, by all that they depend on but the texts."""
        self._model(UNTRAINED, "untrained", None, (), self._untrained())
        parents = recipe.made_from()
        for name, step in recipe.steps().items():
            self._mine()
            self._step(name, self.models[str(parents[name])], step)
        self._mine()
        for name in () if recipe.quantize is None else recipe.quantize.models:
            self._model(name + INT8, "int8", self.models[name], (), self._quantized(self.models[name]))

    def _step(self, name: str, parent: Model, step: TrainStage | Prune | Soup) -> None:
        if isinstance(step, Soup):
            made_of = [self.models[model] for model in step.models if model in self.models]
            sources = tuple(source for model in made_of for source in model.sources)
            self._model(name, "merge", parent, sources, self._souped(name, step))
            return
        if isinstance(step, Prune):
            self._model(name, "prune", parent, (), self._pruned(name, parent, step))
            return
        kind: Kind = "distill" if isinstance(step, Distill) else "train"
        own = tuple(self.recipe.stage_sources(step))
        made = self._model(name, kind, parent, own, self._trained(name, parent, step))
        if step.merge is not None:
            begun = None if step.lora is None else parent
            self._model(name + MERGED, "merge", made, (), self._merged(made, step, begun))

    def _model(self, name: str, kind: Kind, parent: Model | None, own: tuple[str, ...], stage: Stage) -> Model:
        seen = {*own, *(() if parent is None else parent.sources)}
        sources = tuple(source for source in self.recipe.sources if source in seen)
        self.models[name] = Model(name, kind, stage, None if parent is None else parent.name, sources)
        return self.models[name]

    def _made(self, make: Callable[[Folder], Facts]) -> Callable[[Folder], Facts]:
        """The work of a stage that makes a model."""

        def run(out: Folder) -> Facts:
            recipe, prepared = self.recipe, self.run.folder(self.prepare)
            return work.finish_model(make(out), list(recipe.sources), recipe.seed, recipe.compute, prepared, out)

        return run

    def folder_of(self, model: str) -> Folder:
        """The model folder of a model of the run, or the one at a path."""
        known = self.models.get(model)
        return Folder.at(model) if known is None else self.run.folder(known.stage) / "model"

    def _model_name(self, name: str) -> str:
        return f"{self.recipe.name}-{name}"

    def _untrained(self) -> Stage:
        recipe, path = self.recipe, self.recipe.backbone.path
        sought = {} if path is None else {"backbone": Sought(path, partial(_model_files, "backbone.path", path))}
        table, settings = recipe.backbone.embeddings_from, recipe.backbone.identity()
        if table == PAIRS:
            table, settings = None, {**settings, "embeddings_from": PAIRS}
        if table is not None:
            sought["embeddings"] = Sought(table, partial(_model_files, "backbone.embeddings_from", table))
        inputs, backbone = self.inputs.find(UNTRAINED, sought), recipe.backbone
        if table is not None:
            backbone = backbone.model_copy(update={"embeddings_from": Folder.at(table).uri})
        if path is not None and not inputs["backbone"][0].uri.startswith("hub:"):
            backbone = backbone.model_copy(update={"path": Folder.at(path).uri})  # workers stand in other folders
        return Stage(
            name=UNTRAINED,
            job=jobs.TRAIN,
            settings=settings,
            inputs=inputs,
            places=places(sought),
            parents={"prepared": self.prepare},
            implied=True,
            work=self._made(
                lambda out: work.on_worker(
                    work.make_untrained,
                    backbone,
                    recipe.seed,
                    sources=[n for n, source in recipe.sources.items() if source.task == "retrieval"]
                    or list(recipe.sources),
                    model_name=self._model_name(UNTRAINED),
                    max_tokens=recipe.model_tokens,
                    prepared=self.run.folder(self.prepare),
                    out=out,
                )
            ),
        )

    def _mine(self) -> None:
        """Declares the mining as soon as the models that mine and rescore are among those made."""
        settings = self.recipe.mine
        if settings is None or self.mined is not None:
            return
        roles = {"model": settings.model}
        if settings.rescore is not None:
            roles["rescore"] = settings.rescore
        own = {role: model for role, model in roles.items() if model in self.recipe.made_from()}
        if not all(model in self.models for model in own.values()):
            return
        files = {"model": _model_files, "rescore": _rescorer_files}
        parents = {"prepared": self.prepare, **{role: self.models[model].stage for role, model in own.items()}}
        sought = {
            role: Sought(model, partial(files[role], f"mine.{role}", model))
            for role, model in roles.items()
            if role not in own
        }
        rescorer = None if settings.rescore is None else self._rescorer(settings.rescore)
        instructions = {name: source.query_instruction for name, source in self.recipe.sources.items()}
        sources = self.recipe.mined_sources()

        def mine(out: Folder) -> Facts:
            from f2llm_ray.mine.mine import mine

            prepared, model = self.run.folder(self.prepare), self.folder_of(settings.model)
            facts = mine(
                sources,
                settings,
                self.recipe.compute,
                prepared=prepared,
                model=model,
                rescorer=rescorer,
                instructions=instructions,
                out=out,
            )
            return {"mining": facts}

        self.mined = Stage(
            name="mined",
            job=jobs.MINE,
            settings={**settings.identity(), "sources": sources},
            inputs=self.inputs.find("mined", sought),
            places=places(sought),
            parents=parents,
            implied=True,
            work=mine,
        )

    def _rescorer(self, model: str) -> Folder | str:
        """The folder of a model that scores again, or its name on the hub."""
        return self.folder_of(model) if model in self.models else baseline_place(model)

    def _training(self, name: str, step: TrainStage) -> Training:
        recipe, facts = self.recipe, dict[str, SourceFacts]()
        for source in recipe.stage_sources(step):
            entry = recipe.sources[source]
            facts[source] = SourceFacts(entry.task, entry.query_instruction, entry.weight, entry.scored)
        measured = self.sets if recipe.evaluation.during_training else {}
        return Training(
            stage=name,
            model_name=self._model_name(name),
            run_name=recipe.name,
            settings=step,
            sources=facts,
            seed=recipe.seed,
            compute=recipe.compute,
            tracking=recipe.tracking,
            sets={found: self.run.folder(stage) for found, stage in measured.items()},
            divisors=recipe.evaluation.divisors,
        )

    def _training_settings(
        self, step: TrainStage, counts: Callable[[Effect], bool] = lambda effect: effect.output
    ) -> dict[str, Any]:
        # The world size is not among them: any number of workers sees the same global batches.
        weights = {name: self.recipe.sources[name].weight for name in self.recipe.stage_sources(step)}
        return {**step.identity(counts), "weights": weights, "seed": self.recipe.seed}

    def _trained(self, name: str, parent: Model, step: TrainStage) -> Stage:
        parents = {"prepared": self.prepare, "student": parent.stage}
        if self.mined is not None:
            parents["mined"] = self.mined
        sought: dict[str, Sought] = {}
        teacher: Folder | None = None
        if isinstance(step, Distill) and step.uses_teacher and step.teacher_vectors == "online":
            teacher = self.folder_of(step.teacher)
            sought = self._teacher(step, parents)
        inputs = self.inputs.find(name, sought)
        paced = (
            None if step.max_minutes is None else self._paced(name, step, teacher, parents, inputs, places(sought))
        )
        if paced is not None:
            parents["pace"] = paced
        if isinstance(step, Distill) and step.uses_teacher and step.teacher_vectors == "cached":
            parents["taught"] = self._taught(name, parent, step, paced)
        joins = isinstance(step, Distill) and step.joins_teacher and step.teaches_by_model
        joined = self.folder_of(step.teacher) if isinstance(step, Distill) and joins else None
        training = self._training(name, step)
        measured = tuple(self.sets.values()) if training.sets else ()

        def train(out: Folder) -> Facts:
            from f2llm_ray.train.trainer import train

            folders = {role: self.run.folder(stage) for role, stage in parents.items()}
            facts = train(
                self._of_length(training, paced),
                prepared=folders["prepared"],
                mined=folders.get("mined"),
                student=folders["student"] / "model",
                teacher=teacher,
                taught=folders.get("taught"),
                joined=joined,
                out=out,
            )
            return facts if paced is None else {**facts, "pace": self._pace_of(paced)}

        return Stage(
            name=name,
            job=jobs.DISTILL if isinstance(step, Distill) else jobs.TRAIN,
            settings=self._training_settings(step),
            inputs=inputs,
            places=places(sought),
            parents=parents,
            needs=measured,
            work=self._made(train),
        )

    def _paced(
        self,
        name: str,
        step: TrainStage,
        teacher: Folder | None,
        parents: dict[str, Stage],
        inputs: Inputs,
        places: Mapping[str, Any],
    ) -> Stage:
        """The stage that finds how many steps fit into the training's minutes; its manifest fixes them."""
        training, parents = self._training(name, step), dict(parents)

        def time(out: Folder) -> Facts:
            from f2llm_ray.train.trainer import time_steps

            mined = parents.get("mined")
            return time_steps(
                training,
                prepared=self.run.folder(self.prepare),
                mined=None if mined is None else self.run.folder(mined),
                student=self.run.folder(parents["student"]) / "model",
                teacher=teacher,
                out=out,
            )

        return Stage(
            name=f"pace-{name}",
            job=jobs.DISTILL if isinstance(step, Distill) else jobs.TRAIN,
            settings={**self._training_settings(step), "max_minutes": step.max_minutes},
            inputs=inputs,
            places=places,
            parents=parents,
            implied=True,
            work=time,
        )

    def _pace_of(self, paced: Stage) -> Any:
        return (self.run.manifest(paced) or {})["pace"]

    def _of_length(self, training: Training, paced: Stage | None) -> Training:
        """A training with the number of steps that its pace fixed, where it has one; for when that is made."""
        if paced is None:
            return training
        length = {"max_steps": self._pace_of(paced)["steps"], "max_minutes": None}
        return replace(training, settings=training.settings.model_copy(update=length))

    def _teacher(self, step: Distill, parents: dict[str, Stage]) -> dict[str, Sought]:
        """Adds the teacher to the parents where it is a model of the run; else its files are inputs."""
        if step.teacher in self.models:
            parents["teacher"] = self.models[step.teacher].stage
            return {}
        return {"teacher": Sought(step.teacher, partial(_teacher_files, step))}

    def teacher(self, name: str, step: Distill, parents: dict[str, Stage]) -> tuple[Inputs, dict[str, list[str]]]:
        """The files of a teacher from outside the run as inputs of a stage; one of the run becomes a parent."""
        sought = self._teacher(step, parents)
        return self.inputs.find(name, sought), places(sought)

    def _taught(self, name: str, parent: Model, step: Distill, paced: Stage | None) -> Stage:
        parents = {"prepared": self.prepare}
        if paced is not None:
            parents["pace"] = paced
        sought = self._teacher(step, parents)
        if self.mined is not None:
            parents["mined"] = self.mined
        settings = self._training_settings(step, lambda effect: effect.batches)
        # How wide the student is decides how many of the teacher's dims are kept, where only those count.
        settings["dims"] = self._width(parent) if step.teacher_is_cut else None
        read = [step.teacher, step.teacher_prompts.model_dump(), step.instructions, settings["dims"]]
        earlier = self.taught.get(short_hash(read))
        recipe, training = self.recipe, self._training(name, step)
        teacher = self.folder_of(step.teacher) if step.teaches_by_model else step.teacher

        def teach(out: Folder) -> Facts:
            from f2llm_ray.train.teacher import teach

            return {
                "teaching": teach(
                    self._of_length(training, paced),
                    prepared=self.run.folder(self.prepare),
                    mined=None if "mined" not in parents else self.run.folder(parents["mined"]),
                    teacher=teacher,
                    student=self.run.folder(parent.stage) / "model",
                    shards=recipe.data.shards,
                    instructions={name: source.query_instruction for name, source in recipe.sources.items()},
                    max_tokens=recipe.data.max_tokens,
                    out=out,
                    earlier=None if earlier is None else self.run.folder(earlier),
                )
            }

        stage = Stage(
            name=f"taught-{name}",
            job=jobs.TEACH,
            settings=settings,
            inputs=self.inputs.find(f"taught-{name}", sought),
            places=places(sought),
            parents=parents,
            needs=(parent.stage, *(() if earlier is None else (earlier,))),
            implied=True,
            work=teach,
        )
        self.taught[short_hash(read)] = stage
        return stage

    def _width(self, model: Model) -> Any:
        """The hidden size of a model, or the backbone that it comes from where no pruning names one."""
        cut = [step.hidden for step in self.recipe.prunes_of(model.name) if step.hidden is not None]
        untrained = self.models[UNTRAINED].stage
        return cut[-1] if cut else [untrained.settings, digests(untrained.inputs)]

    def _merged(self, trained: Model, step: TrainStage, begun: Model | None) -> Stage:
        """The merging of a trained model; with LoRA also from the one that its training began from."""
        settings, every = step.merge, step.checkpoint_every
        assert settings is not None  # noqa: S101 - called because the step merges
        name = self._model_name(trained.name + MERGED)

        def merge(out: Folder) -> Facts:
            from f2llm_ray.train.merge_checkpoints import merge_stage

            folder = self.run.folder(trained.stage)
            student = None if begun is None else self.folder_of(begun.name)
            facts: Facts = work.on_worker(
                merge_stage, settings, folder, name, out, checkpoint_every=every, lora=step.lora, student=student
            )
            return facts

        return Stage(
            name=trained.name + MERGED,
            job=trained.stage.job,
            settings={**settings.identity(), "checkpoint_every": every},
            parents={
                "prepared": self.prepare,
                "trained": trained.stage,
                **({} if begun is None else {"before": begun.stage}),
            },
            work=self._made(merge),
        )

    def _souped(self, name: str, step: Soup) -> Stage:
        parents, sought = {"prepared": self.prepare}, dict[str, Sought]()
        for place, model in enumerate(step.models):
            if model in self.models:
                parents[f"model{place}"] = self.models[model].stage
            else:
                sought[f"model{place}"] = Sought(model, partial(_model_files, f"stages.{name}.models", model))
        folders = [self.folder_of(model) for model in step.models]

        def merge(out: Folder) -> Facts:
            from f2llm_ray.train.merge_models import merge_models

            facts: Facts = work.on_worker(merge_models, step, folders, self._model_name(name), out)
            return facts

        return Stage(
            name=name,
            job=jobs.TRAIN,
            settings=step.identity(),
            inputs=self.inputs.find(name, sought),
            places=places(sought),
            parents=parents,
            work=self._made(merge),
        )

    def _pruned(self, name: str, parent: Model, step: Prune) -> Stage:
        cut, recipe, model_name = step.identity(), self.recipe, self._model_name(name)
        prepared, model = self.run.folder(self.prepare), self.run.folder(parent.stage) / "model"
        parents = {"prepared": self.prepare, "parent": parent.stage}

        def score(out: Folder) -> Facts:
            from f2llm_ray.shrink.shrink import score_parts

            return score_parts(
                list(recipe.sources),
                step,
                recipe.compute,
                recipe.seed,
                prepared=prepared,
                parent=model,
                out=out,
            )

        # A stage of its own, so that a recipe with another shape in the same root finds the scores.
        importance = Stage(
            name=f"importance-{parent.name}",
            job=jobs.PRUNE,
            settings={key: cut[key] for key in ("importance", "calibration_rows")},
            parents=parents,
            implied=True,
            work=score,
        )

        def prune(out: Folder) -> Facts:
            from f2llm_ray.shrink.shrink import shrink

            scored = self.run.folder(importance)
            facts: Facts = work.on_worker(
                shrink,
                step,
                model_name,
                place=recipe.place_of(name),
                prepared=prepared,
                parent=model,
                scored=scored,
                out=out,
            )
            return facts

        return Stage(
            name=name,
            job=jobs.PRUNE,
            settings={part: cut[part] for part in PARTS},
            parents={**parents, "importance": importance},
            implied=name == KEPT,  # the backbone is made by whoever needs it, and so is what is kept of it
            work=self._made(prune),
        )

    def _quantized(self, made: Model) -> Stage:
        recipe = self.recipe
        assert recipe.quantize is not None  # noqa: S101 - called because the recipe quantizes
        embeddings, name = recipe.quantize.embeddings, self._model_name(made.name + INT8)

        def quantize(out: Folder) -> Facts:
            from f2llm_ray.shrink.quantize import quantize_model

            facts: Facts = work.on_worker(
                quantize_model,
                list(recipe.sources),
                recipe.seed,
                embeddings=embeddings,
                model_name=name,
                prepared=self.run.folder(self.prepare),
                parent=self.run.folder(made.stage) / "model",
                out=out,
            )
            return facts

        return Stage(
            name=made.name + INT8,
            job=jobs.QUANTIZE,
            settings={"embeddings": embeddings},
            parents={"prepared": self.prepare, "parent": made.stage},
            work=self._made(quantize),
        )


def _teacher_files(step: Distill) -> list[InputFile]:
    """What a teacher from outside the run is read from; the name of an endpoint stands for what it computes."""
    if step.teaches_by_model:
        return _model_files("distill.teacher", step.teacher)
    if is_endpoint(step.teacher):
        return [InputFile(step.teacher, None, step.teacher)]
    return table_files(step.teacher)


def _model_files(key: str, path: str) -> list[InputFile]:
    """The files of a model that the recipe names by a path.

    Raises:
        DataError: there are none.
        RunError: its family is not known here.
    """
    files = model_inputs(path)
    if not files or (files[0].version and not HUB_NAME.fullmatch(path)):
        raise DataError(f"{key}: {path}: found no model there, expected config.json and safetensors weights")
    if not files[0].version:
        check_family(Folder.at(path))
    return files


def _rescorer_files(key: str, path: str) -> list[InputFile]:
    """The files of a model that scores again, an embedding model or a cross-encoder of any family.

    Raises:
        DataError: there are none.
        RunError: they are of neither.
    """
    from f2llm_ray.engine.cross_encoder import kind_of

    files = model_inputs(path)
    if files and files[0].version and HUB_NAME.fullmatch(path):
        return files
    if not any(file.uri.endswith(".safetensors") for file in files):
        raise DataError(
            f"{key}: {path}: found no model there, expected a folder with config.json and safetensors weights, or "
            "OWNER/NAME on the hub"
        )
    kind_of(Folder.at(path))
    return files
