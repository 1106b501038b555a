"""Settings of the evaluation: the sets that models are measured on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator

from f2llm_ray.base.section import Content, Name, Neutral, Output, Section
from f2llm_ray.data.reading import Source
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION


class FolderSet(Section):
    """A retrieval set on disk in the BEIR layout: queries, corpus and qrels, each .parquet or .jsonl."""

    kind: Output[Literal["retrieval"]] = "retrieval"
    folder: Content[str]
    instruction: Output[str] = DEFAULT_INSTRUCTION["retrieval"]
    """Said before each query to models trained with instructions."""
    max_queries: Output[int | None] = Field(default=None, ge=1)
    """At most this many queries, drawn by content hash; the corpus stays whole."""


class SourceSet(Section):
    """A set made of the pairs of a source that is never trained on."""

    kind: Output[Literal["retrieval", "bitext"]] = "retrieval"
    """Retrieval: its queries against all its passages. Bitext: a query's passage is its translation, to be found
    among those of its language."""
    source: Source
    max_queries: Output[int | None] = Field(default=None, ge=1)
    """At most this many queries, drawn by content hash; the passages of the others stay in the search."""


class LabelledFile(Section):
    """A labelled set in a table, .parquet or .jsonl, by path or URI.

    A column `language` (ISO 639-3), where there is one, gives the scores by language.
    """

    kind: Output[Literal["bitext", "classification", "clustering", "sts", "pair_classification", "reranking"]]
    test: Content[str]
    instruction: Output[str]


class BitextSet(LabelledFile):
    """Texts (text_a), each with its translation (text_b), to be found among those of its language."""

    kind: Output[Literal["bitext"]]
    test: Content[str]
    """Table with the columns text_a and text_b."""
    instruction: Output[str] = "Retrieve translations of the following text."
    """Said before each text_a to models trained with instructions."""


class ClassificationSet(LabelledFile):
    """Labelled texts to fit a probe on and others to test it with."""

    kind: Output[Literal["classification"]]
    train: Content[str]
    """Table with the columns text and label, which the probes are fitted on."""
    test: Content[str]
    """Table with the columns text and label, which the probes are tested with; `train` has all its labels."""
    instruction: Output[str] = DEFAULT_INSTRUCTION["classification"]
    """Said before each text to models trained with instructions."""


class ClusteringSet(LabelledFile):
    """Labelled texts whose clusters are compared with their labels."""

    kind: Output[Literal["clustering"]]
    test: Content[str]
    """Table with the columns text and label; a language has at least two labels."""
    instruction: Output[str] = DEFAULT_INSTRUCTION["clustering"]
    """Said before each text to models trained with instructions."""


class StsSet(LabelledFile):
    """Pairs of texts with a grade of how alike they are."""

    kind: Output[Literal["sts"]]
    test: Content[str]
    """Table with the columns text_a, text_b and score, higher for more alike, on any scale."""
    instruction: Output[str] = "Retrieve semantically similar text."
    """Said before both texts to models trained with instructions."""


class PairClassificationSet(LabelledFile):
    """Pairs of texts that belong together or do not."""

    kind: Output[Literal["pair_classification"]]
    test: Content[str]
    """Table with the columns text_a, text_b and label, 1 or 0; a language has both."""
    instruction: Output[str] = "Retrieve semantically similar text."
    """Said before both texts to models trained with instructions."""


class RerankingSet(LabelledFile):
    """Queries, each with texts that answer it and texts that do not."""

    kind: Output[Literal["reranking"]]
    test: Content[str]
    """Table with the columns query, positive and negative, the latter two lists of texts."""
    instruction: Output[str] = DEFAULT_INSTRUCTION["retrieval"]
    """Said before each query to models trained with instructions."""


LABELLED = (BitextSet, ClassificationSet, ClusteringSet, StsSet, PairClassificationSet, RerankingSet)


def _section(value: Any) -> str | None:
    """Name of the section that an entry is: by what it reads from, else by its kind."""
    if not isinstance(value, dict):
        return type(value).__name__ if isinstance(value, Section) else None
    for key, section in (("folder", FolderSet), ("source", SourceSet)):
        if key in value:
            return section.__name__
    wanted = (
        found.__name__
        for found in LABELLED
        if value.get("kind") in get_args(found.model_fields["kind"].annotation)
    )
    return next(wanted, None)


EvaluationSet = Annotated[
    Annotated[FolderSet, Tag("FolderSet")]
    | Annotated[SourceSet, Tag("SourceSet")]
    | Annotated[BitextSet, Tag("BitextSet")]
    | Annotated[ClassificationSet, Tag("ClassificationSet")]
    | Annotated[ClusteringSet, Tag("ClusteringSet")]
    | Annotated[StsSet, Tag("StsSet")]
    | Annotated[PairClassificationSet, Tag("PairClassificationSet")]
    | Annotated[RerankingSet, Tag("RerankingSet")],
    Discriminator(
        _section,
        custom_error_type="evaluation_set",
        custom_error_message=(
            "expected a folder or a source, or a test file and its kind: bitext, classification, clustering, sts, "
            "pair_classification or reranking"
        ),
    ),
]


class Evaluation(Section):
    """What every model of the run is measured on."""

    sets: dict[Name, EvaluationSet] = {}
    """By name. Tables are .parquet or .jsonl, by path or URI; a column `language` (ISO 639-3) gives the scores by
    language."""
    divisors: Output[tuple[Annotated[int, Field(ge=1)], ...]] = (1, 2, 4, 8)
    """The dims measured, as d divided by these; 1, the whole d, is among them."""
    during_training: Neutral[bool] = False
    """Measure each checkpoint as well, in tasks beside training, on CPUs or GPUs that it leaves free."""

    @field_validator("divisors")
    @classmethod
    def _whole(cls, divisors: tuple[int, ...]) -> tuple[int, ...]:
        if 1 not in divisors:
            raise ValueError(f"found {list(divisors)}, expected 1, the whole d, among them")
        return divisors
