"""Ending in the teacher's space: the loss, the map that is trained and written, and vectors that are copied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cosine_similarity

from f2llm_ray.data.keyed import META
from f2llm_ray.data.keys import Keys
from f2llm_ray.data.schema import KEY, SourceFacts, key_numbers, text_key
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.settings import Compute
from f2llm_ray.engine.vector_files import Halves
from f2llm_ray.model.checkpoint import Space, load_backbone, load_info, save_model
from f2llm_ray.model.dense import dense_of, end_in
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import teacher_store
from f2llm_ray.train.losses import TextPlaces, contrastive
from f2llm_ray.train.model_folder import trained_info, write_reweighted
from f2llm_ray.train.objective import StageLoss, Student
from f2llm_ray.train.settings import Distill, TrainStage
from f2llm_ray.train.teacher import TeacherVectors, learned_dims, space_dims, space_of
from f2llm_ray.train.teacher_store import TeacherStore
from f2llm_ray.train.teachers import Earlier
from f2llm_ray.train.training import Training
from tests.tiny import tiny_model
from tests.train.test_step import SOURCES, batch_of

DIMS = 40
STAGE = Distill(
    teacher="a/b", space="teacher", mse_weight=0.5, cosine_weight=2, in_batch_weight=0.5, instructions=False
)


def test_all_terms_are_of_the_mapped_vectors_and_the_teachers_dims(tmp_path: Path) -> None:
    """And the map that was trained is the one that is written, in float64 to the last digit that float32 keeps."""
    folder = tiny_model(tmp_path / "model")
    backbone = load_backbone(folder)
    mean = np.linspace(-1, 1, DIMS, dtype=np.float32)
    end_in(backbone, DIMS, "here", mean)
    student = Student(backbone.double(), "last", 4096)
    batch = batch_of(0, "pairs", slice(None))
    target_nD = torch.randn(len(batch.tokens), DIMS, generator=torch.Generator().manual_seed(0)).half()
    batch = replace(batch, teacher=target_nD.numpy())
    loss = StageLoss(STAGE, SOURCES, DIMS, TeacherVectors(DIMS), (10, DIMS))
    assert loss.projected_dims is None
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    before = dense_of(backbone).weight.detach().clone()  # type: ignore[union-attr]
    for _ in range(2):
        v_nD = student(batch.tokens)
        value, parts = loss(v_nD, batch)
        arrays = (batch.query, batch.passage, batch.negative, batch.passage_id, batch.query_id)
        places = TextPlaces(*(torch.from_numpy(array) for array in arrays))
        own, of_dims = contrastive(v_nD, places, STAGE, "retrieval", (10, DIMS))
        assert of_dims.total_m.shape == parts.total_m.shape == (2,)
        target = target_nD.double()  # each text stands in one place: the mean over places is that over texts
        squares = (v_nD - target).square().mean()
        cosines = 1 - cosine_similarity(v_nD, target, dim=1).mean()
        torch.testing.assert_close(
            value, own + 0.5 * squares + 2 * cosines, rtol=1e-8, atol=0
        )  # the teacher is float32
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    trained = dense_of(backbone)
    assert trained is not None
    assert (trained.weight != before).all()
    assert (trained.bias.detach() != torch.from_numpy(mean)).all()
    state = {name: weight.detach().float() for name, weight in backbone.state_dict().items()}
    save_model(tmp_path / "out", backbone, load_tokenizer(folder), load_info(folder), state=state)
    written = load_backbone(tmp_path / "out")
    dense = dense_of(written)
    assert dense is not None
    for name in ("weight", "bias"):
        assert torch.equal(dense.get_parameter(name), trained.get_parameter(name).float())
    found = encode(written.double(), batch.tokens, pooling="last", tokens_per_pass=4096)
    torch.testing.assert_close(found, student(batch.tokens), rtol=0, atol=1e-5)
    # A checkpoint's weights over the model that training began from, which had no map.
    write_reweighted(folder, tmp_path / "copy", load_info(folder), lambda name, _: state[name], ends=(DIMS,))
    assert torch.equal(dense_of(load_backbone(tmp_path / "copy")).bias, dense.bias)  # type: ignore[union-attr]


def test_a_model_says_the_teachers_dims_and_space_until_it_is_trained_without_it(tmp_path: Path) -> None:
    teacher = Folder.at(str(tiny_model(tmp_path / "teacher", name="big")))
    before = load_info(tiny_model(tmp_path / "student", hidden=16))
    assert learned_dims(STAGE, (8, 16, 32), 16) == 32, "nothing of the teacher is cut"
    ends, space = space_dims(STAGE, model=teacher, vectors=None), space_of(teacher)
    assert (ends, space.model, len(space.checksum)) == ((8, 16, 32), "big", 16)
    training = Training(
        stage="distilled",
        model_name="r-distilled",
        run_name="r",
        settings=STAGE,
        sources={"pairs": SourceFacts("retrieval", "")},
        seed=0,
        compute=Compute(),
    )
    assert space_dims(STAGE.model_copy(update={"space": "own"}), model=teacher, vectors=None) is None
    made = trained_info(before, replace(training, ends=ends, space=space))
    assert (made.dims, made.space) == ((8, 16, 32), space)
    after = trained_info(replace(made, dims=(40,)), replace(training, settings=TrainStage(instructions=False)))
    assert (after.dims, after.space) == ((8, 16, 32, 40), None)
    assert made.space == Space(model="big", checksum=space.checksum)


# Vectors that an earlier stage has.


def store_of(folder: Path, keys: Keys, vectors_nd: Halves) -> TeacherStore:
    place, vector_of = Folder.at(str(folder)), dict(zip(map(tuple, keys.tolist()), vectors_nd, strict=True))
    counts = {shard: teacher_store.write_keys(place, shard, 2, [np.unique(keys, axis=0).T]) for shard in (0, 1)}
    for shard, piece, _ in teacher_store.pieces(counts):
        own = [vector_of[tuple(key)] for key in teacher_store.read_keys(place, shard, piece).tolist()]
        np.save(folder / teacher_store.piece_file(shard, piece), np.stack(own))
    facts = {"shards": 2, "texts": len(keys), "dims": vectors_nd.shape[1], "nested": True, "trained": [2, 5]}
    place.write_json(META, facts)
    return TeacherStore(folder)


def test_what_an_earlier_stage_has_is_copied_and_the_rest_encoded(tmp_path: Path) -> None:
    keys = key_numbers(pa.array([text_key(str(n)) for n in range(60)], KEY))
    vectors_nd = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float16)
    store = store_of(tmp_path, keys[:40], vectors_nd[:40])
    vectors = Folder.at(str(tmp_path))
    asked: list[Keys] = []

    def encode_some(some: Keys) -> tuple[Halves, int]:
        asked.append(some)
        return np.zeros((len(some), 5), np.float16), 7

    earlier = Earlier(vectors, 5)
    found_nd, counts = earlier.completed(keys, encode_some)
    assert counts == {"texts": 20, "tokens": 7}
    np.testing.assert_array_equal(asked[0], keys[40:])
    np.testing.assert_array_equal(earlier.missing(keys), keys[40:])
    np.testing.assert_array_equal(found_nd[:40], vectors_nd[:40])
    assert not found_nd[40:].any()
    _, counts = earlier.completed(keys[:40], encode_some)
    assert counts == {"texts": 0, "tokens": 0}
    assert len(asked) == 1, "nothing is missing, so nothing is asked"
    for none in (
        Earlier(None, 5),
        Earlier(vectors, 4),
        Earlier(vectors / "nowhere", 5),
    ):  # of other dims, or not there
        assert len(none.missing(keys)) == 60
        assert none.completed(keys, encode_some)[1] == {"texts": 60, "tokens": 7}
    # Its mean is that of one range, and its dims are those that the teacher was trained for.
    parts = [np.load(tmp_path / teacher_store.piece_file(shard, 0)).astype(np.float64) for shard in (0, 1)]
    np.testing.assert_allclose(store.mean(), parts[0].mean(0), rtol=1e-6)
    assert space_dims(STAGE, model=None, vectors=vectors) == (2, 5)
    assert teacher_store.trained_dims({"dims": 5}) == (5,)


@pytest.mark.parametrize("space", ["own", "teacher"])
def test_only_the_first_dims_are_learned_where_the_student_keeps_its_own(space: str) -> None:
    stage = Distill.model_validate({"teacher": "a/b", "space": space})
    assert stage.teacher_is_cut == (space == "own")
