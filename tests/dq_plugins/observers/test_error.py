from __future__ import annotations

import pytest
import torch

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.observers.error import range_errors
from dq_plugins.observers.histogram import Histogram


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_the_error_of_the_quantizer_that_executes(bits, power, symmetric):
    torch.manual_seed(0)
    x, weights = torch.randn(1000), torch.rand(1000)
    high = torch.linspace(0.5, 4, 300)
    found = range_errors(x, weights, -0.5 * high, high, bits, symmetric=symmetric, power=power)
    for c in (0, 123, 299):
        scale, zero = affine_parameters(-0.5 * high[c], high[c], bits, symmetric=symmetric)
        error = (fake_quantize(x, scale, zero, *integer_range(bits)) - x).abs().double().pow(power)
        expected = (error * weights.double()).sum() / weights.double().sum()
        assert float(found[c]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "silu", "heavy tail", "few"])
def test_a_histogram_gives_the_error_of_all_values(kind, bits, symmetric):
    torch.manual_seed(1)
    x = torch.randn(100_000)
    x = {
        "normal": x,
        "silu": torch.nn.functional.silu(2 * x),
        "heavy tail": torch.distributions.StudentT(3.0).sample((100_000,)),
        "few": x[:100],
    }[kind]
    histogram = Histogram()
    low, high = float(x.min()), float(x.max())
    histogram.update(x, low, high)
    shrink = torch.tensor([1.0, 0.83, 0.61, 0.37])
    options = {"symmetric": symmetric}
    estimate = range_errors(*histogram.points(), low * shrink, high * shrink, bits, **options)
    truth = range_errors(x, torch.ones_like(x), low * shrink, high * shrink, bits, **options)
    assert torch.allclose(estimate, truth, rtol=0.02)
