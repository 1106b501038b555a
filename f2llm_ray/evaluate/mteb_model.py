"""A model folder as mteb's encoder, with the instructions of the paper.

Shapes: n texts, d dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import mteb
import numpy as np
import yaml
from huggingface_hub import metadata_load
from mteb.abstasks.task_metadata import Licenses, TaskMetadata
from mteb.languages import ISO_TO_LANGUAGE
from mteb.languages.iso_mappings import _get_iso3_to_default_script as default_scripts
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import OutputDType, PromptType

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.language import UNKNOWN, iso639_3
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.names import EngineName
from f2llm_ray.evaluate.vectors import as_documents, as_queries
from f2llm_ray.model.checkpoint import fingerprint, load_backbone, load_info
from f2llm_ray.model.dims import Vectors
from f2llm_ray.model.sizes import count_parameters
from f2llm_ray.run.folder import Folder

SIMILAR = "Retrieve semantically similar text."
BY_TYPE: dict[str, str] = {
    "Retrieval": DEFAULT_INSTRUCTION["retrieval"],
    "InstructionRetrieval": DEFAULT_INSTRUCTION["retrieval"],
    "Reranking": DEFAULT_INSTRUCTION["retrieval"],
    "BitextMining": "Retrieve translations of the following text.",
    "Classification": DEFAULT_INSTRUCTION["classification"],
    "MultilabelClassification": DEFAULT_INSTRUCTION["classification"],
    "Clustering": DEFAULT_INSTRUCTION["clustering"],
}
"""Instructions by mteb's type of task, where the task has none of its own (paper)."""


PROMPTS = {"f2llm-v2": "codefuse-ai/F2LLM-v2-0.6B"}
"""Tables of instructions by task, by the model in mteb's registry that has them."""
Prompts = Mapping[str, str]
"""Instructions by mteb's name of a task, or of a type of tasks."""


def prompts_of(table: str) -> Prompts:
    """A table of instructions, from the mteb that is installed.

    Raises:
        RunError: there is no such table, or this mteb does not have it.
    """
    if table not in PROMPTS:
        raise RunError(f"prompts: found {table!r}, expected one of {sorted(PROMPTS)}")
    try:
        found = mteb.get_model_meta(PROMPTS[table]).loader_kwargs["prompts_dict"]
    except KeyError:
        raise RunError(
            f"prompts: the mteb that is installed ({mteb.__version__}) has no instructions of {PROMPTS[table]}; "
            "update it: pip install -U mteb"
        ) from None
    return cast("Prompts", found)


def instruction_of(task: TaskMetadata) -> str:
    """The instruction before the queries of a task: the task's own prompt, else that of its type.

    A type without an instruction in the paper gets the one for similar text.
    """
    own = task.prompt
    if isinstance(own, Mapping):
        own = own.get("query")
    return str(own or BY_TYPE.get(task.type, SIMILAR))


def model_meta(folder: Path) -> ModelMeta:
    """What mteb stores a model's results under: the name of the model, and its fingerprint as the revision.

    Languages, licence and base model are those of the folder's card, as far as mteb knows them.

    Raises:
        RunError: the folder is not a model folder, or its card cannot be read.
    """
    info, place = load_info(folder), Folder.at(str(folder))
    config = place.read_json("config.json")
    card = _front_matter(folder / "README.md")
    said = card.get("language") or []
    weights = folder / "model.safetensors"
    return ModelMeta(
        loader=None,
        loader_kwargs={},
        name=f"f2llm_ray/{info.name}",
        revision=fingerprint(place),
        release_date=None,
        languages=_languages([said] if isinstance(said, str) else said) or None,
        n_parameters=count_parameters(load_backbone(folder))[0],
        n_embedding_parameters=config["vocab_size"] * config["hidden_size"],
        memory_usage_mb=round(weights.stat().st_size / 2**20, 1) if weights.is_file() else None,
        max_tokens=info.max_tokens,
        embed_dim=list(info.dims),
        license=card["license"] if card.get("license") in get_args(Licenses) else None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Sentence Transformers", "Transformers", "safetensors"],
        similarity_fn_name="cosine",
        use_instructions=info.instructions,
        training_datasets=None,
        adapted_from=card.get("base_model"),
        output_dtypes=[OutputDType.FLOAT32],
    )


def _languages(codes: Iterable[str]) -> list[str]:
    """Languages as mteb writes them, such as deu-Latn, with the script that mteb takes for the usual one.

    Those that mteb does not know are left out.
    """
    scripts = default_scripts()
    known = (iso639_3(code) for code in codes)
    found = [code for code in known if code in ISO_TO_LANGUAGE and code != UNKNOWN and code in scripts]
    return list(dict.fromkeys(f"{code}-{scripts[code]}" for code in found))


class MtebEncoder(AbsEncoder):
    """mteb's encoder over the engine that serves: the same vectors, whatever mteb's batches are.

    Args:
        folder: the model folder.
        embed: gives the unit vectors [n, d] of texts; an engine in this process where unset.
        prompts: instructions by task that go before the task's own; those of the paper's types where unset.
    """

    def __init__(
        self,
        folder: Path,
        embed: Callable[[Sequence[str]], Vectors] | None = None,
        prompts: Prompts | None = None,
        engine: EngineName = "torch",
    ) -> None:
        self.info = load_info(folder)
        self.embed = Engine(folder, engine=engine).embed if embed is None else embed
        self.mteb_model_meta = model_meta(folder)
        self.prompts_dict = None if prompts is None else dict(prompts)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> Vectors:
        """Unit vectors [n, d] of the texts of all batches, in their order."""
        texts = [str(text) for batch in inputs for text in batch["text"]]
        if prompt_type is not None and prompt_type.value == "document":
            texts = as_documents(self, texts)
        elif self.prompts_dict is None:
            texts = as_queries(self, texts, instruction_of(task_metadata))
        else:
            texts = as_queries(self, texts, self.get_instruction(task_metadata, prompt_type))
        if not texts:
            return np.empty((0, self.info.dims[-1]), dtype=np.float32)
        return self.embed(texts)


def _front_matter(card: Path) -> dict[str, Any]:
    """What the front matter of a model card says; {} where there is no card."""
    try:
        return (metadata_load(card) or {}) if card.is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{card}: its front matter is not YAML: {error}") from None
