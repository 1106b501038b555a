"""A student that ends in its teacher's space, from training to the report: map, dims, facts and mixed scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.settings import Compute
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet
from f2llm_ray.model.checkpoint import fingerprint, load_backbone, load_info
from f2llm_ray.model.dense import dense_of
from f2llm_ray.model.vocabulary import load_map
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.report.read_scores import mixed_sentences
from f2llm_ray.report.terminal import terminal_table
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import checkpoints
from f2llm_ray.train.model_folder import trained_info
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.teacher_store import TeacherStore
from f2llm_ray.train.training import Training
from tests.corpus import write_corpus
from tests.encoders import encoder_folder

PROMPTS = {"query": "query: ", "document": "passage: "}
SOURCES = {"pairs": SourceFacts("retrieval", "")}
DIMS = 32
"""Of the teacher; the students have 16 channels."""


def recipe_of(folder: Path, teacher: Path, **changes: Any) -> Recipe:
    given = write_corpus(folder, rows=120)
    for name in ("labels", "clusters"):
        del given["sources"][name]
    given["tokenizer"] = {"path": str(teacher)}
    given["backbone"] = {
        "shape": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 32},
        "pooling": "mean",
        "embeddings_from": str(teacher),
    }
    training = {**given["stages"]["stage1"], "instructions": False, "epochs": 1, "negatives": {}}
    taught = {**training, "kind": "distill", "teacher": str(teacher), "space": "teacher", "cosine_weight": 1.0}
    given["stages"] = {
        "trimmed": {"kind": "prune", "vocabulary": "used", "calibration_rows": 20},
        # Its last checkpoint is the merged model's other half.
        "vectors": {
            **taught,
            "in_batch_weight": 0,
            "max_steps": 4,
            "checkpoint_every": 2,
            "keep_checkpoints": 2,
            "merge": {"last": 2},
        },
        "contrast": {**taught, "model": "vectors", "max_steps": 2},
        "smaller": {"kind": "prune", "model": "contrast", "hidden": 8, "calibration_rows": 20},
    }
    del given["prune"], given["distill"]
    given["quantize"] = {"models": ["contrast"]}
    given["serving"] = {"model": "contrast"}
    given["evaluation"]["divisors"] = [1, 2]
    given["evaluation"]["during_training"] = True
    return parse(Recipe, {**given, **changes}, "r")


@dataclass(frozen=True)
class Made:
    """A finished run and its teacher."""

    teacher: Path
    root: Path
    report: dict[str, Any]

    def stage(self, name: str) -> Path:
        (found,) = self.root.glob(f"{name}-[0-9a-f]*")
        return found

    def model(self, name: str) -> Path:
        return self.stage(name) / "model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Made:
    del ray_here
    folder = tmp_path_factory.mktemp("space")
    teacher = encoder_folder(folder / "teacher", "xlm-roberta", prompts=PROMPTS)
    report = Pipeline(recipe_of(folder, teacher), str(folder / "root")).everything()
    return Made(teacher, folder / "root", report)


@pytest.mark.slow
def test_models_say_where_they_end(made: Made) -> None:
    checksum = fingerprint(Folder.at(str(made.teacher)))
    for name in ("vectors", "vectors-merged", "contrast", "contrast-int8"):
        info = load_info(made.model(name))
        assert info.dims == (DIMS,), "the teacher has no other matryoshka dims"
        assert info.space is not None
        assert (info.space.model, info.space.checksum) == ("teacher", checksum)
        assert Engine(made.model(name)).embed(["one"]).shape == (1, DIMS)
    # Pruned, or trained on without the teacher, a model keeps its map, and is in the teacher's space no longer.
    smaller, contrast = (load_info(made.model(name)) for name in ("smaller", "contrast"))
    assert (smaller.space, smaller.dims) == (None, (DIMS,))
    assert Engine(made.model("smaller")).embed(["one"]).shape == (1, DIMS)
    maps = [load_map(Folder.at(str(made.model(name)))) for name in ("trimmed", "smaller")]
    assert maps[0] is not None
    assert maps[1] is not None, "the tokens of a trimmed model are read through its map, whatever is pruned after"
    assert (maps[0].first.tolist(), maps[0].ids.tolist()) == (maps[1].first.tolist(), maps[1].ids.tolist())
    step = TrainStage(instructions=False)
    training = Training(
        stage="on", model_name="on", run_name="r", settings=step, sources=SOURCES, seed=0, compute=Compute()
    )
    trained = trained_info(contrast, training)
    assert (trained.space, trained.dims) == (None, (8, 16, DIMS))
    assert load_info(made.model("trimmed")).dims == (8, 16)


@pytest.mark.slow
def test_the_second_phase_copies_the_vectors_of_the_first(made: Made) -> None:
    first, second = (
        json.loads((made.stage(f"taught-{name}") / "manifest.json").read_text())["teaching"]
        for name in ("vectors", "contrast")
    )
    stores = [TeacherStore(made.stage(f"taught-{name}") / "vectors") for name in ("vectors", "contrast")]
    keys = np.concatenate(
        [np.load(path).T for path in sorted((made.stage("taught-contrast") / "vectors").glob("*.keys.npy"))]
    )
    copied_nd, there_n = stores[0].known(keys)
    assert there_n.any()
    assert second["encoded_texts"] == second["texts"] - int(there_n.sum()) < second["texts"]
    np.testing.assert_array_equal(stores[1].lookup(keys)[there_n], copied_nd[there_n])
    assert first["encoded_texts"] == first["texts"]


@pytest.mark.slow
def test_the_exported_map_is_the_one_that_was_trained(made: Made) -> None:
    """The last checkpoint is of step 2 of 4, and the merged model the mean of both: so is its map."""
    last, merged = (
        load_file(made.model(name) / "2_Dense" / "model.safetensors") for name in ("vectors", "vectors-merged")
    )
    found = {c.step: c for c in checkpoints.listed(Folder.at(str(made.stage("vectors") / "ray_train")))}
    with checkpoints.weights(found[2]) as read:
        for name, value in last.items():
            own = name.replace("linear.", "dense.")
            trained = read(own, torch.full_like(value, torch.nan))
            assert not torch.equal(trained, value), "two more steps moved it"
            torch.testing.assert_close(merged[name], (trained + value) / 2, rtol=0, atol=1e-7)
    assert last["linear.bias"].any()


@pytest.mark.slow
def test_the_map_is_a_part_of_the_vectors_of_every_loader(made: Made) -> None:
    from sentence_transformers import SentenceTransformer

    folder, texts = made.model("contrast"), ["balan", "kovor mizik", ""]
    engine = Engine(folder)
    backbone, tokens = load_backbone(folder).double(), engine.tokenize(texts)
    dense = dense_of(backbone)
    assert dense is not None
    with torch.no_grad():
        vectors_nd = normalize(encode(backbone, tokens, pooling="mean", tokens_per_pass=64), dim=1)
        del backbone.dense
        pooled_nd = encode(backbone, tokens, pooling="mean", tokens_per_pass=64)
    weights = {name: w.double() for name, w in load_file(folder / "2_Dense" / "model.safetensors").items()}
    by_hand = normalize(pooled_nd @ weights["linear.weight"].T + weights["linear.bias"], dim=1)
    torch.testing.assert_close(vectors_nd, by_hand, rtol=0, atol=1e-12)
    theirs = SentenceTransformer(str(folder), device="cpu").double().encode(texts, prompt="")
    np.testing.assert_allclose(theirs, by_hand.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(engine.embed(texts), by_hand.numpy(), atol=1e-5)


@pytest.mark.slow
def test_mixed_scores_are_the_brute_force_ones(made: Made) -> None:
    held = RetrievalSet.read(Folder.at(str(made.stage("set-held"))))
    student, teacher = Engine(made.model("contrast")), Engine(made.teacher)
    query_qd = student.embed(held.query_texts, prompt=student.info.prompts["query"]).astype(np.float64)
    passage_cd = teacher.embed(held.corpus_texts, prompt="passage: ").astype(np.float64)
    relevant = {(int(query), int(passage)) for query, passage in held.relevant}
    entry = next(model for model in made.report["models"] if model["name"] == "contrast")
    assert entry["mixed"]["teacher"] == "teacher"
    for dim in (DIMS, DIMS // 2):
        scores_qc = (
            normalize(torch.from_numpy(query_qd[:, :dim])) @ normalize(torch.from_numpy(passage_cd[:, :dim])).T
        )
        gains = []
        for query, row_c in enumerate(scores_qc.numpy()):
            top = np.argsort(-row_c, kind="stable")[:10]
            gained = sum(
                (query, int(passage)) in relevant and 1 / np.log2(at + 2) for at, passage in enumerate(top)
            )
            right = sum(1 for asked, _ in relevant if asked == query)
            gains.append(gained / sum(1 / np.log2(at + 2) for at in range(min(right, 10))))
        assert entry["mixed"]["scores"]["held"][str(dim)]["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-3)


@pytest.mark.slow
def test_reports_and_cards_name_the_teacher(made: Made) -> None:
    measured = [model["name"] for model in made.report["models"] if "mixed" in model]
    assert measured == ["vectors", "vectors-merged", "contrast", "contrast-int8"]
    name = "queries of contrast, passages of teacher"
    assert any(sentence.startswith(f"{name}: ndcg@10 0.") for sentence in mixed_sentences(made.report))
    assert name in terminal_table(made.report)
    assert name in (made.root / "report.html").read_text()
    card = (made.model("contrast") / "README.md").read_text()
    checksum = fingerprint(Folder.at(str(made.teacher)))
    assert f"the space of teacher (checksum {checksum}): its queries may search" in card
    assert "| its queries, passages of teacher | 32 |" in card
    assert "AutoModel.from_pretrained" not in card, "it would give vectors without the map"
    assert "AutoModel.from_pretrained" in (made.model("trimmed") / "README.md").read_text()
    scores = json.loads((made.stage("vectors") / "checkpoint_scores.json").read_text())
    assert [step for step, _ in scores["ndcg@10 on held"]] == [2], "checkpoints are measured with their map"


@pytest.mark.slow
def test_a_finished_run_measures_nothing_again(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline(recipe_of(made.root.parent, made.teacher), str(made.root))
    pipeline.everything()
    assert ": started" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mse_weight": 0, "similarity_weight": 1}, "space: teacher needs mse_weight or cosine_weight above 0"),
        ({"projection": True}, "projection: space teacher has its own map"),
        ({"space": "theirs"}, "space"),
    ],
)
def test_what_does_not_end_there_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    distill = {"teacher": "a/b", "space": "teacher", **changes}
    given = write_corpus(tmp_path)
    with pytest.raises(RecipeError, match=message):
        parse(Recipe, {**given, "distill": {**given["distill"], **distill}}, "r")
    backbone = {"path": "some/where", "embeddings_from": "some/where"}
    with pytest.raises(RecipeError, match="embeddings_from: a model of path has its own embeddings"):
        parse(Recipe, {**given, "backbone": backbone}, "r")
