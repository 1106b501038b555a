"""The model card: README.md of each exported model folder, with the front matter that the Hugging Face hub reads.

It says what the report knows of the model, its weak languages first, and how to load it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.data.language import shortest
from f2llm_ray.model.checkpoint import INFO_FILE, ModelInfo, has_dense, load_info
from f2llm_ray.report.languages import named
from f2llm_ray.report.page import render_page
from f2llm_ray.report.read_scores import (
    Metrics,
    ModelEntry,
    RunReport,
    by_dim,
    by_language,
    dim_cell,
    interval,
    layer_tables,
    main_metric,
    metrics_of,
    mixed_entry,
    served_of,
    sets_of,
    source_cells,
)
from f2llm_ray.report.standing import standing_sentences
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
NO_LICENCE = "to-be-stated-by-the-publisher"
PLACEHOLDER = "MODEL_FOLDER"
"""What the examples call the model until it has a name on the hub (`export.publish`)."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEAKEST = 10
"""Languages of a set that the card names."""
HUB_METRICS = {"ndcg@10": "ndcg_at_10", "acc@1": "accuracy", "recall@10": "recall_at_10", "mrr@10": "mrr_at_10"}


def write_cards(root: Folder, report: RunReport) -> None:
    """Writes README.md into the folder of every model of a report that still exists."""
    for model in report.get("models") or []:
        folder = root / str(model.get("folder"))
        if model.get("folder") and folder.exists(INFO_FILE):
            card = model_card(report, model, load_info(folder), mapped=has_dense(folder))
            folder.write_bytes(CARD, card.encode("utf-8"))


def read_card(path: Path) -> ModelCard:
    """The card of a model folder, as huggingface_hub reads it.

    Raises:
        DataError: huggingface_hub is not installed.
        RunError: there is no card, or its front matter cannot be read.
    """
    hub = require("huggingface_hub", extra="datasets")
    if not path.is_file():
        raise RunError(f"{path}: there is no model card; `f2llm run` or `f2llm evaluate` writes it")
    try:
        card: ModelCard = hub.ModelCard.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path}: its front matter cannot be read: {error}") from None
    return card


def model_card(report: RunReport, model: ModelEntry, info: ModelInfo, *, mapped: bool = False) -> str:
    """The text of a model's card, from its entry in the report of its run and the facts of its folder.

    Args:
        report: of the run.
        model: its entry.
        info: the facts of its folder.
        mapped: whether a linear map follows its pooling, which transformers alone does not load.
    """
    sources = report.get("sources") or {}
    return render_page(
        "model_card.md.jinja",
        front=front_matter(report, model, info).to_yaml(),
        info=info,
        mapped=mapped,
        report=report,
        model=model,
        placeholder=PLACEHOLDER,
        query=repr(info.prompts.get("query", "") + "Passwort ändern"),
        document_prompt=repr(info.prompts.get("document", "")),
        standing=standing_sentences(report) if model is served_of(report) else [],
        quality=[
            [name, of, dim_cell(dim), metric, formatting.score(facts.get(metric)), interval(facts)]
            for name in sets_of([model])
            for metric in [main_metric([model], name)]
            for of, dim, facts in _scored(report, model, name)
        ],
        layers=layer_tables(model),
        weakest=[_weakest(model, name) for name in sets_of([model]) if by_language(model, name)],
        sources=source_cells({name: sources[name] for name in model.get("sources") or () if name in sources}),
    )


def front_matter(report: RunReport, model: ModelEntry, info: ModelInfo) -> ModelCardData:
    """What the hub reads: languages, licence, base model, tags, metrics and results."""
    hub = require("huggingface_hub", extra="datasets")
    languages = report.get("languages") or {}
    spoken = sorted({tag.split("-")[0] for tag in languages if re.fullmatch(r"[a-z]{2,3}(-.*)?", tag)})
    base = report.get("backbone")
    on_hub = isinstance(base, str) and HUB_NAME.fullmatch(base) and not Path(base).exists()
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka"]
    results = [
        hub.EvalResult(
            task_type="sentence-similarity",
            dataset_type=name,
            dataset_name=name,
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=f"{metric}, {dim} dims",
            metric_value=facts[metric],
        )
        for name in sets_of([model])
        for dim, facts in by_dim(model, name).items()
        for metric in metrics_of([model], name)
        if metric in facts
    ]
    card: ModelCardData = hub.ModelCardData(
        language=sorted({shortest(tag) for tag in spoken if tag not in {"und", "zxx", "mul"}}),
        # A licence cannot be worked out from those of the sources: who publishes the model names it.
        license="other",
        license_name=NO_LICENCE,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=[*tags, "code"] if any(tag.startswith("code:") for tag in languages) else tags,
        base_model=base if on_hub else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=info.name if results else None,
        eval_results=results or None,
    )
    return card


def _scored(report: RunReport, model: ModelEntry, name: str) -> Iterator[tuple[str, int, Metrics]]:
    """Whose score, dim and metrics on a set.

    The model's at every dim, that of its queries among its teacher's passages, then BM25's and the baselines'.
    """
    for dim, facts in by_dim(model, name).items():
        yield "this model", dim, facts
    for entry in filter(None, [mixed_entry(model, "its queries"), *(report.get("baselines") or [])]):
        for dim, facts in list(by_dim(entry, name).items())[:1]:
            yield str(entry.get("name")), dim, facts


def _weakest(model: ModelEntry, name: str) -> tuple[str, str, int, list[str]]:
    """A set, its main metric, how many languages it has, and those with the lowest scores."""
    found, main = by_language(model, name), main_metric([model], name)
    weakest = sorted(found.items(), key=lambda item: (item[1].get(main) or 0.0, item[0]))[:WEAKEST]
    languages = [
        f"{named(language)} {formatting.score(facts.get(main))} ({formatting.count(facts.get('queries'))} queries)"
        for language, facts in weakest
    ]
    return name, main, len(found), languages
