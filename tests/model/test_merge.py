"""Merging: the mean of equal weights is those weights to the last bit, an arc has exact ends and keeps lengths."""

from __future__ import annotations

import math

import pytest
import torch

from f2llm_ray.model.merge import average, slerp


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_weights_merge_to_themselves_bit_for_bit(count: int) -> None:
    for scale in (1e-30, 1.0, 1e30):
        value = weights(0, 33, 17) * scale
        assert torch.equal(average([value.clone() for _ in range(count)]), value)
        assert torch.equal(slerp(value, value.clone()), value)


def test_the_mean_is_that_of_float64() -> None:
    values = [weights(seed, 40, 30) * 10**seed for seed in range(5)]
    expected = torch.stack([value.double() for value in values]).mean(0).float()
    assert torch.equal(average(values), expected)
    assert average(values).dtype is torch.float32


def test_an_arc_has_exact_ends() -> None:
    first, second = weights(0, 8, 9), weights(1, 8, 9)
    assert torch.equal(slerp(first, second, 0.0), first)
    assert torch.equal(slerp(first, second, 1.0), second)


def test_an_arc_turns_evenly_and_keeps_the_length() -> None:
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for place in (0.25, 0.5, 0.9):
        angle = place * math.pi / 2
        expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
        torch.testing.assert_close(slerp(first, second, place), expected)


def test_where_there_is_no_arc_it_is_the_line() -> None:
    zero, value = torch.zeros(5), weights(0, 5)
    torch.testing.assert_close(slerp(zero, value), value / 2)
    torch.testing.assert_close(slerp(value, 3 * value), 2 * value)
    torch.testing.assert_close(slerp(value, -value), torch.zeros(5), atol=1e-6, rtol=0)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        average([])
