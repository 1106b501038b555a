"""A task: something that a model is measured on. Every kind of task is a class with the methods of `Task`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from f2llm_ray.base.section import Neutral, Section
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.evaluate.metrics.scores import Measured
from f2llm_ray.evaluate.metrics.weighted_metrics import Metrics
from f2llm_ray.evaluate.vectors import Embedder
from f2llm_ray.run.folder import Folder


class SetSection(Section):
    """What the recipe's entry of every set says, wherever the set comes from."""

    screen: Neutral[bool] = True
    """Training rows that hold a text of the set are left out. A set that comes after the data were prepared is
    measured as it is, and the report says how much of it was trained on; --rescreen prepares and trains again."""


class Task(Protocol):
    """What a model is measured on."""

    kind: ClassVar[str]
    metrics: ClassVar[Metrics]

    @property
    def name(self) -> str:
        """The set's name in the recipe and in the report."""

    @property
    def instruction(self) -> str:
        """Put before queries for models trained with instructions; "" for none."""

    def screened(self) -> Screened:
        """The texts that must not be trained on."""

    def unit_texts(self) -> list[tuple[str, ...]]:
        """The texts of each query, text or pair that must not have been trained on, in the order of the units."""

    def write(self, folder: Folder) -> None:
        """Writes the task for `read`: its tables, and kind, name and instruction as set.json, last."""

    @classmethod
    def read(cls, folder: Folder) -> Task:
        """Reads what `write` wrote.

        Raises:
            RunError: set.json is not there.
            DataError: a file is missing or does not hold this kind of task.
        """

    def measure(self, encoder: Embedder, divisors: Sequence[int]) -> Measured:
        """Encodes the task's texts once and scores them at several dims.

        Args:
            encoder: the model.
            divisors: the dims, as the model's d divided by these.

        Raises:
            RunError: the model returns vectors with NaN or infinity.
        """
