"""The model card: README.md of each exported model folder, with the front matter that the Hugging Face hub reads.

It says what the report knows of the model, its weak languages first, and how to load it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import RunError
from f2llm_ray.model.checkpoint import INFO_FILE, ModelInfo, read_info
from f2llm_ray.report.scores import by_dim, by_language, interval, main_metric, metrics_of, sets_of
from f2llm_ray.run.folder import Folder

Facts = Mapping[str, Any]

CARD = "README.md"
NO_LICENCE = "to-be-stated-by-the-publisher"
PLACEHOLDER = "MODEL_FOLDER"
"""What the examples call the model until it has a name on the hub (`evaluate.publish`)."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEAKEST = 10
"""Languages of a set that the card names."""
HUB_METRICS = {"ndcg@10": "ndcg_at_10", "acc@1": "accuracy", "recall@10": "recall_at_10", "mrr@10": "mrr_at_10"}


def write_cards(root: Folder, report: Facts) -> list[str]:
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


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and the text below it.

    Raises:
        RunError: there is no card, or its front matter cannot be read.
    """
    if not path.is_file():
        raise RunError(f"{path}: there is no model card; jobs/pipeline.py or jobs/evaluate.py writes it")
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError as error:
        raise RunError(f"{path}: its front matter is not YAML: {error}") from None
    if not isinstance(front, dict):
        raise RunError(f"{path}: found no front matter, expected the hub's fields between two lines of ---")
    return front, parts[2]


def model_card(report: Facts, model: Facts, info: ModelInfo) -> str:
    """The text of a card.

    Args:
        report: the report of the run.
        model: the entry of the model there.
        info: the facts of its folder.
    """
    front = yaml.safe_dump(front_matter(report, model, info), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {info.name}",
        _summary(report, model, info),
        _usage(info),
        _quality(model),
        _weak(model),
        _data(trained_on(report, model)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(report: Facts, model: Facts, info: ModelInfo) -> dict[str, Any]:
    """What the hub reads: languages, licence, base model, data sets, tags, metrics and results."""
    languages = report.get("languages") or {}
    spoken = sorted({tag.split("-")[0] for tag in languages if re.fullmatch(r"[a-z]{2,3}(-.*)?", tag)})
    base = report.get("backbone")
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka"]
    # A licence cannot be worked out from those of the sources: whoever publishes the model names it.
    front: dict[str, Any] = {
        "language": [tag for tag in spoken if tag not in {"und", "zxx", "mul"}],
        "license": "other",
        "license_name": NO_LICENCE,
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": [*tags, "code"] if any(tag.startswith("code:") for tag in languages) else tags,
    }
    if isinstance(base, str) and HUB_NAME.fullmatch(base) and not Path(base).exists():
        front["base_model"] = base
    given = [facts.get("dataset") for facts in trained_on(report, model).values()]
    datasets = sorted({name for name in given if isinstance(name, str) and HUB_NAME.fullmatch(name)})
    if datasets:
        front["datasets"] = datasets
    results = [
        {
            "task": {"type": "sentence-similarity"},
            "dataset": {"name": name, "type": name},
            "metrics": [
                {"type": HUB_METRICS.get(metric, metric), "name": f"{metric}, {dim} dims", "value": facts[metric]}
                for dim, facts in by_dim(model, name).items()
                for metric in metrics_of([model], name)
                if metric in facts
            ],
        }
        for name in sets_of([model])
        if by_dim(model, name)
    ]
    if results:
        named = [metric for name in sets_of([model]) for metric in metrics_of([model], name)]
        front["metrics"] = list(dict.fromkeys(HUB_METRICS.get(metric, metric) for metric in named))
        front["model-index"] = [{"name": info.name, "results": results}]
    return front


def _summary(report: Facts, model: Facts, info: ModelInfo) -> str:
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


def _quality(model: Facts) -> str:
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


def _weak(model: Facts) -> str:
    parts = []
    for name in sets_of([model]):
        found, main = by_language(model, name), main_metric([model], name)
        if not found:
            continue
        weakest = sorted(found.items(), key=lambda item: (item[1].get(main) or 0.0, item[0]))[:WEAKEST]
        listed = ", ".join(
            f"{_plain(language)} {formatting.score(facts.get(main))} ({formatting.count(facts.get('queries'))} queries)"
            for language, facts in weakest
        )
        parts.append(f"- {_plain(name)} ({main}, the full dim), of {len(found)} languages: {listed}")
    if not parts:
        return "## Weak languages\n\nNot measured by language."
    return "## Weak languages\n\nThe lowest score first; a score over few queries is a rough one.\n\n" + "\n".join(
        parts
    )


def trained_on(report: Facts, model: Facts) -> dict[str, Facts]:
    """The sources that a model was trained on, and what the report says of each."""
    found = report.get("sources") or {}
    return {name: found[name] for name in model.get("sources") or () if name in found}


def _data(sources: Mapping[str, Facts]) -> str:
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
