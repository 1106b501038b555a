"""The model card: README.md of each exported model folder, with the front matter that the Hugging Face hub reads.

It says what the report knows of the model, its weak languages first, and how to load it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.model.checkpoint import INFO_FILE, ModelInfo, read_info
from f2llm_ray.report.read_scores import (
    ModelEntry,
    RunReport,
    by_dim,
    by_language,
    interval,
    main_metric,
    metrics_of,
    sets_of,
)
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


def write_cards(root: Folder, report: RunReport) -> list[str]:
    """Writes README.md into the folder of every model of a report; returns the folders.

    A folder that is not there any more, as of a run that was copied in part, is passed over: the report says
    nothing about weights.
    """
    written = []
    for model in report.get("models") or []:
        folder = root / str(model.get("folder"))
        if model.get("folder") and folder.exists(INFO_FILE):
            info = read_info(folder)
            folder.write_bytes(CARD, model_card(report, model, info).encode("utf-8"))
            written.append(folder.uri)
    return written


def read_card(path: Path) -> ModelCard:
    """The card of a model folder, as huggingface_hub reads it.

    Raises:
        DataError: huggingface_hub is not installed.
        RunError: there is no card, or its front matter cannot be read.
    """
    hub = require("huggingface_hub", extra="datasets")
    if not path.is_file():
        raise RunError(f"{path}: there is no model card; jobs/pipeline.py or jobs/evaluate.py writes it")
    try:
        card: ModelCard = hub.ModelCard.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path}: its front matter cannot be read: {error}") from None
    return card


def model_card(report: RunReport, model: ModelEntry, info: ModelInfo) -> str:
    """The text of a card.

    Args:
        report: the report of the run.
        model: the entry of the model there.
        info: the facts of its folder.
    """
    parts = [
        f"---\n{front_matter(report, model, info).to_yaml()}\n---",
        f"# {info.name}",
        _summary(report, model, info),
        _usage(info),
        _quality(model),
        _weak(model),
        _data(trained_on(report, model)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(report: RunReport, model: ModelEntry, info: ModelInfo) -> ModelCardData:
    """What the hub reads: languages, licence, base model, data sets, tags, metrics and results."""
    hub = require("huggingface_hub", extra="datasets")
    languages = report.get("languages") or {}
    spoken = sorted({tag.split("-")[0] for tag in languages if re.fullmatch(r"[a-z]{2,3}(-.*)?", tag)})
    base = report.get("backbone")
    on_hub = isinstance(base, str) and HUB_NAME.fullmatch(base) and not Path(base).exists()
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka"]
    given = [facts.get("dataset") for facts in trained_on(report, model).values()]
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
        language=[tag for tag in spoken if tag not in {"und", "zxx", "mul"}],
        # A licence cannot be worked out from those of the sources: who publishes the model names it.
        license="other",
        license_name=NO_LICENCE,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=[*tags, "code"] if any(tag.startswith("code:") for tag in languages) else tags,
        base_model=base if on_hub else None,
        datasets=sorted({name for name in given if isinstance(name, str) and HUB_NAME.fullmatch(name)}) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=info.name if results else None,
        eval_results=results or None,
    )
    return card


def _summary(report: RunReport, model: ModelEntry, info: ModelInfo) -> str:
    size = f"{formatting.count(model.get('parameters'))} parameters"
    outside = model.get("non_embedding_parameters")
    if outside is not None:
        size += f", {formatting.count(outside)} of them outside the embeddings"
    return (
        f"A text-embedding model made with f2llm_ray by the method of F2LLM-v2 (arXiv 2603.19223): "
        f"the model `{model.get('name')}` of the run `{report.get('name')}`, of {report.get('created')}.\n\n"
        f"- {size}\n"
        f"- dims: {', '.join(map(str, info.dims))}; shorter vectors are the first dims, normalised again\n"
        f"- longest text: {info.max_tokens:,} tokens\n"
        f"- last-token pooling, unit vectors, cosine"
    )


def _usage(info: ModelInfo) -> str:
    prompt = ', prompt_name="query"' if info.prompts.get("query") else ""
    before = info.prompts.get("query", "")
    texts = f"[{before + 'Passwort ändern'!r}]"
    return f"""## Use

With sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{PLACEHOLDER}", truncate_dim={info.dims[-1]})  # or any dim named above
queries = model.encode(["Passwort ändern"]{prompt}, normalize_embeddings=True)
passages = model.encode(["Change your password"], normalize_embeddings=True)
print(queries @ passages.T)
```

With transformers:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}")  # ends each text with EOS by itself
model = AutoModel.from_pretrained("{PLACEHOLDER}").eval()
batch = tokenizer({texts}, return_tensors="pt", padding=True, return_token_type_ids=False)
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
last = batch["attention_mask"].sum(1) - 1
vectors = torch.nn.functional.normalize(hidden[torch.arange(len(last)), last], dim=-1)
```

Behind an OpenAI-compatible endpoint:

```bash
serve run f2llm_ray.serve.app:build model={PLACEHOLDER}
curl http://127.0.0.1:8000/v1/embeddings -H 'Content-Type: application/json' \\
  -d '{{"input": ["Passwort ändern"], "model": "{info.name}", "prompt_name": "query"}}'
```"""


def _quality(model: ModelEntry) -> str:
    names = [name for name in sets_of([model]) if by_dim(model, name)]
    if not names:
        return "## Quality\n\nNot measured."
    lines = ["## Quality", "", "| set | dims | metric | | 95 % interval |", "|---|---|---|---|---|"]
    for name in names:
        main = main_metric([model], name)
        for dim, facts in by_dim(model, name).items():
            lines.append(
                f"| {_plain(name)} | {dim} | {main} | {formatting.score(facts.get(main))} | {interval(facts)} |"
            )
    return "\n".join(lines)


def _weak(model: ModelEntry) -> str:
    parts = []
    for name in sets_of([model]):
        found, main = by_language(model, name), main_metric([model], name)
        if not found:
            continue
        weakest = sorted(found.items(), key=lambda item: (item[1].get(main) or 0.0, item[0]))[:WEAKEST]
        listed = ", ".join(
            f"{_plain(language)} {formatting.score(facts.get(main))} "
            f"({formatting.count(facts.get('queries'))} queries)"
            for language, facts in weakest
        )
        parts.append(f"- {_plain(name)} ({main}, the full dim), of {len(found)} languages: {listed}")
    if not parts:
        return "## Weak languages\n\nNot measured by language."
    return "## Weak languages\n\nThe lowest score first; a score over few queries is a rough one.\n\n" + "\n".join(
        parts
    )


def trained_on(report: RunReport, model: ModelEntry) -> dict[str, Mapping[str, Any]]:
    """The sources that a model was trained on, and what the report says of each."""
    found = report.get("sources") or {}
    return {name: found[name] for name in model.get("sources") or () if name in found}


def _data(sources: Mapping[str, Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    lines = ["## Trained on", "", "| source | task | rows | licence |", "|---|---|---|---|"]
    lines += [
        f"| {_plain(name)} | {facts.get('task') or ''} | {formatting.count(facts.get('rows'))} "
        f"| {_plain(str(facts.get('licence') or 'not stated'))} |"
        for name, facts in sources.items()
    ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that neither ends a table's cell nor is markup."""
    return re.sub(r"([|`*_<>\[\]\\])", r"\\\1", text.replace("\n", " "))
