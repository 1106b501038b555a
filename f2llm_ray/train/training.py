"""A training as plain values: what decides it, and the folders that its workers use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.data.batches.build import BatchPlan, build_batches
from f2llm_ray.data.batches.table import BatchTable
from f2llm_ray.data.schema import SourceFacts, TextPrompts
from f2llm_ray.engine.settings import Compute
from f2llm_ray.model.checkpoint import Space
from f2llm_ray.model.described import CONFIG_FILE
from f2llm_ray.model.families import family_of
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.lora import adapted
from f2llm_ray.train.settings import Distill, Tracking, TrainStage

RAY_TRAIN = "ray_train"
"""Folder of Ray Train's run, and of the checkpoints, in the stage's."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that decides a training, as plain values; it travels to every worker."""

    stage: str
    """Name of the stage; part of the seed of its batches."""
    model_name: str
    """Name of the model that it makes, "<recipe>-<stage>"."""
    run_name: str
    """The recipe's name, which trackers show."""
    settings: TrainStage | Distill
    sources: Mapping[str, SourceFacts]
    """The sources that the stage trains on, by name and in order."""
    seed: int
    compute: Compute
    tracking: Tracking = field(default_factory=Tracking)
    prompts: TextPrompts = field(default_factory=TextPrompts)
    """What the texts of the prepared data start with."""
    sets: Mapping[str, Folder] = field(default_factory=dict)
    """Evaluation sets that each checkpoint is measured on beside training; none where empty."""
    divisors: tuple[int, ...] = (1,)
    """Those sets are measured at the full dims divided by each of these."""
    ends: tuple[int, ...] | None = None
    """The dims of the teacher, smallest first, where the model ends in its space."""
    space: Space | None = None
    """That space by the name of the teacher, where it is a model folder."""

    def facts(self) -> dict[str, Any]:
        """What trackers keep with the values, as JSON values."""
        settings = self.settings.model_dump(mode="json")
        return {"recipe": self.run_name, "stage": self.stage, "seed": self.seed, **settings}


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a worker is given: the training and its folders."""

    training: Training
    student: Folder
    """The model folder that training starts from."""
    teacher: Folder | None
    """The model folder of a teacher that runs beside the student."""
    taught: Folder | None
    """The store of a cached teacher's vectors."""
    tokens: Folder
    """The token store."""
    batches: Folder
    """The stage's batch tables."""
    out: Folder
    """The stage's folder."""
    timed_seconds: float | None = None
    """Set where steps are only timed (`train/pace.py`): after so many seconds no further one is."""

    @property
    def label(self) -> str:
        """What its lines begin with: the name of the stage that is being made."""
        return self.training.stage if self.timed_seconds is None else f"pace-{self.training.stage}"

    @property
    def checkpoints(self) -> Folder:
        """The folder of the checkpoints."""
        return self.out / RAY_TRAIN

    @property
    def queue(self) -> str:
        """Name of the queue through which workers report to the driver."""
        return f"{self.training.stage}-{self.out.path.rsplit('/', 1)[-1]}"


def batch_plan(settings: TrainStage) -> BatchPlan:
    """The part of a stage's settings that its batch tables depend on."""
    return BatchPlan(
        epochs=settings.epochs,
        max_batches=None if settings.max_steps is None else settings.max_steps * settings.accumulate,
        held_out_batches=-(-settings.validation_rows // settings.global_batch),
        global_batch=settings.global_batch,
        negatives=settings.negatives,
        language_temperature=settings.language_temperature,
        length_window=settings.length_window,
        instructions=settings.instructions,
    )


def check_exits(training: Training, student: Folder) -> None:
    """Raises RunError where the student has too few layers for the exits that are to be trained."""
    has, exits = student.read_json(CONFIG_FILE)["num_hidden_layers"], training.settings.exits
    if any(layers >= has for layers in exits):
        raise RunError(
            f"stage {training.stage!r}: elastic.layers: found {list(exits)}, expected numbers below {has}, all "
            f"layers that {student.uri} has"
        )


def check_lora(training: Training, student: Folder) -> None:
    """Raises RunError where `lora.targets` names what the student does not have."""
    if training.settings.lora is not None:
        config = student.read_json(CONFIG_FILE)
        family, layers = family_of(config, student.uri), config["num_hidden_layers"]
        adapted(training.settings.lora, family, layers, f"stage {training.stage!r}", student.uri)


FEW_HELD_OUT = 20
"""Held-out rows below which a loss over them says little, and a score over as many candidates less."""


def check_held_out(training: Training, batches: Folder) -> None:
    """Looks whether there are held-out rows enough for what is asked of them, and says it where they are few.

    Raises:
        RunError: there are none, and `keep_best` goes by them.
    """
    with batches.as_local() as folder:
        table = BatchTable(folder / "validation", tuple(training.sources))
        parts = [table.batch(entry) for entry in table.order()]
    rows = {
        pair for part in parts for pair in zip(part["query"].to_pylist(), part["passage"].to_pylist(), strict=True)
    }
    if not rows and training.settings.keep_best:
        raise RunError(
            f"stage {training.stage!r}: keep_best needs held-out rows, and data.validation held none back; raise "
            "data.validation, or leave keep_best out"
        )
    if 0 < len(rows) < FEW_HELD_OUT:
        say(
            f"{training.stage}: only {len(rows)} held-out rows: validation loss and score say little; raise "
            "data.validation"
        )


def write_batches(training: Training, *, prepared: Folder, mined: Folder | None, out: Folder) -> None:
    """Writes the batch tables of a training into a folder, unless they are there."""
    if not out.exists("validation/order.npy"):
        say(f"{training.stage}: makes its batches")
        seed = f"{training.seed}/{training.stage}"
        plan = batch_plan(training.settings)
        epochs = build_batches(plan, training.sources, seed, prepared=prepared, mined=mined, out=out)
        if epochs > plan.epochs:
            say(f"{training.stage}: {training.settings.max_steps:,} steps take {epochs:,} epochs of its rows")
