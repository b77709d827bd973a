from __future__ import annotations

import math

import pytest
import torch

from dq_plugins.errors import DQError
from dq_plugins.metrics import metric, mse, noise_power, sqnr


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return x, x + 0.1 * torch.randn(4, 3, 8, 8, generator=generator)


def test_values_by_hand():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])
    assert noise_power(x, y) == pytest.approx(0.25 / 25)
    assert sqnr(x, y) == pytest.approx(20.0)
    assert mse(x, y) == pytest.approx(0.125)


def test_sqnr_of_gaussian_noise_is_its_level():
    x, y = pair()
    assert sqnr(x, y) == pytest.approx(20, abs=1)


def test_noise_powers_of_independent_errors_add_up():
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(100_000, generator=generator) for _ in range(3))
    both = noise_power(x, x + 0.01 * a + 0.02 * b)
    assert both == pytest.approx(noise_power(x, x + 0.01 * a) + noise_power(x, x + 0.02 * b), rel=0.02)


def test_equal_and_zero_tensors():
    x = torch.ones(3)
    assert (noise_power(x, x), sqnr(x, x), mse(x, x)) == (0.0, math.inf, 0.0)
    assert sqnr(torch.zeros(3), x) == -math.inf
    assert sqnr(torch.zeros(3), torch.zeros(3)) == math.inf


def test_half_precision_is_compared_in_double():
    x = torch.full((4,), 1000.0, dtype=torch.float16)
    assert mse(x, x + 1) == 1.0


@pytest.mark.parametrize("other", [torch.zeros(4, 3, 8, 7), torch.full((4, 3, 8, 8), torch.nan)])
def test_wrong_tensors_are_refused_by_name(other: torch.Tensor):
    with pytest.raises(DQError, match="'sqnr'"):
        sqnr(pair()[0], other)


def test_empty_tensors_are_refused():
    with pytest.raises(DQError, match="empty"):
        mse(torch.zeros(0), torch.zeros(0))


def test_a_metric_is_one_decorator():
    @metric(higher_is_better=False)
    def worst(reference: torch.Tensor, output: torch.Tensor) -> float:
        return float((reference - output).abs().max())

    assert worst(torch.zeros(2), torch.tensor([1.0, -3.0])) == 3
    assert worst.higher_is_better is False
