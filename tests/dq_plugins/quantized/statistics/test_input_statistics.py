from __future__ import annotations

import pytest
import torch

from dq_plugins.quantized.statistics import InputStatistics


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e30, 0.0])
def test_squares_are_summed_at_any_magnitude(size):
    values = size * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    found = InputStatistics()
    found.update(values)
    assert found.squares == pytest.approx(float(values.double().square().sum()), rel=1e-5)
