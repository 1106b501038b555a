"""An encoder that somebody brings goes through the whole pipeline: prompts, mean pooling, a cut vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.data.tokens.store import TokenStore, cut
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve import bulk
from f2llm_ray.serve.shards import EmbedJob
from tests.corpus import write_corpus
from tests.encoders import encoder_folder
from tests.tiny import LINES

PROMPTS = {"query": "query: ", "document": "passage: "}
LONGEST = 60
"""Tokens of the longest text that the models take; they are trained on 32."""


def recipe_of(folder: Path, backbone: Path, **changes: Any) -> Recipe:
    given = write_corpus(folder, rows=120)
    for name in ("labels", "clusters"):
        del given["sources"][name]
    given["tokenizer"], given["backbone"] = {}, {"path": str(backbone), "max_tokens": LONGEST}
    stage = {**given["stages"]["stage1"], "instructions": False, "max_steps": 4, "negatives": {}}
    given["stages"] = {"tuned": stage}
    given["prune"] = {"model": "tuned", "layers": [0, 2], "ffn": 24, "vocabulary": "used", "calibration_rows": 30}
    given["distill"] |= {"teacher": "tuned", "max_steps": 4, "instructions": False, "epochs": 1}
    given["quantize"] = {"models": ["distilled"]}
    given["compute"] = {"workers": 2, "cpus_per_worker": 0.5}
    return parse(Recipe, {**given, **changes}, "r")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    del ray_here
    folder = tmp_path_factory.mktemp("encoder")
    backbone = encoder_folder(folder / "backbone", "xlm-roberta", prompts=PROMPTS, layers=3)
    Pipeline(recipe_of(folder, backbone), str(folder / "root")).everything()
    return folder / "root"


def test_models_read_longer_texts_than_they_are_trained_on(finished: Path) -> None:
    for name in ("untrained", "tuned", "pruned", "distilled", "distilled-int8"):
        assert load_info(model_of(finished, name)).max_tokens == LONGEST


def model_of(root: Path, name: str) -> Path:
    (found,) = root.glob(f"{name}-[0-9a-f]*")
    return found / "model"


def test_every_text_is_tokenised_with_the_prompt_of_its_side(finished: Path) -> None:
    (prepared,) = finished.glob("prepare-*")
    assert json.loads((prepared / "prompts.json").read_text()) == PROMPTS
    store, tokenizer = TokenStore(prepared / "tokens"), load_tokenizer(prepared / "tokenizer")
    folder = Folder.at(str(prepared))
    table = (folder / "table").read_table("pairs.parquet")
    rows = {name: (folder / "rows").read_table(name) for name in (folder / "rows").files(".parquet")}
    assert len(table) > 50
    for side, prompt in (("query", "query: "), ("passage", "passage: ")):
        found = store.lookup(key_numbers(table[f"{side}_key"]))
        for tokens, piece, position in zip(
            found, table["piece"].to_pylist(), table["position"].to_pylist(), strict=True
        ):
            text = rows[f"{piece:06d}.parquet"][side][position].as_py()
            expected = cut(np.array(tokenizer.encode(prompt + text).ids, np.uint32), 32)
            assert tokens.tolist() == expected.tolist()
    assert tokenizer.encode("x").tokens[0] == "<s>"


def test_every_model_says_how_it_is_used(finished: Path) -> None:
    for name in ("untrained", "tuned", "pruned", "distilled", "distilled-int8"):
        info = load_info(model_of(finished, name))
        assert info.pooling == "mean"
        assert {side: info.prompts[side] for side in PROMPTS} == PROMPTS
    card = (model_of(finished, "distilled") / "README.md").read_text()
    assert "mean pooling" in card
    assert 'prompt_name="document"' in card


def test_sentence_transformers_gives_the_same_vectors_of_every_model(finished: Path) -> None:
    from sentence_transformers import SentenceTransformer

    for name in ("untrained", "tuned", "pruned", "distilled"):
        engine = Engine(model_of(finished, name))
        stock = SentenceTransformer(str(model_of(finished, name)), device="cpu")
        for side, prompt in PROMPTS.items():
            np.testing.assert_allclose(
                engine.embed(LINES, prompt=prompt), stock.encode(LINES, prompt_name=side), atol=1e-5
            )


def test_the_pruned_model_is_smaller_and_reads_its_corpus_alike(finished: Path) -> None:
    tuned, pruned = (
        json.loads((model_of(finished, name) / "config.json").read_text()) for name in ("tuned", "pruned")
    )
    assert (pruned["num_hidden_layers"], pruned["intermediate_size"]) == (2, 24)
    assert pruned["hidden_size"] == tuned["hidden_size"]
    assert pruned["vocab_size"] < tuned["vocab_size"]
    assert pruned["pad_token_id"] == tuned["pad_token_id"]
    report = json.loads((finished / "report.json").read_text())
    sizes = [model["parameters"] for model in report["models"] if model["name"] in ("tuned", "pruned")]
    assert sizes[1] < sizes[0]
    scores = {model["name"]: model["scores"]["held"] for model in report["models"]}
    assert scores.keys() >= {"untrained", "tuned", "pruned", "distilled", "distilled-int8"}


def test_the_report_holds_the_served_model_against_its_backbone(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert {(row["against"], row["kind"], row["model"]) for row in report["standing"]} == {
        ("bm25", "bm25", "distilled-int8"),
        ("untrained", "backbone", "distilled-int8"),
    }
    scores = {model["name"]: model["scores"]["held"]["32"]["ndcg@10"] for model in report["models"]}
    (gap,) = (row["difference"] for row in report["standing"] if row["kind"] == "backbone")
    assert gap == pytest.approx(scores["distilled-int8"] - scores["untrained"], abs=2e-6)
    card = (model_of(finished, "distilled-int8") / "README.md").read_text()
    assert "On held the served model distilled-int8 has ndcg@10" in card
    assert "its backbone (" in card


def test_bulk_embedding_takes_texts_for_passages(finished: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    model = model_of(finished, "distilled")
    job = EmbedJob(model=str(model), input=str(tmp_path / "in.jsonl"), column="text", output=str(tmp_path / "out"))
    assert bulk.run(job, workers=1)["prompt_name"] == "document"
    (shard,) = (tmp_path / "out").glob("*.parquet")
    found = np.stack(pq.read_table(shard)["embedding"].to_numpy())
    np.testing.assert_allclose(found, Engine(model).embed(LINES, prompt="passage: "), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"model": "tuned", "hidden": 16}}, r"prune\.hidden: .* cannot lose any: its LayerNorms"),
        ({"longest": 79}, r"backbone\.max_tokens: 79, but .* has positions for 78 tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_any_row_is_read(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    changes = dict(changes)
    backbone = encoder_folder(tmp_path / "backbone", "xlm-roberta", layers=3)
    longest = changes.pop("longest", LONGEST)
    recipe = recipe_of(tmp_path, backbone, **changes)
    recipe = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"max_tokens": longest})})
    pipeline = Pipeline(recipe, str(tmp_path / "root"))
    with pytest.raises(RunError, match=message):
        pipeline.stage(pipeline.graph.prepare)
    assert not list((tmp_path / "root").glob("prepare-*/rows/*"))
