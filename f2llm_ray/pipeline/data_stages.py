"""The stages of data and evaluation sets, declared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.schema import TextPrompts
from f2llm_ray.evaluate.settings import EvaluationSet, SourceSet
from f2llm_ray.evaluate.tasks.registry import LABELLED
from f2llm_ray.evaluate.tasks.retrieval_set import FolderSet
from f2llm_ray.model.settings import Prune
from f2llm_ray.pipeline import jobs, work
from f2llm_ray.pipeline.stage_inputs import Sought, StageInputs, place_of, places
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile, Inputs, digests, files_of, prompt_inputs, tokenizer_inputs
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Facts, Stage, short_hash

SCREENED = "screened"
"""The setting of the prepare stage that holds which evaluation sets its rows were screened for."""


class DataStages:
    """Declares the evaluation sets, the prepared data, and what both have in common.

    With `rescreen` rows are screened for all sets, also for those that came after the data were prepared.
    """

    def __init__(self, recipe: Recipe, run: Run, inputs: StageInputs, *, rescreen: bool) -> None:
        self.recipe, self.run, self.inputs, self.rescreen = recipe, run, inputs, rescreen
        self.sets = {name: self._set(name, setting) for name, setting in recipe.evaluation.sets.items()}
        self.public = {name: self._public(name) for name in recipe.data.decontaminate.mteb}
        self.prepare = self._prepare()
        self.overlaps = {name: self._overlap(name) for name in self.sets if not self._is_screened(name)}

    def _set(self, name: str, setting: EvaluationSet) -> Stage:
        settings: dict[str, Any] = {"set": setting.identity()}
        if isinstance(setting, SourceSet):
            data = self.recipe.data.identity()
            settings["clean"] = {key: data[key] for key in ("min_chars", "max_chars", "filters")}
        sought = {"files": Sought(place_of(setting), partial(_set_files, name, setting))}
        return Stage(
            name=f"set-{name}",
            job=jobs.EVALUATE,
            settings=settings,
            inputs=self.inputs.find(f"set-{name}", sought),
            places=places(sought),
            implied=True,
            work=partial(work.make_set, name, setting, self.recipe.data),
        )

    def _public(self, task: str) -> Stage:
        """The texts of a task of mteb, for which rows are screened."""

        def files() -> list[InputFile]:
            from f2llm_ray.evaluate.mteb_texts import task_of, version_of

            return [InputFile(f"mteb:{task}", None, version_of(task_of(task)))]

        sought = {"task": Sought(task, files)}
        return Stage(
            name=f"mteb-{task}",
            job=jobs.PREPARE,
            settings={},
            inputs=self.inputs.find(f"mteb-{task}", sought),
            places=places(sought),
            implied=True,
            work=partial(work.write_mteb_texts, task),
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
            "prompts": recipe.prompts.identity(),
            "sources": {name: source.identity() for name, source in recipe.sources.items()},
            # Batches are drawn from them in turn, and the first one's instruction is the model's default prompt.
            "order": list(recipe.sources),
        }
        if self.public:
            settings["mteb"] = {name: stage.hash for name, stage in self.public.items()}
        sought = self._sought()
        inputs = self.inputs.find("prepare", sought)
        screened = self._screened_for(settings, inputs, wanted)
        needed = {name: self.sets[name] for name in wanted if screened == wanted}
        return Stage(
            name="prepare",
            job=jobs.PREPARE,
            settings=_with(settings, screened),
            inputs=inputs,
            places=places(sought),
            needs=(*needed.values(), *self.public.values()),
            work=partial(self._prepare_work, inputs, needed),
            accept=partial(_accept_bad_rows, data.on_bad_row),
        )

    def _sought(self) -> dict[str, Sought]:
        """What the data steps read."""
        recipe = self.recipe
        sought = {
            f"sources.{name}": Sought(place_of(source), partial(source.inputs, name))
            for name, source in recipe.sources.items()
        }
        if recipe.tokenizer.train_vocab is None:
            path = str(recipe.tokenizer.path or recipe.backbone.path)
            sought["tokenizer"] = Sought(path, lambda: tokenizer_inputs(path))
        brings = recipe.backbone.path
        if brings is not None and None in (recipe.prompts.query, recipe.prompts.document):
            sought["prompts"] = Sought(brings, lambda: prompt_inputs(str(brings)))
        model = None if recipe.data.language_id is None else recipe.data.language_id.model
        if model is not None:
            file = InputFile(Folder.at(model).uri, None)
            sought["language_id"] = Sought(model, lambda: [file])
        return sought

    def _screened_for(self, settings: Mapping[str, Any], inputs: Inputs, wanted: dict[str, str]) -> dict[str, str]:
        """The sets that the rows are screened for: those wanted, or those known when the data were prepared."""
        found = []
        for manifest in self.run.manifests("prepare"):
            screened = manifest["settings"][SCREENED]
            same = Stage(name="prepare", job=jobs.PREPARE, settings=_with(settings, screened), inputs=inputs)
            found += [dict(screened)] if same.hash == manifest["hash"] else []
        return wanted if self.rescreen or wanted in found or not found else found[0]

    def _prepare_work(self, inputs: Inputs, needed: Mapping[str, Stage], out: Folder) -> Facts:
        from f2llm_ray.data.prepare import Preparation, prepare
        from f2llm_ray.evaluate.mteb_texts import read_texts
        from f2llm_ray.evaluate.tasks.registry import read_task
        from f2llm_ray.report.data_card import write_card

        recipe = self.recipe
        prunes = {recipe.place_of(name): step for name, step in recipe.steps().items() if isinstance(step, Prune)}
        brought = work.check_backbone(recipe.backbone, recipe.model_tokens, prunes)
        task = Preparation(
            sources=recipe.sources,
            settings=recipe.data,
            tokenizer=recipe.tokenizer,
            backbone=recipe.backbone.path,
            prompts=TextPrompts(
                query=brought.query if recipe.prompts.query is None else recipe.prompts.query,
                document=brought.document if recipe.prompts.document is None else recipe.prompts.document,
            ),
            seed=recipe.seed,
            inputs=inputs,
            screened={
                **{name: read_task(self.run.folder(stage)).screened() for name, stage in needed.items()},
                **{f"mteb:{name}": read_texts(self.run.folder(stage)) for name, stage in self.public.items()},
            },
        )
        facts, card = prepare(task, out, self.run.root / "parts")
        write_card(out, {"name": recipe.name, "sources": work.source_labels(recipe.sources), **card})
        return facts

    def _overlap(self, name: str) -> Stage:
        settings = self.recipe.data.decontaminate

        def measure(out: Folder) -> Facts:
            prepared, found = self.run.folder(self.prepare), self.run.folder(self.sets[name])
            return work.measure_overlap(prepared, found, settings, out)

        return Stage(
            name=f"overlap-{name}",
            job=jobs.EVALUATE,
            settings=settings.identity(),
            parents={"prepared": self.prepare, "set": self.sets[name]},
            implied=True,
            work=measure,
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
    paths = filter(None, (getattr(setting, table, None) for table in LABELLED[setting.kind].columns))
    return [InputFile(Folder.at(path).uri, None) for path in paths]


def _with(settings: Mapping[str, Any], screened: Mapping[str, str]) -> dict[str, Any]:
    """The settings of prepared data that are screened for these sets; how is no matter where there are none."""
    some = screened or "mteb" in settings
    data = {key: value for key, value in settings["data"].items() if some or key != "decontaminate"}
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
