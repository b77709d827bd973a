from __future__ import annotations

import pytest
import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant
from dq_brevitas.integer import ReciprocalIntQuant, TimestepIntQuant

from dq_plugins.affine import fake_quantize

BITS, SCALE = torch.tensor(8.0), torch.tensor(0.0123)
TIES = (torch.arange(-120, 120) + 0.5) * SCALE


def run(kind, x, zero_point=0.0):
    quantizer = kind(narrow_range=False, signed=True, input_view_impl=Identity())
    return quantizer(SCALE, torch.tensor(zero_point), BITS, x)


@pytest.mark.parametrize("zero_point", [0.0, 3.0])
def test_reciprocal_arithmetic_is_that_of_the_plan_at_every_tie(zero_point):
    assert torch.equal(
        run(ReciprocalIntQuant, TIES, zero_point), fake_quantize(TIES, SCALE, int(zero_point), -128, 127)
    )
    assert not torch.equal(run(ReciprocalIntQuant, TIES, zero_point), run(IntQuant, TIES, zero_point))


def test_timestep_arithmetic_is_brevitas_own():
    assert torch.equal(run(TimestepIntQuant, TIES), run(IntQuant, TIES))


@pytest.mark.parametrize("kind", [TimestepIntQuant, ReciprocalIntQuant])
def test_output_has_the_dtype_of_the_input(kind):
    quantizer = kind(narrow_range=False, signed=True, input_view_impl=Identity())
    per_sample = SCALE.expand(2).reshape(2, 1)
    assert quantizer(per_sample, torch.tensor(0.0), BITS, torch.randn(2, 3).bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_input_and_scale():
    x, scale = torch.randn(64, requires_grad=True), torch.tensor(0.05, requires_grad=True)
    quantizer = ReciprocalIntQuant(narrow_range=False, signed=True, input_view_impl=Identity())
    quantizer(scale, torch.tensor(0.0), BITS, x).sum().backward()
    assert bool((x.grad == 1).all()), "straight through inside the range"
    assert float(scale.grad) != 0
