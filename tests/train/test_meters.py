"""Curves stay short and keep their means, and a run that goes on shows what one in a single go shows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from f2llm_ray.train.meters import DECAY, POINTS, TrainingMeters
from f2llm_ray.train.step import Done, Seen
from f2llm_ray.train.validation import HeldOut


def filled(meters: TrainingMeters, steps: range) -> TrainingMeters:
    for step in steps:
        source, task = [("pairs", "retrieval"), ("labels", "classification")][step % 3 == 0]
        values = {"loss": 1 / (step + 1), "gradient_norm": 2.0}
        seen = Seen(source=source, task=task, loss=values["loss"], tokens=10, positions=15, flops=4.0)
        meters.record(step + 1, Done([seen], values, waited=0.0), rate=8e-6 / (step + 1), seconds=0.0)
        meters.validation(step + 1, HeldOut(values["loss"], None if step % 2 else 0.5), 0.25)
    return meters


@pytest.mark.parametrize("steps", [3, POINTS - 1, 2 * POINTS, 5 * POINTS + 3])
def test_a_curve_stays_short_and_keeps_its_mean(steps: int) -> None:
    curve = filled(TrainingMeters(), range(steps)).curves["loss"]
    assert len(curve) < 2 * POINTS
    stride = curve[0][0]
    assert [step for step, _ in curve] == list(range(stride, steps + 1, stride))
    losses = np.array([1 / (step + 1) for step in range(len(curve) * stride)])
    np.testing.assert_allclose([loss for _, loss in curve], losses.reshape(-1, stride).mean(1), rtol=1e-5)


def test_a_small_learning_rate_keeps_its_digits() -> None:
    assert filled(TrainingMeters(), range(3)).curves["learning_rate"][2][1] == pytest.approx(8e-6 / 3, rel=1e-6)


@pytest.mark.parametrize("first", [1, 100, 2 * POINTS + 1])
def test_what_goes_on_from_a_state_is_what_never_stopped(first: int) -> None:
    steps = 2 * POINTS + 50
    whole, resumed = filled(TrainingMeters(), range(steps)), TrainingMeters()
    resumed.load(json.loads(json.dumps(filled(TrainingMeters(), range(first)).state())))
    assert filled(resumed, range(first, steps)).summary() == whole.summary()


def test_running_losses_are_of_their_own_source_and_task() -> None:
    meters = filled(TrainingMeters(), range(5))
    wanted = 1 / 2
    for step in (2, 4):
        wanted = DECAY * wanted + (1 - DECAY) / (step + 1)
    summary = meters.summary()
    assert summary["source_loss"]["pairs"] == pytest.approx(wanted)
    assert summary["task_loss"]["retrieval"] == pytest.approx(wanted)
    assert summary["tokens"] == 50
    assert summary["padding_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert summary["score"] == [[1, 0.5], [3, 0.5], [5, 0.5]]
    assert "classification" in meters.line()[0]


def test_batches_of_one_step_count_each_for_its_own_source() -> None:
    meters = TrainingMeters(peak_flops_per_second=100.0)
    seen = [
        Seen(source=source, task="retrieval", loss=loss, tokens=1, positions=1, flops=10.0)
        for source, loss in (("a", 1.0), ("b", 3.0), ("a", 2.0))
    ]
    done = Done(seen, {"loss": 2.0, "gradient_norm": 1.0}, waited=0.1)
    meters.record(1, done, rate=1.0, seconds=0.5)
    assert meters.running["source_loss"] == {"a": pytest.approx(DECAY + (1 - DECAY) * 2), "b": 3.0}
    assert [loss for _, loss in meters.curves["loss"]] == [2.0]
    assert meters.rates()["mfu"] == pytest.approx(30 / 0.5 / 100)
    assert "MFU 60.0%" in meters.line()
