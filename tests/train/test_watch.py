"""The driver prints what workers report, and measures each checkpoint once, as the model that it would become."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from safetensors.torch import load_file

from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.settings import Compute
from f2llm_ray.evaluate.measure import measure
from f2llm_ray.evaluate.tasks.retrieval_set import from_pairs
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.training import Training, TrainJob
from f2llm_ray.train.watch import SCORES_FILE, report, watched
from tests.tiny import LINES, tiny_model
from tests.train.test_merging import write_checkpoint

NAME = "ndcg@10 on lines"


@pytest.fixture
def cluster(no_ray: None) -> None:
    del no_ray
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)


def job_of(folder: Path) -> TrainJob:
    """A stage with a tiny student, and a set of pairs of lines."""
    lines = [*LINES, *(" ".join(line.split()[::-1]) for line in LINES)]
    columns = {
        "query": lines,
        "passage": [line[: len(line) // 2] for line in lines],
        "language": ["eng"] * len(lines),
    }
    place = Folder.at(str(folder))
    from_pairs(pa.table(columns), name="lines", instruction="").write(place / "set")
    tiny_model(folder / "student")
    training = Training(
        stage="only",
        model_name="tiny-only",
        run_name="tiny",
        settings=TrainStage(),
        sources={"pairs": SourceFacts("retrieval", "")},
        seed=0,
        compute=Compute(),
        sets={"lines": place / "set"},
    )
    return TrainJob(
        training=training,
        student=place / "student",
        teacher=None,
        taught=None,
        tokens=place / "tokens",
        batches=place / "batches",
        out=place / "out",
    )


@pytest.mark.usefixtures("cluster")
def test_reports_are_printed_and_checkpoints_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, out = job_of(tmp_path), tmp_path / "out"
    state = load_file(tmp_path / "student" / "model.safetensors")
    model = tiny_model(tmp_path / "other", hidden=32)
    write_checkpoint(out, 20, state, 2)
    damaged = write_checkpoint(out, 30, state, 1) / "part-00000-of-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    write_checkpoint(out, 10, state, 1)
    (out / SCORES_FILE).write_text(json.dumps({NAME: [[10, 0.125]]}))
    with watched(job):
        for line in ("a line", "a line", "another"):
            ray.get(report(job, line))
        ray.get(report(job, {"first": 10, "step": 40, "steps": 40, "line": ["loss 1"]}))
    printed = capsys.readouterr().out
    for line in ("only: a line", "only: another", "only: goes on from step 10", "only: 40/40 steps, loss 1"):
        assert printed.count(f"{line}\n") == 1, printed
    assert "only: the checkpoint of step 30 is not measured: " in printed
    assert "has" in printed.partition("is not measured: ")[2]
    expected = measure(Engine(model), job.training.sets, [1])["lines"]
    curves = json.loads((out / SCORES_FILE).read_text())
    # That of an earlier try is kept.
    assert curves == {NAME: [[10, 0.125], [20, pytest.approx(expected["scores"]["32"]["ndcg@10"])]]}


@pytest.mark.usefixtures("cluster")
def test_a_training_that_fails_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path)
    write_checkpoint(tmp_path / "out", 10, load_file(tmp_path / "student" / "model.safetensors"), 1)

    def fail() -> None:
        with watched(job):
            ray.get(report(job, "the last line"))
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert "only: the last line\n" in capsys.readouterr().out
    assert not (tmp_path / "out" / SCORES_FILE).exists()
