"""From a recipe to its graph: every stage is declared here, once.

What the stages read from outside the run is looked at, so that the graph knows it by content; nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.base.progress import say
from f2llm_ray.base.section import Effect, Section
from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.evaluate.settings import EvaluationSet, SourceSet
from f2llm_ray.evaluate.tasks.retrieval_set import FolderSet
from f2llm_ray.model.settings import PARTS, Prune
from f2llm_ray.pipeline import work
from f2llm_ray.pipeline.graph import Graph, Kind, Model
from f2llm_ray.recipe.recipe import INT8, MERGED, UNTRAINED, Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import (
    InputFile,
    InputIndex,
    Inputs,
    KnownInput,
    digests,
    files_of,
    model_inputs,
    tokenizer_inputs,
)
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Facts, Stage, short_hash
from f2llm_ray.train.settings import Distill, TrainStage
from f2llm_ray.train.training import Training

PREPARE, MINE, TRAIN, PRUNE, TEACH, DISTILL, QUANTIZE, EVALUATE = (
    f"jobs/{name}.py" for name in ("prepare", "mine", "train", "prune", "teach", "distill", "quantize", "evaluate")
)
SCREENED = "screened"
"""The setting of the prepare stage that holds which evaluation sets its rows were screened for."""


def declare(recipe: Recipe, run: Run, *, rescreen: bool = False) -> Graph:
    """Declares all stages of a recipe.

    Args:
        recipe: the recipe.
        run: its root. Data that were prepared there before some evaluation sets came are used as they are.
        rescreen: prepare data again where sets came after them, so that their texts are not trained on.

    Raises:
        DataError: a file that the recipe names is not there, and nothing was made of it before.
    """
    return _Declaration(recipe, run, rescreen=rescreen).graph()


@dataclass(frozen=True)
class _Step:
    """What training and pruning start from."""

    name: str
    parent: Model


class _Declaration:
    def __init__(self, recipe: Recipe, run: Run, *, rescreen: bool) -> None:
        self.recipe, self.run, self.rescreen = recipe, run, rescreen
        self.index = InputIndex(run.root)
        self.models: dict[str, Model] = {}
        self.sets = {name: self._set(name, setting) for name, setting in recipe.evaluation.sets.items()}
        self.prepare = self._prepare()
        self.mined: Stage | None = None

    def graph(self) -> Graph:
        self._model(UNTRAINED, "untrained", None, (), self._untrained())
        for name, step in self.recipe.steps().items():
            self._mine()
            parent = self.models[step.model or list(self.recipe.made_from())[self._place(name) - 1]]
            if isinstance(step, Prune):
                self._model(name, "prune", parent, (), self._pruned(_Step(name, parent), step))
                continue
            kind: Kind = "distill" if isinstance(step, Distill) else "train"
            own = tuple(self.recipe.stage_sources(step))
            made = self._model(name, kind, parent, own, self._trained(_Step(name, parent), step))
            if step.merge is not None:
                self._model(name + MERGED, "merge", made, (), self._merged(made, step))
        self._mine()
        for name in () if self.recipe.quantize is None else self.recipe.quantize.models:
            made = self.models[name]
            self._model(name + INT8, "int8", made, (), self._quantized(made))
        sets = self.sets
        overlaps = {name: self._overlap(name) for name in sets if not self._is_screened(name)}
        evaluations = {
            (model.name, name): self._evaluation(model, name) for model in self.models.values() for name in sets
        }
        return Graph(
            recipe=self.recipe,
            prepare=self.prepare,
            mined=self.mined,
            models=self.models,
            sets=sets,
            overlaps=overlaps,
            evaluations=evaluations,
        )

    def _place(self, name: str) -> int:
        return list(self.recipe.made_from()).index(name)

    # Evaluation sets and data.

    def _set(self, name: str, setting: EvaluationSet) -> Stage:
        settings: dict[str, Any] = {"set": setting.identity()}
        if isinstance(setting, SourceSet):
            data = self.recipe.data.identity()
            settings["clean"] = {key: data[key] for key in ("min_chars", "max_chars", "filters")}
        return Stage(
            name=f"set-{name}",
            job=EVALUATE,
            settings=settings,
            inputs={"files": self._inputs(f"set-{name}", "files", setting, partial(_set_files, name, setting))},
            implied=True,
            work=lambda out: {
                **work.make_set(name, setting, self.recipe.data, out),
                "asked": {"files": _asked(setting)},
            },
        )

    def _screen_of(self, name: str) -> str:
        """What tells the texts of a set from any others; its instruction does not."""
        stage = self.sets[name]
        said = {key: value for key, value in stage.settings["set"].items() if key != "instruction"}
        if "source" in said:
            said["source"] = {key: value for key, value in said["source"].items() if key != "instruction"}
        return short_hash([said, stage.settings.get("clean"), digests(stage.inputs)])

    def _is_screened(self, name: str) -> bool:
        return self._screen_of(name) in self.prepare.settings[SCREENED].values()

    def _prepare(self) -> Stage:
        recipe, data = self.recipe, self.recipe.data
        wanted = {name: self._screen_of(name) for name, found in recipe.evaluation.sets.items() if found.screen}
        settings: dict[str, Any] = {
            "seed": recipe.seed,
            "data": data.identity(),
            "tokenizer": recipe.tokenizer.identity(),
            "sources": {name: source.identity() for name, source in recipe.sources.items()},
            # Batches are drawn from them in turn, and the first one's instruction is the model's default prompt.
            "order": list(recipe.sources),
        }
        inputs = self._prepare_inputs()
        screened = self._screened_for(settings, inputs, wanted)
        needed = {name: self.sets[name] for name in wanted if screened == wanted}
        return Stage(
            name="prepare",
            job=PREPARE,
            settings=_with(settings, screened),
            inputs=inputs,
            needs=tuple(needed.values()),
            work=partial(self._prepare_work, inputs, needed),
            accept=partial(_accept_bad_rows, data.on_bad_row),
        )

    def _prepare_inputs(self) -> Inputs:
        recipe, inputs = self.recipe, dict[str, tuple[KnownInput, ...]]()
        for name, source in recipe.sources.items():
            inputs[f"sources.{name}"] = self._inputs(
                "prepare", f"sources.{name}", source, partial(source.inputs, name)
            )
        tokenizer = recipe.tokenizer
        if tokenizer.train_vocab is None:
            path = str(tokenizer.path or recipe.backbone.path)
            owner: Section = tokenizer if tokenizer.given else recipe.backbone
            inputs["tokenizer"] = self._inputs("prepare", "tokenizer", owner, lambda: tokenizer_inputs(path))
        language_id = recipe.data.language_id
        if language_id is not None and language_id.model is not None:
            file = InputFile(Folder.at(language_id.model).uri, None)
            inputs["language_id"] = self._inputs("prepare", "language_id", language_id, lambda: [file])
        return inputs

    def _screened_for(self, settings: Mapping[str, Any], inputs: Inputs, wanted: dict[str, str]) -> dict[str, str]:
        """The sets that the rows are screened for: those wanted, or those known when the data were prepared."""
        found = []
        for manifest in self.run.manifests("prepare"):
            screened = manifest["settings"][SCREENED]
            same = Stage(name="prepare", job=PREPARE, settings=_with(settings, screened), inputs=inputs)
            found += [dict(screened)] if same.hash == manifest["hash"] else []
        return wanted if self.rescreen or wanted in found or not found else found[0]

    def _prepare_work(self, inputs: Inputs, needed: Mapping[str, Stage], out: Folder) -> Facts:
        from f2llm_ray.data.prepare import Preparation, prepare
        from f2llm_ray.evaluate.tasks.registry import read_task
        from f2llm_ray.report.data_card import write_card

        recipe = self.recipe
        task = Preparation(
            sources=recipe.sources,
            settings=recipe.data,
            tokenizer=recipe.tokenizer,
            backbone=recipe.backbone.path,
            seed=recipe.seed,
            inputs=inputs,
            screened={name: read_task(self.run.folder(stage)).screened() for name, stage in needed.items()},
        )
        facts, card = prepare(task, out, self.run.root / "parts")
        write_card(out, {"name": recipe.name, "sources": work.source_labels(recipe.sources), **card})
        asked = {f"sources.{name}": _asked(source) for name, source in recipe.sources.items()}
        return {**facts, "asked": asked}

    def _inputs(
        self, stage: str, role: str, owner: Section, files: Callable[[], list[InputFile]]
    ) -> tuple[KnownInput, ...]:
        """The inputs of a stage; where files are gone, those that a stage was made of before by the same settings.

        Raises:
            DataError: a file is not there, and no such stage is finished.
        """
        try:
            return self.index.known(files())
        except DataError as error:
            for manifest in self.run.manifests(stage):
                if manifest.get("asked", {}).get(role) == _asked(owner):
                    say(f"{error}; {stage}-{manifest['hash']} was made of it before and is used")
                    return tuple(KnownInput(**entry) for entry in manifest["inputs"][role])
            raise

    # Models.

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

    def _folder_of(self, model: str) -> Folder:
        """The model folder of a model of the run, or the one at a path."""
        known = self.models.get(model)
        return Folder.at(model) if known is None else self.run.folder(known.stage) / "model"

    def _model_name(self, name: str) -> str:
        return f"{self.recipe.name}-{name}"

    def _untrained(self) -> Stage:
        recipe, path = self.recipe, self.recipe.backbone.path
        inputs = {} if path is None else {"backbone": self.index.known(model_inputs(path))}
        backbone = recipe.backbone
        if path is not None and not inputs["backbone"]:
            raise RunError(f"backbone.path: {path} holds no model, expected config.json and safetensors weights")
        if path is not None and not inputs["backbone"][0].uri.startswith("hub:"):
            backbone = backbone.model_copy(update={"path": Folder.at(path).uri})  # workers stand in other folders
        return Stage(
            name=UNTRAINED,
            job=TRAIN,
            settings=backbone.identity(),
            inputs=inputs,
            parents={"prepared": self.prepare},
            implied=True,
            work=self._made(
                lambda out: work.on_worker(
                    work.make_untrained,
                    backbone,
                    recipe.seed,
                    model_name=self._model_name(UNTRAINED),
                    max_tokens=recipe.data.max_tokens,
                    prepared=self.run.folder(self.prepare),
                    out=out,
                )
            ),
        )

    def _mine(self) -> None:
        """Declares the mining as soon as the model that mines is among those made."""
        settings = self.recipe.mine
        if settings is None or self.mined is not None:
            return
        own = settings.model in self.recipe.made_from()
        if own and settings.model not in self.models:
            return
        parents = {"prepared": self.prepare}
        inputs: Inputs = {}
        if own:
            parents["model"] = self.models[settings.model].stage
        else:
            inputs = {"model": self._inputs("mined", "model", settings, lambda: model_inputs(settings.model))}
        sources = self.recipe.mined_sources()

        def mine(out: Folder) -> Facts:
            from f2llm_ray.mine.mine import mine

            prepared, model = self.run.folder(self.prepare), self._folder_of(settings.model)
            facts = mine(sources, settings, self.recipe.compute, prepared=prepared, model=model, out=out)
            return {"mining": facts, "asked": {"model": _asked(settings)}}

        self.mined = Stage(
            name="mined",
            job=MINE,
            settings={**settings.identity(), "sources": sources},
            inputs=inputs,
            parents=parents,
            implied=True,
            work=mine,
        )

    def _training(self, name: str, step: TrainStage) -> Training:
        recipe, facts = self.recipe, dict[str, SourceFacts]()
        for source in recipe.stage_sources(step):
            entry = recipe.sources[source]
            facts[source] = SourceFacts(entry.task, entry.query_instruction, entry.weight)
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

    def _trained(self, at: _Step, step: TrainStage) -> Stage:
        parents = {"prepared": self.prepare, "student": at.parent.stage}
        if self.mined is not None:
            parents["mined"] = self.mined
        inputs: Inputs = {}
        teacher: Folder | None = None
        if isinstance(step, Distill) and step.uses_teacher:
            if step.teacher_vectors == "cached":
                parents["taught"] = self._taught(at, step)
            else:
                teacher = self._folder_of(step.teacher)
                inputs = self._teacher(step, parents)
        training = self._training(at.name, step)
        measured = tuple(self.sets.values()) if training.sets else ()

        def train(out: Folder) -> Facts:
            from f2llm_ray.train.trainer import train

            folders = {role: self.run.folder(stage) for role, stage in parents.items()}
            return train(
                training,
                prepared=folders["prepared"],
                mined=folders.get("mined"),
                student=folders["student"] / "model",
                teacher=teacher,
                taught=folders.get("taught"),
                out=out,
            )

        return Stage(
            name=at.name,
            job=DISTILL if isinstance(step, Distill) else TRAIN,
            settings=self._training_settings(step),
            inputs=inputs,
            parents=parents,
            needs=measured,
            work=self._made(train),
        )

    def _teacher(self, step: Distill, parents: dict[str, Stage]) -> Inputs:
        """Adds the teacher to the parents where it is a model of the run; else its files are inputs."""
        if step.teacher in self.models:
            parents["teacher"] = self.models[step.teacher].stage
            return {}
        found = self.index.known(model_inputs(step.teacher))
        if not found:
            raise RunError(f"distill.teacher: {step.teacher} holds no model, expected config.json and weights")
        return {"teacher": found}

    def _taught(self, at: _Step, step: Distill) -> Stage:
        parents = {"prepared": self.prepare}
        inputs = self._teacher(step, parents)
        if self.mined is not None:
            parents["mined"] = self.mined
        settings = self._training_settings(step, lambda effect: effect.batches)
        # How wide the student is decides how many of the teacher's dims are kept, where only those count.
        settings["dims"] = self._width(at.parent) if step.teacher_is_cut else None
        recipe, training = self.recipe, self._training(at.name, step)

        def teach(out: Folder) -> Facts:
            from f2llm_ray.train.teacher import teach

            return {
                "teaching": teach(
                    training,
                    prepared=self.run.folder(self.prepare),
                    mined=None if "mined" not in parents else self.run.folder(parents["mined"]),
                    teacher=self._folder_of(step.teacher),
                    student=self.run.folder(at.parent.stage) / "model",
                    shards=recipe.data.shards,
                    instructions={name: source.query_instruction for name, source in recipe.sources.items()},
                    max_tokens=recipe.data.max_tokens,
                    out=out,
                )
            }

        return Stage(
            name=f"taught-{at.name}",
            job=TEACH,
            settings=settings,
            inputs=inputs,
            parents=parents,
            needs=(at.parent.stage,),
            implied=True,
            work=teach,
        )

    def _width(self, model: Model) -> Any:
        """The hidden size of a model, or the backbone that it comes from where no pruning names one."""
        cut = [step.hidden for step in self.recipe.prunes_of(model.name) if step.hidden is not None]
        untrained = self.models[UNTRAINED].stage
        return cut[-1] if cut else [untrained.settings, digests(untrained.inputs)]

    def _merged(self, trained: Model, step: TrainStage) -> Stage:
        settings, every = step.merge, step.checkpoint_every
        assert settings is not None  # noqa: S101 - called because the step merges
        name = self._model_name(trained.name + MERGED)

        def merge(out: Folder) -> Facts:
            from f2llm_ray.train.merge_checkpoints import merge_stage

            folder = self.run.folder(trained.stage)
            facts: Facts = work.on_worker(merge_stage, settings, folder, name, out, checkpoint_every=every)
            return facts

        return Stage(
            name=trained.name + MERGED,
            job=trained.stage.job,
            settings={**settings.identity(), "checkpoint_every": every},
            parents={"prepared": self.prepare, "trained": trained.stage},
            work=self._made(merge),
        )

    def _pruned(self, at: _Step, step: Prune) -> Stage:
        cut, recipe = step.identity(), self.recipe
        parent = self.run.folder(at.parent.stage) / "model"
        prepared = self.run.folder(self.prepare)
        parents = {"prepared": self.prepare, "parent": at.parent.stage}

        def score(out: Folder) -> Facts:
            from f2llm_ray.shrink.shrink import score_parts

            return score_parts(
                list(recipe.sources),
                step,
                recipe.compute,
                recipe.seed,
                prepared=prepared,
                parent=parent,
                out=out,
            )

        # A stage of its own, so that a recipe with another shape in the same root finds the scores.
        importance = Stage(
            name=f"importance-{at.parent.name}",
            job=PRUNE,
            settings={key: cut[key] for key in ("importance", "calibration_rows")},
            parents=parents,
            implied=True,
            work=score,
        )
        name = self._model_name(at.name)

        def prune(out: Folder) -> Facts:
            from f2llm_ray.shrink.shrink import shrink

            scored = self.run.folder(importance)
            facts: Facts = work.on_worker(
                shrink, step, name, prepared=prepared, parent=parent, scored=scored, out=out
            )
            return facts

        return Stage(
            name=at.name,
            job=PRUNE,
            settings={part: cut[part] for part in PARTS},
            parents={**parents, "importance": importance},
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
            job=QUANTIZE,
            settings={"embeddings": embeddings},
            parents={"prepared": self.prepare, "parent": made.stage},
            work=self._made(quantize),
        )

    # Evaluation.

    def _overlap(self, name: str) -> Stage:
        settings = self.recipe.data.decontaminate

        def measure(out: Folder) -> Facts:
            prepared, found = self.run.folder(self.prepare), self.run.folder(self.sets[name])
            return work.measure_overlap(prepared, found, settings, out)

        return Stage(
            name=f"overlap-{name}",
            job=EVALUATE,
            settings=settings.identity(),
            parents={"prepared": self.prepare, "set": self.sets[name]},
            implied=True,
            work=measure,
        )

    def _evaluation(self, model: Model, name: str) -> Stage:
        return Stage(
            name=f"evaluate-{model.name}-{name}",
            job=EVALUATE,
            settings={"divisors": list(self.recipe.evaluation.divisors)},
            parents={"model": model.stage, "set": self.sets[name]},
        )


def _set_files(name: str, setting: EvaluationSet) -> list[InputFile]:
    if isinstance(setting, SourceSet):
        return setting.source.inputs(name)
    if isinstance(setting, FolderSet):
        folder = Folder.at(setting.folder)
        inner = files_of(folder / "qrels", (".parquet", ".jsonl", ".tsv"))
        found = [*files_of(folder, (".parquet", ".jsonl", ".csv", ".tsv")), *inner]
        if not found:
            raise DataError(
                f"evaluation.sets.{name}: {folder.uri}: found no set there, expected queries and corpus"
            )
        return found
    paths = [getattr(setting, field) for field in ("train", "test") if getattr(setting, field, None)]
    return [InputFile(Folder.at(path).uri, None) for path in paths]


def _asked(section: Section) -> dict[str, Any]:
    """All settings of a section, places included, by which a finished stage knows what it was asked."""
    return section.identity(lambda _: True)


def _with(settings: Mapping[str, Any], screened: Mapping[str, str]) -> dict[str, Any]:
    """The settings of prepared data that are screened for these sets; how is no matter where there are none."""
    data = {key: value for key, value in settings["data"].items() if screened or key != "decontaminate"}
    return {**settings, "data": data, SCREENED: dict(screened)}


def _accept_bad_rows(on_bad_row: str, manifest: Facts) -> None:
    """Raises where rows were skipped when the data were prepared, and the recipe now says that none may be."""
    skipped = manifest["rows"][0]["dropped"]
    if on_bad_row == "error" and skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        raise DataError(
            f"prepare-{manifest['hash']}: malformed rows were skipped when the data were prepared ({reasons}), "
            'and data.on_bad_row is "error" now; mend the files, or set it to "skip"'
        )
